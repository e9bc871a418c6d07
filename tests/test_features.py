"""features.py, data/keep.py and the dashboards: brute-force counts, and hand-wired heads and features whose
families are known."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import attribution as A
import features as F
import model as models
import sae as S
import wired as W
from conftest import GEMMA_SHAPES, ROOT, random_gemma
from data import keep, pages
from data.common import wilson
from data.keep import Entries

# ---- what is kept of a stream ----


def random_entries(n, d_sae, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Entries(torch.randint(500, (n,), generator=g), torch.randint(1, 50, (n,), generator=g),
                   torch.randint(d_sae, (n,), generator=g), torch.rand(n, generator=g).pow(4) + 1e-4)


def test_a_keeper_of_a_stream_keeps_what_sorting_everything_keeps():
    every = random_entries(20_000, 7)
    keeper = keep.Keeper(5, 7, at_least=50)
    for i in range(0, 20_000, 333):
        part = every.pick(slice(i, i + 333))
        keeper.add(part, part.feature, part.f)
    kept, group, key = keeper.best()
    for i in range(7):
        best = every.f[every.feature == i].sort(descending=True).values[:5]
        torch.testing.assert_close(kept.f[kept.feature == i], best)
    assert torch.equal(group, kept.feature) and torch.equal(key, kept.f)


def test_an_empty_keeper_has_nothing():
    kept, group, key = keep.Keeper(3, 4).best()
    assert len(kept.f) == len(group) == len(key) == 0


def collector_of(every, d_sae, n_places=30, seed=0):
    collector = keep.Collector(d_sae, n_places)
    u = 1 - torch.rand(500, 50, generator=torch.Generator().manual_seed(seed))
    for i in range(0, len(every.f), 700):
        part = every.pick(slice(i, i + 700))
        collector.add(part, u[part.row, part.q])
    return collector.result()


def test_a_collector_counts_as_numpy_does():
    """Activations grow along the stream, so that bins join many times."""
    every, d_sae = random_entries(20_000, 6), 8
    every = every._replace(f=every.f * torch.linspace(0.001, 3, 20_000))
    kept = collector_of(every, d_sae)
    for i in range(d_sae):
        f = every.f[every.feature == i]
        assert int(kept.n[i]) == len(f) and float(kept.mass[i]) == pytest.approx(float(f.double().sum()))
        if not len(f):
            continue
        assert float(kept.largest[i]) == float(f.max())
        edges = np.arange(keep.N_BINS + 1) * float(kept.width[i])
        counts, _ = np.histogram(f.double().numpy(), edges)
        assert counts.tolist() == kept.counts[i].tolist(), "bins were joined wrongly"
        assert counts[keep.N_BINS // 2:].sum() > 0, "less than half of the bins are in use"
        top = kept.top.f[kept.top.feature == i]
        torch.testing.assert_close(top, f.sort(descending=True).values[:keep.N_TOP])


def test_examples_come_from_every_tenth_of_the_range():
    every = random_entries(50_000, 2)
    kept = collector_of(every, 2)
    for i in range(2):
        f = every.f[every.feature == i]
        tenth = lambda x: (x / f.max() * 10).long().clamp_max(9)
        there, shown = (torch.bincount(tenth(x), minlength=10)
                        for x in (f, kept.spread.f[kept.spread.feature == i]))
        assert torch.equal(shown, there.clamp_max(keep.N_PART)), "a tenth has too few examples, or too many"
        order = tenth(kept.spread.f[kept.spread.feature == i])
        assert (order.diff() <= 0).all(), "the highest tenth comes first"


def test_shares_by_priority_sampling_are_right_on_average():
    """A property that half of the places have, more so the strong ones; 30 places of about 1,000 are kept."""
    every = random_entries(2000, 2)
    has = (every.f > 0.3) | (every.q < 5)
    true = torch.bincount(every.feature, every.f * has) / torch.bincount(every.feature, every.f)
    found, whole = [], []
    for seed in range(300):
        kept = collector_of(every, 2, seed=seed)
        hit = (kept.sample.f > 0.3) | (kept.sample.q < 5)
        assert torch.bincount(kept.sample.feature).tolist() == [30, 30]
        total = torch.bincount(kept.sample.feature, kept.weight)
        found.append(torch.bincount(kept.sample.feature, kept.weight * hit) / total)
        whole.append(total / torch.bincount(every.feature, every.f))
    found, whole = torch.stack(found), torch.stack(whole)
    assert (found.mean(0) - true).abs().max() < 4 * float(found.std(0).max()) / math.sqrt(300) + 0.005
    assert (whole.mean(0) - 1).abs().max() < 4 * float(whole.std(0).max()) / math.sqrt(300)


def test_a_feature_with_few_places_has_them_all():
    every = random_entries(40, 2)
    kept = collector_of(every, 2)
    assert len(kept.sample.f) == 40 and torch.equal(kept.weight, kept.sample.f)


def test_active_entries_are_the_encoded_ones(tiny):
    saes = S.load_all(ROOT / "data" / "tiny", tiny)
    tokens = torch.randint(4000, (3, 40), generator=torch.Generator().manual_seed(0))
    for layer, entries in S.active_entries(tiny, saes, tokens):
        f = saes[layer].encode(tiny.z_cat_at(tokens, [layer])[layer])
        f[:, 0] = 0
        found = torch.zeros_like(f)
        found[entries.row, entries.q, entries.feature] = entries.f
        torch.testing.assert_close(found, f, atol=2e-5, rtol=1e-4)
        assert (entries.f > 0).all()


# ---- what was read ----


@pytest.fixture(scope="module")
def collected(tiny):
    """Two layers of tiny over 20 rows of random tokens that repeat."""
    saes = {layer: S.SAE.load(ROOT / "data" / "tiny" / f"L{layer}") for layer in (1, 3)}
    g = torch.Generator().manual_seed(0)
    half = torch.randint(4000, (20, 20), generator=g)
    stream = torch.cat([torch.full((20, 1), 4095), half, half], 1)
    tokens, kept = F.collect(tiny, saes, [stream], 20, n_places=20)
    return tiny, saes, tokens, kept, F.look_again(tiny, saes, tokens, kept)


def test_sources_equal_those_of_dfa(collected):
    model, saes, tokens, kept, looked = collected
    for layer in saes:
        sample, reads = kept[layer].sample, looked[layer][0]
        for n in range(0, len(sample.f), len(sample.f) // 25):
            row, q, i = int(sample.row[n]), int(sample.q[n]), int(sample.feature[n])
            _, cache = model(tokens[row:row + 1].long(), keep=(layer,))
            v = cache[layer].v - model.value_bias(layer).unflatten(0, (4, -1))
            moved = A.dfa(cache[layer].pattern, v, saes[layer].W_enc[:, i])[0, :, q]                # (H,k)
            if q > 1:
                assert int(reads.source[n]) == 1 + int(moved.sum(0)[1:q].argmax()), "BOS and q are no sources"
            assert reads.head_source[n].tolist() == (1 + moved[:, 1:q + 1].argmax(-1)).tolist()
            torch.testing.assert_close(reads.head_value[n], moved[:, 1:q + 1].max(-1).values, atol=1e-5,
                                       rtol=1e-4)


def test_what_a_dashboard_shows_sums_to_the_activation(collected):
    model, saes, tokens, kept, looked = collected
    for layer, sae in saes.items():
        top, shown = kept[layer].top, looked[layer][1]
        constant = A.feature_bias(sae) + model.value_bias(layer) @ sae.W_enc
        torch.testing.assert_close(shown.total.sum(1) + constant[top.feature], top.f, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shown.window[:, F.BEFORE].float(), top.f, atol=1e-3, rtol=1e-3)
        few = (top.q < F.N_SOURCES).nonzero()[:, 0]     # all their sources are among those kept
        assert len(few) > 20
        there = (shown.sources[few] >= 0)[..., None]
        torch.testing.assert_close((shown.by_head[few] * there).sum(1), shown.total[few], atol=1e-4,
                                   rtol=1e-4)


# ---- families ----


def test_the_context_needed_by_hand():
    #                        n = 1    2    4    8    16   32
    cut = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9, 0.9], [0.1, 0.2, 0.6, 0.7, 0.9, 1.0],
                        [0.1, 0.1, 0.1, 0.1, 0.1, 0.2], [0.6, 0.1, 0.6, 0.6, 0.6, 0.6],
                        [0.1, 0.1, 0.1, 0.9, math.nan, math.nan], [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]])
    needed, unstable = F.context_needed(cut)
    assert needed.tolist() == [0, 2, 6, 2, 3, 4]
    assert unstable.tolist() == [False, False, False, True, False, False]
    n = torch.full((6,), 100)
    plenty = torch.full((6, 6), 100.0)
    families = F.Families(torch.tensor([0.1, 0.1, 0.9, 0.4, 0.6, 0.6]),
                          torch.tensor([0.0, 0.0, 0.2, 0.0, 0.3, 0.0]),
                          None, None, F.Context(cut, cut, plenty))
    names = lambda **options: [F.FAMILIES[i] for i in F.family_of(families, n, **options)]
    assert names() == ["current token", "short-range", "induction", "unstable", "short-range", "induction"]
    assert names(share=0.95) == ["current token", "short-range", "long-range", "unstable", "short-range",
                                 "long-range"]
    assert names(times=1.5)[4] == "induction", "twice what chance gives is enough for 1.5 times"
    n[:2] = torch.tensor([3, 0])
    assert F.family_of(families, n).tolist()[:2] == [F.FAMILIES.index("too rare"), -1]


def test_chance_is_what_the_same_distances_give_elsewhere():
    """Three places of a feature; sources 2 back. In the rows 0 and 1 the token 2 back is a copy."""
    classes = torch.tensor([[-1, 5, 6, 5], [-1, 7, 8, 7], [-1, 1, 2, 3]])
    entries = Entries(torch.arange(3), torch.full((3,), 3), torch.zeros(3, dtype=torch.int64), torch.ones(3))
    copy = lambda row, q, k: F.is_copy(classes, row, q, k)
    hits, tried = F.by_chance(entries, torch.ones(3, dtype=torch.int64), copy, seed=0, times=4000)
    assert tried.all()
    torch.testing.assert_close(hits, torch.tensor([0.5, 0.5, 1.0]), atol=0.03, rtol=0)
    alone = F.by_chance(entries.pick(slice(1)), torch.ones(1, dtype=torch.int64), copy, seed=0)
    assert not alone[1].any(), "one place has no other to compare with"


TOPIC, OTHER = range(0, 8), range(8, 40)


def families_model():
    """One layer of three heads with vectors of one-hot tokens: head 0 the token before, head 1 the token
    itself, head 2 the mean over the context, in which BOS weighs as much as 12 tokens."""
    V, T, H = 42, 64, 3
    d_head = V + T + 1
    d, C, bos = H * d_head, 1000.0, 41
    model = models.GPT2(models.GPT2Config(1, H, d, 4, V, T, eps=1e-12)).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        token, place = torch.arange(V), torch.arange(T) + V
        dump, plus, minus = V + T, V + T + 1, V + T + 2
        model.wte.weight[token, token], model.wte.weight[:, dump] = 1.0, -1.0
        model.wpe.weight[torch.arange(T), place], model.wpe.weight[:, dump] = 1.0, -1.0
        model.wpe.weight[:, plus], model.wpe.weight[:, minus] = C, -C
        model.h[0].ln_1.weight.fill_((2 * C * C / d) ** 0.5)
        W = model.h[0].attn.c_attn.weight
        n, scale = torch.arange(T), d_head**0.5
        for h in range(H):
            W[token, 2 * d + h * d_head + token] = 1.0
            W[place, d + h * d_head + V + n] = 1.0
        W[place[1:], V + n[:-1]] = 50 * scale
        W[place, d_head + V + n] = 50 * scale
        W[plus, 2 * d_head + V + T] = scale / C
        W[token[bos], d + 2 * d_head + V + T] = math.log(12)
    sae = S.SAE(d, 4).requires_grad_(False)
    sae.W_enc.zero_(), sae.W_dec.fill_(1.0), S.normalise_decoder(sae)
    sae.W_enc[[10, d_head + 11], 0] = 1.0                       # 0: token 11 after token 10
    sae.W_enc[2 * d_head + torch.tensor(TOPIC), 1] = 1.0        # 1: the topic's share of the context
    sae.W_enc[d_head + 20, 2] = 1.0                             # 2: token 20
    sae.b_enc[:] = torch.tensor([-1.5, -0.45, -0.5, -9.0])
    return model, sae


def test_a_bigram_is_short_range_a_topic_long_range_a_token_current_and_the_rest_not_live():
    model, sae = families_model()
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(8, 40, (600, 64), generator=g)
    topical = torch.randint(0, 8, (600, 64), generator=g)
    of_topic = torch.where(torch.rand(600, 64, generator=g) < 0.85, topical, rows)
    rows = torch.where(torch.rand(600, 1, generator=g) < 0.5, of_topic, rows)
    bigram = torch.rand(600, 64, generator=g) < 0.08
    rows[:, :-1][bigram[:, 1:]] = 10
    rows[bigram] = 11
    rows[:, 0] = 41
    classes = torch.where(rows == 41, -1, rows)
    tokens, kept = F.collect(model, {0: sae}, [rows], 600)
    reads = F.look_again(model, {0: sae}, tokens, kept)[0][0]
    context = F.context_shares(model, {0: sae}, tokens)[0]
    families = F.Families(*F.induction_shares(kept[0], reads, tokens, classes), context)
    family = F.family_of(families, kept[0].n).tolist()
    assert [F.FAMILIES[i] if i >= 0 else "dead" for i in family] == ["short-range", "long-range",
                                                                     "current token", "dead"]
    exact = torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(context.cut[0], exact, atol=0.02, rtol=0)        # exactly two tokens
    exact[0] = 0.08                                     # so often another row has token 10 there
    torch.testing.assert_close(context.replaced[0], exact, atol=0.06, rtol=0)
    torch.testing.assert_close(context.cut[2], torch.ones(6, dtype=torch.float64), atol=0.02, rtol=0)
    assert context.cut[1, 3] < 0.1 and context.cut[1, 5] > 0.5, "8 tokens cannot outweigh BOS"
    words = F.evidence(families, torch.tensor(family), 0, lambda ids: str(ids))
    assert words.startswith("BOS and the last 2 tokens keep 100% of the activation, the current token 0%")


# ---- heads whose jobs are known ----


@pytest.fixture(scope="module")
def wired():
    """Four heads with known jobs, and an SAE trained on their z_cat."""
    jobs = [[("after a copy", [0, 1, 2, 3])], [("before", [0, 1]), ("copy", [2, 3])],
            [("itself", [0, 1, 2, 3])], [("set", [0]), ("set", [1])]]
    model = W.wire(jobs)
    sae = W.train_sae(W.z_cat(model, W.text(400, "train")))
    text = W.text(600, "census")
    tokens, kept = F.collect(model, {1: sae}, [text], len(text))
    reads = F.look_again(model, {1: sae}, tokens, kept)[1][0]
    return model, sae, tokens, torch.where(text == W.BOS, -1, text), kept[1], reads


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
    model, sae, tokens, classes, kept, reads = wired
    share, chance, X, X_share = F.induction_shares(kept, reads, tokens, classes)
    weights = A.head_weights(sae.W_dec, 4)
    mine = (weights[:, 0] > 0.6) & (kept.n >= 100)
    assert mine.sum() >= 10
    called = (share >= F.SHARE) & (share >= F.TIMES * chance)
    assert called[mine].double().mean() > 0.9, "features of the induction head are induction"
    others = (weights[:, 1:3].amax(1) > 0.6) & (kept.n >= 100)
    assert called[others].double().mean() < 0.1, "those of the heads that look back or at themselves are not"
    reads_one = mine & (X_share > 0.8)
    assert reads_one.sum() >= 5, "an SAE of one-hot vectors has features of one token"
    z = torch.zeros(W.N, sae.d_in)
    z[torch.arange(W.N), torch.arange(W.N)] = 1.0       # head 0 has moved token t
    strongest = sae.encode(z).argmax(0)
    assert (strongest[reads_one] == X[reads_one]).double().mean() > 0.9, "X is the token that was moved"


def test_the_census_names_the_jobs(wired):
    model, sae, tokens, classes, kept, reads = wired
    family = torch.zeros(sae.d_sae, dtype=torch.int64)
    census = F.head_census(model, sae, 1, kept, reads, tokens, classes, family)
    for choice, key in (("top 25", "top"), ("50 drawn", "drawn")):
        one = [head["roles"][choice][F.ALIKE[1]] for head in census]
        assert one[0] < F.MANY and one[2] < F.MANY, f"{choice}: heads with one job are monosemantic"
        assert one[3] > F.MANY, f"{choice}: two sets that share no token are two roles"
        relations = np.array([head[key]["relations"] for head in census])
        assert relations[0].argmax() == F.RELATIONS.index("a token after a copy") and relations[2, 0] > 0.9
        assert "read a token after a copy" in F.in_words(census[0][key], lambda ids: str(ids))
    assert sum(census[1]["top"]["families"].values()) == 25 and len(census[1]["features"]) == 50


def test_features_of_the_census_are_drawn_by_what_the_head_gathers(wired):
    """A feature that a head gathers nothing for is never drawn, and those drawn have most of what it does."""
    model, sae, tokens, classes, kept, reads = wired
    family = torch.zeros(sae.d_sae, dtype=torch.int64)
    census = F.head_census(model, sae, 1, kept, reads, tokens, classes, family)
    for one in census:
        mass = np.zeros(sae.d_sae)
        for place in range(len(kept.weight)):
            value = max(float(reads.head_value[place, one["head"]]), 0.0)
            mass[kept.sample.feature[place]] += float(kept.weight[place] / kept.sample.f[place]) * value
        drawn = one["drawn"]["features"]
        assert len(set(drawn)) == F.N_DRAWN and (mass[drawn] > 0).all()
        assert mass[drawn].sum() > 2 * np.sort(mass)[::-1][F.N_DRAWN:].sum() / len(mass) * F.N_DRAWN


def test_a_census_of_an_sae_that_is_all_but_dead_is_empty(wired):
    model, sae, tokens, classes, kept, reads = wired
    rare = kept._replace(n=kept.n.clamp_max(1))
    family = torch.zeros(sae.d_sae, dtype=torch.int64)
    census = F.head_census(model, sae, 1, rare, reads, tokens, classes, family)
    assert all(one["features"] == one["drawn"]["features"] == [] for one in census)
    assert all(count is None for one in census for by in one["roles"].values() for count in by.values())
    json.dumps(census, allow_nan=False)


def test_similarity_and_roles_by_hand():
    relations = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0.6, 0], [0, 0, 0.6, 0], [0, 0, 0, 0]])
    e = torch.eye(3)
    p = F.Profiles(relations, e[[0, 1, 0, 0, 0]], e[[0, 1, 0, 1, 0]], e[[0, 1, 0, 0, 0]])
    alike = F.similarity(p)
    assert alike[0, 1] == 1.0, "a relation is the same whatever the tokens are"
    assert alike[2, 3] == pytest.approx(0.6 + 0.4 * 2 / 3) and alike[0, 2] == 0.0
    assert alike[2, 4] == pytest.approx(0.4), "of what they share, all is alike"
    assert torch.equal(alike, alike.T)
    assert sorted(map(sorted, F.roles(alike, 0.5))) == [[0, 1], [2, 3], [4]]
    assert F.number_of_roles([[0, 1], [2, 3], [4]]) == 5
    assert F.number_of_roles([[0], [1], [2]]) == math.inf
    assert F.in_number(math.inf, 3) == "> 3" and F.in_number(None, 3) == "n/a"


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_number_of_roles_does_not_grow_with_the_number_of_features(k):
    g = torch.Generator().manual_seed(0)
    for n in (10, 50):
        pairs = []
        for _ in range(400):
            kind = torch.randint(k, (n,), generator=g)
            pairs.append(1 / F.number_of_roles([(kind == i).nonzero()[:, 0].tolist() for i in range(k)]))
        assert 1 / np.mean(pairs) == pytest.approx(k, rel=0.05)


def test_the_interval_of_a_share():
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(0, 0) is None


def test_gemma_goes_through_all_of_it(tmp_path):
    """Rotary positions, shared keys and values, norms behind the layers, a window: sums still hold."""
    random_gemma(tmp_path, **GEMMA_SHAPES["2"])
    model = models.load(tmp_path)
    g = torch.Generator().manual_seed(0)
    saes = {layer: S.SAE(64, 90, generator=g).requires_grad_(False) for layer in (1, 2)}
    rows = torch.cat([torch.full((40, 1), 2), torch.randint(3, 120, (40, 35), generator=g)], 1)
    tokens, kept = F.collect(model, saes, [rows], 40, n_places=30)
    looked, context = F.look_again(model, saes, tokens, kept), F.context_shares(model, saes, tokens)
    for layer, sae in saes.items():
        top, shown = kept[layer].top, looked[layer][1]
        pre = shown.total.sum(1) + A.feature_bias(sae)[top.feature]
        torch.testing.assert_close(pre, top.f, atol=1e-4, rtol=1e-4)
        families = F.Families(*F.induction_shares(kept[layer], looked[layer][0], tokens, rows),
                              context[layer])
        family = F.family_of(families, kept[layer].n)
        census = F.head_census(model, sae, layer, kept[layer], looked[layer][0], tokens, rows, family)
        assert len(census) == 4 and all(one["roles"]["top 10"][F.ALIKE[1]] >= 1 for one in census)


# ---- the program ----


def program(*arguments):
    return subprocess.run([sys.executable, ROOT / "features.py", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = program("--saes", "data/tiny", "--layers", "1,3", "--n-tokens", 20_000, "--sample", 4,
                   "--out", out)
    assert done.returncode == 0, done.stderr
    return done.stdout, out / "tiny" / "features"


def page_data(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def chunk(path):
    layer, number, content = re.fullmatch(r"receive\((\d+),(\d+),(.*)\);\n", path.read_text()).groups()
    return json.loads(content)


def test_the_program_writes_tables_json_figures_and_pages(written):
    printed, folder = written
    for words in ("features by family", "long-range", "roles of the features", "polysemantic heads",
                  "4 of", "to fill in by eye"):
        assert words in printed, words
    for name in ("families.json", "families.png", "census.json", "census.png", "index.html", "sample.csv",
                 "config.json", "L1/features.json", "L3/features.json"):
        assert (folder / name).stat().st_size > 0
    assert len((folder / "sample.csv").read_text().splitlines()) == 1 + 2 * 4
    census = json.loads((folder / "census.json").read_text())
    assert [one["name"] for one in census["heads"]] == [f"{l}.{h}" for l in (1, 3) for h in range(4)]


def test_the_page_lists_every_live_feature_and_finds_its_file(written):
    _, folder = written
    found = page_data((folder / "index.html").read_text())
    for layer in (1, 3):
        features = json.loads((folder / f"L{layer}" / "features.json").read_text())["features"]
        listed = found["features"][str(layer)]
        assert listed["feature"] == [r["feature"] for r in features] and len(features) > 100
        assert all(len(column) == len(features) for column in listed.values())
        by_chunk = {path.stem: chunk(path) for path in (folder / f"L{layer}").glob("*.js")}
        for r in features:
            shown = by_chunk[str(r["feature"] // pages.CHUNK)][str(r["feature"])]
            assert shown["family"] == r["family"] and sum(shown["counts"]) == r["n"]
            copies = sum(1 + e[8] for e in shown["top"])
            assert copies == min(r["n"], keep.N_TOP)
            assert shown["top"][0][2] == pytest.approx(r["largest"], rel=1e-3)
            for row, q, f, first, ids, shades, sources, total, _ in shown["top"]:
                assert len(ids) == len(shades) and first <= q < first + len(ids)
                assert abs(shades[q - first] - 100 * f / r["largest"]) <= 1


def test_a_token_is_text_whatever_it_holds(tmp_path):
    path = tmp_path / "page.html"
    pages.fill("dashboard.html", {"vocab": ["</script><script>alert(1)</script>", "<b>", "\u2028"]}, path)
    page = path.read_text(encoding="utf8")
    assert page.count("<script") == 2 and page.count("</script>") == 2, "a token was not escaped"
    assert page_data(page)["vocab"][0] == "</script><script>alert(1)</script>"
    assert "innerHTML" not in page and not re.search(r"(src|href)\s*[=:]\s*[\"']?(https?:)?//", page)


@pytest.mark.parametrize("flags, words", [
    (["--n-tokens", "100"], "--n-tokens must be"), (["--n-places", "2"], "--n-places must be"),
    (["--layers", "9"], "layer 9"), (["--saes", "nowhere"], "--saes nowhere"),
    (["--sample", "-1"], "--sample"),
    (["--model", "nobody"], "--model nobody"), (["--corpus", "nowhere.txt"], "--corpus nowhere.txt"),
    (["--out", "/dev/null/x"], "choose another --out"),
], ids=str)
def test_mistakes_get_one_sentence(tmp_path, flags, words):
    done = program(*([] if "--out" in flags else ["--out", tmp_path]), *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
