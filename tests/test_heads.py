"""heads.py: a census of hand-wired heads whose jobs are known, and the program."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import direct as A
import features as F
import heads
import wired as W
from conftest import program

# ---- heads whose jobs are known ----


@pytest.fixture(scope="module")
def wired():
    """Four heads with known jobs, and an SAE trained on their z_cat."""
    jobs = [[("after a copy", [0, 1, 2, 3])], [("before", [0, 1]), ("copy", [2, 3])],
            [("itself", [0, 1, 2, 3])], [("set", [0]), ("set", [1])]]
    model = W.wire(jobs)
    sae = W.train_sae(W.z_cat(model, W.text(400, "train")))
    text = W.text(600, "census")
    of_layer, tokens = W.collection(model, sae, text)
    return model, sae, tokens, torch.where(text == W.BOS, -1, text), of_layer


def test_wired_heads_look_where_they_should():
    jobs = [[("after a copy", [0]), ("before", [1]), ("copy", [2]), ("set", [3])],
            *[[("itself", [1, 3])]] * 3]
    model, tokens = W.wire(jobs), W.text(20, "look")
    _, cache = model(tokens, keep=(1,))
    for row, pattern in zip(tokens.tolist(), cache[1].pattern):
        for q in range(1, W.T):
            kind, at = row[q] % W.KINDS, pattern[0, q]
            keys = {0: [k for k in range(2, q) if row[k - 1] == row[q]], 1: [q - 1],
                    2: [k for k in range(1, q) if row[k] == row[q]],
                    3: [k for k in range(1, q) if row[k] in W.tokens_of([3])[::2]]}[kind] or [0]
            expected = torch.zeros(W.T)
            expected[keys] = 1 / len(keys)
            torch.testing.assert_close(at, expected, atol=1e-3, rtol=0)
            assert int(pattern[1, q].argmax()) == (q if kind in (1, 3) else 0)


def test_a_wired_induction_heads_features_are_called_induction(wired):
    model, sae, tokens, classes, of_layer = wired
    kept, reads = of_layer.collected, of_layer.reads
    share, chance, X, X_share = F.after_copy_shares(kept, reads, tokens, classes)
    weights = A.head_weights(sae.W_dec, 4)
    mine = (weights[:, 0] > 0.6) & (kept.n >= 100)
    assert mine.sum() >= 10
    called = (share >= F.MIN_AFTER_COPY) & (share >= F.MIN_RATIO_TO_CHANCE * chance)
    assert called[mine].double().mean() > 0.9, "features of the induction head are induction"
    others = (weights[:, 1:3].amax(1) > 0.6) & (kept.n >= 100)
    assert called[others].double().mean() < 0.1, \
        "those of the heads that look back or at themselves are not"
    reads_one = mine & (X_share > 0.8)
    assert reads_one.sum() >= 5, "an SAE of one-hot vectors has features of one token"
    z = torch.zeros(W.N, sae.d_in)
    z[torch.arange(W.N), torch.arange(W.N)] = 1.0       # head 0 has moved token t
    strongest = sae.encode(z).argmax(0)
    assert (strongest[reads_one] == X[reads_one]).double().mean() > 0.9, \
        "X is the token that was moved"


def test_the_census_names_the_jobs(wired):
    model, sae, tokens, classes, of_layer = wired
    census = heads.census_of_layer(model, sae, 1, of_layer, tokens, classes)
    for choice, key in (("top 25", "top"), ("50 drawn", "drawn")):
        one = [head["roles"][choice] for head in census]
        assert one[0] < heads.POLYSEMANTIC_ABOVE and one[2] < heads.POLYSEMANTIC_ABOVE, \
            f"{choice}: heads with one job are monosemantic"
        assert one[3] > heads.POLYSEMANTIC_ABOVE, \
            f"{choice}: two sets that share no token are two roles"
        relations = np.array([head[key]["relations"] for head in census])
        assert relations[0].argmax() == heads.RELATIONS.index("a token after a copy")
        assert relations[2, 0] > 0.9, "reads the token itself"
        line = heads.summary(census[0][key], SimpleNamespace(decode=str))
        assert "read a token after a copy" in line
    assert len(census[1]["top"]["features"]) == 25 and len(census[1]["features"]) == 50


def test_features_of_the_census_are_drawn_by_what_the_head_gathers(wired):
    """A feature that a head gathers nothing for is never drawn, and those drawn have most of what
    it does."""
    model, sae, tokens, classes, of_layer = wired
    kept, reads = of_layer.collected, of_layer.reads
    census = heads.census_of_layer(model, sae, 1, of_layer, tokens, classes)
    for one in census:
        mass = np.zeros(sae.d_sae)
        for place in range(len(kept.weight)):
            value = max(float(reads.head_value[place, one["head"]]), 0.0)
            mass[kept.sample.feature[place]] += float(
                kept.weight[place] / kept.sample.f[place]) * value
        drawn = one["drawn"]["features"]
        assert len(set(drawn)) == heads.CHOICES[heads.DRAWN] and (mass[drawn] > 0).all()
        n_drawn = heads.CHOICES[heads.DRAWN]
        the_rest = np.sort(mass)[::-1][n_drawn:]
        assert mass[drawn].sum() > 2 * n_drawn * the_rest.sum() / len(mass)


def test_a_census_of_an_sae_that_is_all_but_dead_is_empty(wired):
    model, sae, tokens, classes, of_layer = wired
    kept = of_layer.collected
    rare = kept._replace(n=kept.n.clamp_max(1))
    census = heads.census_of_layer(model, sae, 1, of_layer._replace(collected=rare), tokens,
                                   classes)
    assert all(one["features"] == one["drawn"]["features"] == [] for one in census)
    assert all(count is None for one in census for count in one["roles"].values())
    json.dumps(census, allow_nan=False)


def test_chance_is_taken_off_what_is_read_further_back():
    """Half of the places read the token itself, a quarter a copy that they look for, a quarter
    anywhere: the share of copies is that quarter, however much is read nearby."""
    rng = np.random.default_rng(0)
    n, T, q = 4000, 40, 39
    classes = rng.integers(0, 5, (n, T))
    classes[:, 0] = -1
    source = np.full(n, q)
    for row in range(n // 2, n):
        k = np.arange(1, q - 1)
        if row < 3 * n // 4:
            own = classes[row, q]
            k = k[(classes[row, k] == own) & (classes[row, k - 1] != own)]
        source[row] = rng.choice(k) if len(k) else q
    places = heads.HeadPlaces(torch.arange(n), torch.full((n,), q), torch.zeros(n, dtype=torch.long),
                              torch.from_numpy(source), torch.ones(n))
    of_layer = SimpleNamespace(collected=SimpleNamespace(n=torch.tensor([n])))
    shares, = heads.relation_shares(of_layer, places, torch.from_numpy(classes)).tolist()
    for relation, share in {"itself": 0.5, "the token before": 0.0, "a token after a copy": 0.0,
                            "a copy": 0.25}.items():
        assert shares[heads.RELATIONS.index(relation)] == pytest.approx(share, abs=0.01), relation


def test_similarity_and_roles_by_hand():
    relations = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0.6, 0], [0, 0, 0.6, 0],
                              [0, 0, 0, 0]])
    e = torch.eye(3)
    p = heads.Profiles(relations, e[[0, 1, 0, 0, 0]], e[[0, 1, 0, 1, 0]], e[[0, 1, 0, 0, 0]])
    alike = heads.similarity(p)
    assert alike[0, 1] == 1.0, "a relation is the same whatever the tokens are"
    assert alike[2, 3] == pytest.approx(0.6 + 0.4 * 2 / 3) and alike[0, 2] == 0.0
    assert alike[2, 4] == pytest.approx(0.4), "of what they share, all is alike"
    assert torch.equal(alike, alike.T)
    assert sorted(map(sorted, heads.group_roles(alike, 0.5))) == [[0, 1], [2, 3], [4]]
    assert heads.number_of_roles([[0, 1], [2, 3], [4]]) == 5
    assert heads.number_of_roles([[0], [1], [2]]) == math.inf
    assert heads.roles_text({"roles": {"top 10": math.inf}}, "top 10") == "> 10"
    assert heads.roles_text({"roles": {"top 10": None}}, "top 10") == "n/a"


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_number_of_roles_does_not_grow_with_the_number_of_features(k):
    g = torch.Generator().manual_seed(0)
    for n in (10, 50):
        pairs = []
        for _ in range(400):
            kind = torch.randint(k, (n,), generator=g)
            pairs.append(
                1 / heads.number_of_roles([(kind == i).nonzero()[:, 0].tolist() for i in range(k)]))
        assert 1 / np.mean(pairs) == pytest.approx(k, rel=0.05)


def test_verdicts_are_counted_head_by_head():
    def head(*roles):
        return {"roles": dict(zip(heads.CHOICES, roles))}

    census = [head(2.0, 3.0, math.inf, 1.6), head(1.0, 1.2, None, 1.0), head(1.0, 2.0, 2.0, 1.0),
              head(None, None, None, None)]
    by_choice, agreement = heads.count_polysemantic(census)
    assert by_choice["top 25"] == {"polysemantic": 2, "heads": 3}
    assert by_choice["top 50"] == {"polysemantic": 2, "heads": 2}, \
        "a head with too few has no verdict"
    assert agreement == {"by every choice": 1, "by none": 1, "by some": 1}


# ---- the program ----


def test_heads_reads_what_features_collected_and_collects_it_where_it_is_missing(tmp_path):
    flags = ["--saes", "data/tiny", "--layers", "1,3", "--n-tokens", "6000", "--out", tmp_path]

    def run(name, *more):
        done = program(name, *flags, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone = run("heads")
    folder = tmp_path / "tiny"
    census = (folder / "heads" / "census.json").read_bytes()
    assert "reading text" in alone and "polysemantic heads" in alone
    assert (folder / "heads" / "census.png").stat().st_size > 0
    assert (folder / "features" / "heads.js").read_text().startswith('receive_heads({"about"')
    names = [head["name"] for head in json.loads(census)["heads"]]
    assert names == [f"{layer}.{h}" for layer in (1, 3) for h in range(4)]
    again = run("features", "--no-pages")
    assert "reading what was collected" in again and "reading text" not in again
    (folder / "heads" / "census.json").unlink()
    after = run("heads")
    assert "reading what was collected" in after
    assert (folder / "heads" / "census.json").read_bytes() == census
    assert "reading text" in run("heads", "--seed", "1", "--layers", "1"), \
        "a collection with other settings"
