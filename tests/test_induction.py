"""induction.py: literal sequences with literal answers, and hand-wired transformers whose heads
need one, two and three matching tokens."""

import copy
import json

import numpy as np
import pytest
import torch

import induction as I
import model as models
from direct import direct_logits
from conftest import program


# ---- which tokens match ----


def test_prefix_lengths_by_hand():
    #                        0  1  2  3  4  5  6  7  8    (class -1 is BOS; 5 6 7 comes twice, then
    # 5 7)
    classes = torch.tensor([[-1, 5, 6, 7, 9, 5, 6, 7, 5]])
    L = I.prefix_lengths(classes)[0]
    assert L[5, 2] == 1 and L[6, 3] == 2 and L[7, 4] == 3, "prefixes of one, two and three tokens"
    assert L[8, 2] == 1 and L[8, 6] == 1, "5 stood at 1 and at 5"
    assert L.sum() == 1 + 2 + 3 + 1 + 1, "nothing else matches"


def test_a_prefix_does_not_reach_across_bos_and_bos_matches_nothing():
    classes = torch.tensor([[-1, 4, 8, -1, 4, 8, -1]])
    L = I.prefix_lengths(classes)[0]
    assert L[4, 2] == 1 and L[5, 3] == 2 and L[6].sum() == 0


def test_prefix_lengths_agree_with_a_loop():
    classes = torch.randint(-1, 3, (4, 25), generator=torch.Generator().manual_seed(0))
    L = I.prefix_lengths(classes)
    for b in range(4):
        for q in range(25):
            for k in range(25):
                n = 0
                while (k <= q and k - 1 - n >= 0 and classes[b, q - n] == classes[b, k - 1 - n]
                       and classes[b, q - n] >= 0):
                    n += 1
                assert L[b, q, k] == n, (b, q, k)


# ---- a hand-wired transformer ----

V, T, GAIN = 48, 40, 2.0        # tokens, positions, what an induction head writes for what it sees
BOS = V - 1


def wired(need=(1, 2, 3), sharpness=30.0, margin=(0.5, 0.1, 0.5)):
    """Layer 0: heads that look 1, 2 and 3 tokens back and keep what they see beside the token.
    Layer 1: heads that look for a key before which need[h] tokens match, and at BOS if there is
    none; they write GAIN times the token there. LayerNorm is kept from doing anything by two large
    entries of opposite sign."""
    H, d_head = 3, 3 * V + 1
    d = H * d_head
    made = models.GPT2(models.GPT2Config(2, H, d, 4, V, T,
                                         eps=1e-12)).double().requires_grad_(False)
    token, back = torch.arange(V), [torch.arange(V) + V * (i + 1) for i in range(3)]
    place = torch.arange(T) + 4 * V
    dump, plus, minus = 4 * V + T, 4 * V + T + 1, 4 * V + T + 2
    C = 1000.0
    for parameter in made.parameters():
        parameter.zero_()
    made.wte.weight[token, token] = 1.0
    made.wte.weight[:, dump] = -1.0                                    # every vector has mean 0
    made.wpe.weight[torch.arange(T), place] = 1.0
    made.wpe.weight[:, dump] = -1.0
    made.wpe.weight[:, plus], made.wpe.weight[:, minus] = C, -C
    for norm in (*(block.ln_1 for block in made.h), *(block.ln_2 for block in made.h), made.ln_f):
        norm.weight.fill_((2 * C * C / d) ** 0.5)
    for layer, block in enumerate(made.h):
        W, W_O = block.attn.c_attn.weight, block.attn.c_proj.weight
        W_Q, W_K, W_V = W[:, :d], W[:, d:2 * d], W[:, 2 * d:]
        for h in range(H):
            head = torch.arange(d_head) + h * d_head
            beta = sharpness * d_head**0.5
            W_V[token, head[:V]] = 1.0
            if layer == 0:
                n = torch.arange(T - h - 1)
                W_Q[place[n + h + 1], head[n]] = beta
                W_K[place[n], head[n]] = 1.0
                W_O[head[:V], back[h]] = 1.0
                W_O[head[:V], dump] = -1.0
            else:
                for i, (at_query, at_key) in enumerate(zip((token, back[0], back[1]), back)):
                    if i < need[h]:
                        W_Q[at_query, head[i * V:(i + 1) * V]] = beta
                        W_K[at_key, head[i * V:(i + 1) * V]] = 1.0
                W_Q[plus, head[-1]] = beta / C
                W_K[token[BOS], head[-1]] = need[h] - margin[h]
                W_O[head[:V], token] = GAIN
                W_O[head[:V], dump] = -GAIN
    return made


TABLE = torch.tensor([*range(V - 1), -1])       # every token is its own class


@pytest.fixture(scope="module")
def model():
    return wired()


def test_curves_of_heads_that_need_one_two_and_three_tokens(model):
    curves = I.prefix_curves(model, BOS, TABLE, n=24)
    attention = curves.attention.mean(0)[:, 1]                          # layer 1: (lengths,H)
    expected = np.array([[p >= need for need in (1, 2, 3)] for p in I.LENGTHS]).astype(float)
    # the second head's margin is small
    np.testing.assert_allclose(attention, expected, atol=0.06)
    np.testing.assert_allclose(attention[:, [0, 2]], expected[:, [0, 2]], atol=1e-3)
    assert I.pick_heads(curves.attention) == ((1, 0), (1, 2))
    # attending, a head writes GAIN to the token's logit, less the mean over V tokens; else it
    # writes BOS's
    logit = curves.logit.mean(0)[:, 1][:, [0, 2]]
    np.testing.assert_allclose(logit, np.where(expected[:, [0, 2]], GAIN * (1 - 1 / V), -GAIN / V),
                               atol=1e-2)


def test_curves_equal_whole_runs_of_every_row(pair):
    """Only the last tokens of each row are run; every row as a whole gives the same."""
    ours, _ = pair
    model = copy.deepcopy(ours).double()
    bos, n = model.config.d_vocab - 1, 10
    table = torch.arange(model.config.d_vocab)
    table[bos] = -1
    if model.config.d_vocab < min(128, model.config.n_ctx) + 1:
        pytest.skip("a row takes as many different tokens as it is long")
    curves = I.prefix_curves(model, bos, table, n=n, seed=4)
    generator = torch.Generator().manual_seed(4)
    base = I.random_rows(model, bos, table, n, generator)
    key, query = I.draw_key_and_query(base, generator)
    order = query.argsort()
    for i, at in enumerate(order[::3].tolist()):
        k, q = int(key[at]), int(query[at])
        for length in (0, 1, 4, 9):
            tokens = base[at].clone()
            for back in range(length):
                tokens[q - back] = tokens[k - 1 - back]
            logits, cache = model(tokens[None, :q + 1], keep=range(model.config.n_layers))
            pattern = torch.stack([kept.pattern[0, :, q, k] for kept in cache.values()])
            np.testing.assert_allclose(curves.attention[3 * i, length], pattern, atol=1e-9)
            matrices = [model.head_matrices(layer) for layer in cache]
            direct = direct_logits(model, matrices, cache.items(), torch.tensor([q]),
                                   model.logit_directions(tokens[None, k]))
            np.testing.assert_allclose(curves.logit[3 * i, length], direct[0], atol=1e-9)


def test_sequences_are_paired_and_differ_in_the_prefix_only():
    base = torch.arange(30)[None].repeat(2, 1)
    tokens, e1, e2 = I.grow_prefix(base, torch.tensor([10, 12]), torch.tensor([20, 25]))
    for row in range(2):
        for p in I.LENGTHS:
            one, k, q = tokens[row * 10 + p], [10, 12][row], [20, 25][row]
            assert (e1[row * 10 + p], e2[row * 10 + p]) == (k, q)
            assert one[q - p + 1:q + 1].tolist() == list(range(k - p, k))
            assert one[:q - p + 1].tolist() == list(range(q - p + 1))
            assert one[q + 1:].tolist() == list(range(q + 1, 30))


def text_with_prefixes(n=60):
    """Rows of different tokens in which a prefix of 0 to 9 tokens comes twice."""
    base = I.random_rows(wired(), BOS, TABLE, n, torch.Generator().manual_seed(1))
    return I.grow_prefix(base, torch.full((n,), 14), torch.full((n,), 30))[0]


def test_cutting_a_prefix_hurts_the_heads_that_need_it_and_the_controls_do_not(model):
    tokens = text_with_prefixes()
    examples = I.find_examples(TABLE[tokens])
    assert set(examples.length.tolist()) == set(range(1, 10))
    r = I.intervene(model, tokens, TABLE, examples, [(1, 0), (1, 1), (1, 2)], n=300)
    def close(condition, head, before, after):
        assert r[condition][head]["before"] == pytest.approx(before, abs=0.06), (condition, head)
        assert r[condition][head]["after"] == pytest.approx(after, abs=0.06), (condition, head)

    drawn = (examples.length[examples.length >= 2] >= 3).double().mean()
    close("corrupt", "1.0", 1, 1)
    close("corrupt", "1.1", 1, 0)
    close("corrupt", "1.2", float(drawn), 0)
    close("control, other token", "1.1", 1, 1)
    assert r["control, other token"]["1.2"]["change"] == pytest.approx(0, abs=1e-3)
    close("control, prefix 1", "1.0", 1, 1)
    close("control, prefix 1", "1.2", 0, 0)


def test_the_examples_of_a_head_are_those_it_attends_to(model):
    tokens = text_with_prefixes(20)
    needs = {(1, 0): 1, (1, 1): 2, (1, 2): 3}
    for head, found in I.find_attended(model, tokens, TABLE[tokens], list(needs)).items():
        assert found.length.min() == needs[head] and found.length.max() == 9


def test_examples_have_one_key_room_before_it_and_copies_that_do_not_overlap():
    # 4 1 | 2: q = 6, k = 3 has L = 2
    classes = torch.tensor([[-1, 1, 2, 3, 4, 1, 2, 9, 4, 8], [-1, 7, 7, 7, 7, 7, 7, 7, 7, 7],
                            [-1, 1, 2, 5, 3, 4, 6, 5, 5, 8]])  # q = 8 looks at 4, not at itself
    found = I.find_examples(classes)
    places = {(b, q, k): L for b, q, k, L in zip(*(column.tolist() for column in found))}
    # q = 5 has k = 2, too early; copies that overlap and queries with many keys do not count
    assert places == {(0, 6, 3): 2, (0, 8, 5): 1, (2, 7, 4): 1, (2, 8, 4): 1}


def test_no_key_is_bos_also_between_documents():
    classes = torch.randint(-1, 4, (6, 20), generator=torch.Generator().manual_seed(0))
    classes[:, 0] = -1
    targets = I.score_targets(classes, 1)
    _, possible = I.possible_examples(classes)
    n_after_a_copy = 0
    for b, row in enumerate(classes.tolist()):
        for q in range(20):
            for k in range(q):
                is_copied = k > 0 and row[k - 1] == row[q] >= 0
                n_after_a_copy += is_copied and row[k] < 0
                assert targets["induction"][b, q, k] == (is_copied and row[k] >= 0)
                assert targets["duplicate"][b, q, k] == (row[k] == row[q] >= 0)
                assert targets["previous"][b, q, k] == (k == q - 1 and row[k] >= 0)
                assert not possible[b, q, k] or (is_copied and row[k] >= 0 and row[k - 2] >= 0)
    assert n_after_a_copy > 20, "BOS stands after a copy of the query's token"


def test_a_replaced_token_matches_nothing_in_its_row():
    tokens = text_with_prefixes(5)
    examples = I.find_examples(TABLE[tokens])
    rows = I.with_token_replaced(tokens, TABLE, examples, -2, torch.Generator().manual_seed(0))
    at = torch.arange(len(rows))
    assert ((rows != tokens[examples.row]).sum(1) == 1).all()
    new = rows[at, examples.k - 2]
    assert (new != BOS).all() and not (tokens[examples.row] == new[:, None]).any()
    left = I.prefix_lengths(TABLE[rows])[at, examples.q, examples.k]
    assert (left == 1).all(), "one token of the prefix is left"


def test_head_scores_on_repeated_tokens(model):
    rows = I.random_rows(model, BOS, TABLE, 8, torch.Generator().manual_seed(0), repeat=True)
    scores, n_queries = I.head_scores(model, rows, TABLE[rows])
    assert n_queries["induction"] == 8 * 19
    # of the 19 repeats the first has one matching token and the second two
    np.testing.assert_allclose(scores["induction"][1], [1, 18 / 19, 17 / 19], atol=0.06)
    assert scores["previous"][0].argmax() == 0 and scores["previous"][0][0] > 0.97
    assert scores["duplicate"].max() < 0.01 and scores["induction"][0].max() < 0.1


# ---- the program ----


def test_the_program_writes_tables_json_and_figures(tmp_path):
    done = program("induction", "--n-sequences", "6", "--n-examples", "10", "--n-rows", "80",
                   "--feature", "3.1187", "--saes", "data/tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny" / "induction"
    for name in ("heads", "prefix", "intervention"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    prefix = json.loads((folder / "prefix.json").read_text())
    assert np.array(prefix["attention"]).shape == (10, 4, 4) and prefix["n_sequences"] == 6
    drawn = json.loads((folder / "features.json").read_text())["drawn"]
    assert (drawn["layer"], drawn["feature"]) == (3, 1187) and (folder / "feature.png").is_file()
    assert "most after one" in done.stdout and "grows most" in done.stdout


@pytest.mark.parametrize("flags, words", [
    (("--feature", "two"), "--feature is written layer.feature"),
    (("--feature", "9.1"), "layer 9 has no SAE"),
    (("--heads", "3.2,9.1"), "this model has no head '9.1'"),
    (("--feature", "2.99999"), "features 0 to"),
    (("--n-sequences", "1"), "--n-sequences must be 2 or more"),
    (("--corpus", "no-such-file.txt"), "no-such-file.txt"),
    (("--n-rows", "8"), "8 held-out rows, and 16 are needed"),
    (("--model", "no-such-model"), "no-such-model"),
])
def test_mistakes_get_one_sentence(tmp_path, flags, words):
    done = program("induction", *flags, "--saes", "data/tiny", "--out", str(tmp_path))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
