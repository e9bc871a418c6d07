"""ioi.py: where everything stands in a prompt, that patches do what they say, and that the parts
add up."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import ioi
import sae as S
from conftest import program, random_gpt2
from data import prompts as P
from data.errors import UserError
from data.stats import mean_with_ci
from data.stories import HELD_OUT_NAMES, is_held_out
from data.weights import TINY

N = 40


@pytest.fixture(scope="module")
def tokenizer():
    return data.load_tokenizer("tiny")


@pytest.fixture(scope="module")
def words(tokenizer):
    return P.draw_prompts(N, HELD_OUT_NAMES, tokenizer)


@pytest.fixture(scope="module")
def run(tiny, tokenizer, words):
    """(prompts, base) of the plain prompts, and the same of those with the other name at S2."""
    prompts, source = P.tokenise(words, tokenizer), P.tokenise(P.other_giver(words),
                                                                   tokenizer)
    return prompts, ioi.run_prompts(tiny, prompts), source, ioi.run_prompts(tiny, source)


@pytest.fixture(scope="module")
def saes(tiny):
    return S.load_saes(TINY, tiny)


# ---- prompts ----


def test_every_named_position_holds_what_its_name_says(words, tokenizer):
    for change in (list, P.flipped, P.other_giver, P.with_filler):
        changed = change(words)
        prompts = P.tokenise(changed, tokenizer)
        token = lambda name, i, back=0: tokenizer.decode(
            [prompts.tokens[i, prompts.pos[name][i] - back]])
        for i, one in enumerate(changed):
            assert prompts.tokens[i, 0] == tokenizer.bos
            assert token("S2", i) == token("S1", i) == " " + one.s
            assert token("IO", i) == " " + one.io
            assert token("connector", i) == one.connector and token("end", i) == " to"
            assert token("S1+1", i, back=1) == " " + one.s
            first, second = (one.io, one.s) if one.order == "ABBA" else (one.s, one.io)
            text = tokenizer.decode(prompts.tokens[i, 1:prompts.pos["end"][i] + 1])
            assert f" {first} and {second} " in text and text.endswith(f" {one.object} to")
            # the prompt as pieces is the prompt as a text
            assert tokenizer.encode(text) == prompts.tokens[i, 1:prompts.pos["end"][i] + 1].tolist()


def test_prompts_cover_every_template_in_both_orders_and_names_differ(words):
    every = {(t, order) for t in range(len(P.TEMPLATES)) for order in P.ORDERS}
    assert {(one.template, one.order) for one in words} == every
    assert all(one.io != one.s for one in words)


def test_prompts_depend_on_the_seed_alone(tokenizer, words):
    assert P.draw_prompts(N, HELD_OUT_NAMES, tokenizer) == words
    assert P.draw_prompts(N, HELD_OUT_NAMES[::-1], tokenizer) == words
    assert P.draw_prompts(N, HELD_OUT_NAMES, tokenizer, seed=1) != words


def test_tiny_never_saw_these_forms():
    for _, scene, giving in P.TEMPLATES:
        between, verb = scene[-1] + " ", giving.split(" a ")[0].split(" the ")[0].strip()
        assert is_held_out(between, verb), (between, verb)


def test_flips_change_what_they_say_and_nothing_else(words, tokenizer):
    prompts, other = P.tokenise(words, tokenizer), P.tokenise(P.other_giver(words), tokenizer)
    differ = prompts.tokens != other.tokens
    assert (differ.sum(1) == 1).all() and differ[torch.arange(N), prompts.pos["S2"]].all()
    assert torch.equal(other.io, prompts.s) and torch.equal(other.s, prompts.io)
    for one, flip in zip(words, P.flipped(words)):
        assert (flip.io, flip.s) == (one.io, one.s) and flip.order != one.order
    for one, new in zip(words, P.with_other_names(words, HELD_OUT_NAMES)):
        assert len({one.io, one.s, new.io, new.s}) == 4 and new.order == one.order


def test_side_and_position_are_separated(words, tokenizer):
    fillers = [f for f in P.FILLERS if len(tokenizer.encode(" " + P.longer(f)))
               == len(tokenizer.encode(" " + f)) + 2]
    assert fillers, "tiny's vocabulary has a filler that grows by two tokens"
    fillers = (fillers * N)[:N]

    def at(changed, position):
        pos = P.tokenise(P.placed(changed, fillers, position), tokenizer).pos
        return pos["S1"], pos["S2"] - pos["S1"]

    base = at(words, "same")
    flip = at(P.flipped(words), "same")
    assert torch.equal(base[0], flip[0]) and torch.equal(base[1], flip[1]), \
        "side changes, position does not"
    moved, both = at(words, "2 tokens"), at(P.flipped(words), "2 tokens")
    assert ((moved[0] - base[0]).abs() == 2).all() and ((moved[1] - base[1]).abs() == 2).all()
    assert torch.equal((both[0] - base[0]).abs(), (moved[0] - base[0]).abs())
    far = at(words, "a sentence")
    assert (far[0] > base[0] + 3).all() and (far[1] < base[1] - 3).all()
    assert torch.equal(far[0] + far[1], base[0] + base[1]), "S2 stays"


def test_S2_stays_where_a_first_word_is_more_tokens_than_a_later_one(words, tokenizer):
    """As "Afterwards" is to GPT-2: two tokens at the start of a text, one after a space."""
    class TwoAtTheStart:
        bos, single = tokenizer.bos, tokenizer.single

        def encode(self, text):
            ids = tokenizer.encode(text)
            is_opening = text in [opening for opening, _, _ in P.TEMPLATES]
            return ids[:1] + ids if is_opening else ids

    S2 = [P.tokenise(P.placed(changed, P.FILLERS * 7, position), TwoAtTheStart()).pos["S2"]
          for changed in (words, P.flipped(words)) for position in P.POSITIONS]
    assert all(torch.equal(one, S2[0]) for one in S2), "in all orders and at all positions"


def test_names_that_do_not_serve_are_named(tokenizer, capsys):
    kept = P.names_of_one_token([*HELD_OUT_NAMES, "Bartholomew"], tokenizer)
    assert kept == list(HELD_OUT_NAMES), "a name of several tokens is left out"
    assert "left out: Bartholomew\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="only 3 of these names are one token"):
        P.names_of_one_token(["Mary", "John", "Paul", "Bartholomew"], tokenizer)
    with pytest.raises(UserError, match="four different names"):
        P.names_of_one_token(["Mary", "John", "Paul", "Tom", ""], tokenizer)
    with pytest.raises(UserError, match="four different names"):
        P.names_of_one_token(["Mary", "John", "Mary"], tokenizer)


# ---- patches ----


def test_patching_nothing_gives_the_base_run(tiny, run):
    """But for rounding: only what follows the place is computed anew."""
    prompts, base, *_ = run
    S2 = prompts.pos["S2"]
    own = {layer: ioi.patch_at(ioi.z_at(base.z[layer], prompts, "S2"), S2) for layer in range(4)}
    for place in ("BOS", "S2", "end"):
        ld = ioi.logit_diff_with(tiny, base, prompts, {}, place)
        torch.testing.assert_close(ld, base.ld, rtol=0, atol=3e-5)
    ld = ioi.logit_diff_with(tiny, base, prompts, own, "S2")
    torch.testing.assert_close(ld, base.ld, rtol=0, atol=3e-5)


def test_patching_every_layer_at_the_end_gives_the_sources_logits(tiny, run):
    prompts, base, source, source_run = run
    patch = {layer: ioi.patch_at(ioi.z_at(source_run.z[layer], source, "end"), prompts.pos["end"])
             for layer in range(4)}
    # the same last token at the same place: all that differs at the end came through z_cat
    torch.testing.assert_close(ioi.logit_diff_with(tiny, base, prompts, patch, "end"),
                               -source_run.ld, rtol=1e-4, atol=1e-4)


def test_an_edit_of_one_row_leaves_the_others_bit_equal(tiny, run):
    prompts, base, source, source_run = run
    values = ioi.z_at(base.z[1], prompts, "S2").clone()
    own = {1: ioi.patch_at(values, prompts.pos["S2"])}
    before = ioi.logit_diff_with(tiny, base, prompts, own, "S2")
    values[3] = 0
    other = {1: ioi.patch_at(values, prompts.pos["S2"])}
    after = ioi.logit_diff_with(tiny, base, prompts, other, "S2")
    others = torch.arange(N) != 3
    assert torch.equal(after[others], before[others]) and after[3] != before[3]


def test_effects_of_heads_by_brute_force(tiny, run):
    prompts, base, source, source_run = run
    c = ioi.compute_circuit(tiny, base, prompts, source_run, source)
    logits, cache = tiny(prompts.tokens, keep=range(4))
    _, theirs = tiny(source.tokens, keep=range(4))
    rows, end = torch.arange(N), prompts.pos["end"]
    d = tiny.config.d_head

    def ld(edit_z):
        at_end = tiny(prompts.tokens, edit_z)[0][rows, end]
        return (at_end[rows, prompts.io] - at_end[rows, prompts.s]).numpy()

    for layer, h in ((0, 3), (1, 2), (3, 0)):
        def patch(z, place):
            z = z.clone()
            for i in range(N):
                at = prompts.pos[place][i]
                z[i, at, h * d:(h + 1) * d] = theirs[layer].z_cat[i, source.pos[place][i],
                                                                  h * d:(h + 1) * d]
            return z

        def freeze(later):
            def edit(z):
                z = z.clone()
                z[rows, end] = cache[later].z_cat[rows, end]
                return z
            return edit

        clean = ld({})
        for place, found in (("S2", c.at_S2), ("end", c.at_end)):
            patched = ld({layer: lambda z: patch(z, place)})
            np.testing.assert_allclose(found[:, layer, h], patched - clean, atol=2e-4)
        frozen = {later: freeze(later) for later in range(layer + 1, 4)}
        np.testing.assert_allclose(c.direct[:, layer, h],
                                   ld({layer: lambda z: patch(z, "end")} | frozen) - clean,
                                   atol=2e-4)
    # heads, embeddings, MLPs and biases together, along the direction, are the logit difference
    final = cache[3].resid_pre + cache[3].attn_out + cache[3].mlp_out
    direction = tiny.logit_directions(prompts.io) - tiny.logit_directions(prompts.s)
    direction = direction / tiny.final_scale(final[rows, end])
    others = tiny.embed(prompts.tokens)[rows, end]
    for layer, kept in cache.items():
        others = others + kept.mlp_out[rows, end] + tiny.head_matrices(layer).b_O
    names = tiny.wte.weight[prompts.io] - tiny.wte.weight[prompts.s]
    rest = (others * direction).sum(-1) + names @ tiny.ln_f.bias
    np.testing.assert_allclose(c.dla.sum((1, 2)) + rest.numpy(), clean, atol=2e-3)
    pattern = cache[2].pattern[rows, :, end, prompts.pos["IO"]]
    np.testing.assert_allclose(c.attention["end -> IO"][:, 2], pattern, atol=1e-6)
    i, last = 3, int(end[3])
    before = np.mean([float(cache[1].pattern[i, 2, q, q - 1]) for q in range(2, last + 1)])
    assert c.attention[ioi.PREVIOUS_TOKEN][i, 1, 2] == pytest.approx(before, abs=1e-6)


def test_roles_follow_the_rule():
    none = np.zeros((2, 3))
    attention = {f"{q} -> {k}": none.copy()
                 for q, k in ioi.ATTENTION_PAIRS} | {ioi.PREVIOUS_TOKEN: none.copy()}
    direct, at_end, at_S2 = none.copy(), none.copy(), none.copy()
    attention["end -> IO"][1] = 0.5
    direct[1] = (-0.3, 0.2, -0.01)          # moves, moves the other way, too little
    at_end[1] = direct[1]
    attention["end -> S2"][0, :2] = 0.4
    at_end[0] = (-0.2, -0.2, -0.2)
    # through later heads, mostly directly, does not look at S2
    direct[0] = (-0.1, -0.18, 0)
    attention["S2 -> S1"][0, 0] = attention["S2 -> S1+1"][0, 1] = attention["S1+1 -> S1"][0,
                                                                                          2] = 0.3
    attention[ioi.PREVIOUS_TOKEN][0, 2] = 0.4
    attention["S1+1 -> S1"][0, 1] = 0.7     # but it does not look at the token before elsewhere
    at_S2[0, 0], at_S2[0, 1] = -0.06, 0.07
    assert ioi.find_roles(attention, direct, at_end, at_S2) == {
        "name mover": [(1, 0)], "negative name mover": [(1, 1)], "S-inhibition": [(0, 0)],
        "duplicate token": [(0, 0)], "induction": [(0, 1)], "previous token": [(0, 2)]}


# ---- features ----


def test_removing_a_feature_removes_its_decoder_row_at_its_own_place(tiny, run, saes):
    prompts, base, *_ = run
    found = ioi.ablate_features(tiny, saes[1], 1, prompts, base, "S2")
    z = ioi.z_at(base.z[1], prompts, "S2")
    f = saes[1].encode(z)
    assert len(found.row) == int((f > 0).sum()), "every active feature of every prompt, once"
    for n in (0, len(found.row) // 2, len(found.row) - 1):
        i, j = int(found.row[n]), int(found.feature[n])
        values = z.clone()
        values[i] -= f[i, j] * saes[1].W_dec[j]
        edit = {1: ioi.patch_at(values, prompts.pos["S2"])}
        ld = ioi.logit_diff_with(tiny, base, prompts, edit, "BOS")
        assert float(found.change[n]) == pytest.approx(float(ld[i] - base.ld[i]), abs=1e-4)


def test_removing_the_error_leaves_the_reconstruction(tiny, run, saes):
    prompts, base, *_ = run
    change = ioi.ablate_error(tiny, saes[0], 0, prompts, base, "end")
    def spliced_there(z):
        z = z.clone()
        for i in range(N):
            z[i, prompts.pos["end"][i]] = saes[0](z[i, prompts.pos["end"][i]])
        return z
    expected = ioi.logit_diff_with(tiny, base, prompts, {0: spliced_there}, "BOS") - base.ld
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)


def test_ranking_counts_prompts_without_the_feature_as_no_effect():
    words = [SimpleNamespace(order=order, template=0) for order in ("ABBA", "BABA", "ABBA", "BABA")]
    effects = {
        2: ioi.FeatureEffects(torch.tensor([0, 2, 1]), torch.tensor([7, 7, 5]), torch.ones(3),
                              torch.tensor([-1.0, -3.0, 0.5]))
    }
    first, second = ioi.rank_features(effects, words, 5)
    assert (first["feature"], first["effect"], first["ABBA"], first["BABA"]) == (7, -1.0, -2.0, 0.0)
    assert (second["feature"], second["effect"], second["n_active"]) == (5, 0.125, 1)


def test_what_a_feature_reads_sums_to_the_feature_and_so_do_its_writers(tiny, run, saes):
    prompts, base, *_ = run
    feature = int(saes[3].encode(ioi.z_at(base.z[3], prompts, "end")).sum(0).argmax())
    active = ioi.most_active_prompts(saes[3], 3, feature, prompts, base, "end")
    by_position = ioi.dfa_by_position(tiny, saes[3], prompts, active)
    by_writer = ioi.writers_by_position(tiny, saes, {}, prompts, active)
    for order in P.ORDERS:
        assert sum(by_position[order].values()) == pytest.approx(1, abs=1e-4), order
        sums = {}
        for (position, _), share in by_writer[order].items():
            sums[position] = sums.get(position, 0) + share
        assert sums == pytest.approx(by_position[order], abs=1e-3), \
            "DFA by position is the sum over writers"


def test_the_pairs_of_a_contrast_sum_to_the_score(tiny, run, saes):
    prompts, *_ = run
    score, pairs = ioi.why_io(tiny, saes, {}, 3, 0, prompts, n=3)
    assert sum(value for *_, value in pairs) == pytest.approx(score, abs=1e-3)
    _, cache = tiny(prompts.tokens[:3], keep=(3,))
    rows = torch.arange(3)
    log = cache[3].pattern[rows, 0, prompts.pos["end"][:3]].log()
    expected = (log[rows, prompts.pos["IO"][:3]] - log[rows, prompts.pos["S1"][:3]]).mean()
    assert score == pytest.approx(float(expected), abs=1e-3), \
        "a difference of scores is one of log attention"


# ---- the signal ----


def test_recovered_is_1_for_the_base_run_0_for_zero_and_none_without_a_difference():
    generator = torch.Generator().manual_seed(0)
    clean, zero = 3 + torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    assert ioi.recovered(clean, clean, zero) == (1.0, [1.0, 1.0])
    assert ioi.recovered(zero, clean, zero) == (0.0, [0.0, 0.0])
    value, (low, high) = ioi.recovered((clean + zero) / 2, clean, zero)
    assert value == pytest.approx(0.5) and low <= value <= high
    assert ioi.recovered(clean, zero, torch.randn(50, generator=generator)) == (None, None)


def test_nothing_is_recovered_by_order_where_zeros_do_no_damage_over_all():
    """Damage in one order and as much help in the other: by order there would be numbers."""
    prompts = [SimpleNamespace(order=order) for order in ("ABBA", "BABA") * 25]
    batch = P.PromptBatch(torch.zeros(50, 1), {}, None, None, prompts)
    clean = 3 + torch.randn(50, generator=torch.Generator().manual_seed(0))
    away = {name: clean + 1 for name in ("mean", "zero everywhere")}
    help_and_harm = torch.tensor([1.0, -1.0] * 25)
    found = ioi.recovered_over(away | {"zero": clean + help_and_harm}, clean, clean, batch)
    assert ioi.recovered(clean[1::2], clean[1::2], (clean + help_and_harm)[1::2])[0] == 1.0
    for way in ("recovered", "ABBA", "BABA"):
        assert found[way] is None and found[f"{way}_ci"] is None
    found = ioi.recovered_over(away | {"zero": clean - 1}, clean, clean, batch)
    assert found["recovered"] == found["ABBA"] == found["BABA"] == 1.0


def test_a_prompt_patched_from_itself_is_itself_and_baselines_do_what_they_say(tiny, run):
    prompts, base, *_ = run
    own = {layer: ioi.z_at(base.z[layer], prompts, "S2") for layer in (0, 1)}
    this = ioi.IOI(SimpleNamespace(model=tiny), list(HELD_OUT_NAMES), prompts, base)
    torch.testing.assert_close(this.patch_S2(own), base.ld, rtol=0, atol=3e-5)
    found = ioi.baselines(tiny, prompts, base, [1])
    rows, S2 = torch.arange(N), prompts.pos["S2"]

    def brute(edit):
        at_end = tiny(prompts.tokens, {1: edit})[0][rows, prompts.pos["end"]]
        return at_end[rows, prompts.io] - at_end[rows, prompts.s]

    def zero(z):
        z = z.clone()
        z[rows, S2] = 0
        return z

    torch.testing.assert_close(found["zero"], brute(zero), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["zero everywhere"], brute(torch.zeros_like), rtol=1e-4,
                               atol=1e-4)

    def mean(z):
        z, values = z.clone(), torch.stack([z[i, S2[i]] for i in range(N)]).mean(0)
        for i in range(N):
            z[i, S2[i]] = values
        return z

    torch.testing.assert_close(found["mean"], brute(mean), rtol=1e-4, atol=1e-4)


def test_the_effect_of_order_by_brute_force(tiny, tokenizer, run):
    """Whole runs of the base prompts, with z_cat at each prompt's S2 from that of other prompts."""
    prompts, base, *_ = run
    config = SimpleNamespace(seed=3)
    study = SimpleNamespace(model=tiny, tokenizer=tokenizer, device="cpu", config=config, saes={})
    this = ioi.IOI(study, list(HELD_OUT_NAMES), prompts, base)
    found = ioi.study_signal(this, [0, 2], " of")
    assert found["features"] == {}, "no layer has an SAE here"
    others = P.with_other_names(prompts.prompts, list(HELD_OUT_NAMES), 3)
    rows, end, S2 = torch.arange(N), prompts.pos["end"], prompts.pos["S2"]

    def patched(words):
        source = P.tokenise(words, tokenizer)
        _, cache = tiny(source.tokens, keep=(0, 2))

        def put(layer):
            def edit(z):
                z = z.clone()
                z[rows, S2] = cache[layer].z_cat[rows, source.pos["S2"]]
                return z
            return edit

        logits = tiny(prompts.tokens, {layer: put(layer) for layer in (0, 2)})[0][rows, end]
        return logits[rows, prompts.io] - logits[rows, prompts.s]

    same, flipped = patched(others), patched(P.flipped(others))
    with_or = patched([dataclasses.replace(one, connector=" or") for one in others])
    or_flipped = patched([dataclasses.replace(one, connector=" or") for one in P.flipped(others)])
    sources = found["sources"]
    for name, ld in ((ioi.OTHER_NAMES, same), (ioi.FLIPPED, flipped),
                     ("other names, 'or'", with_or)):
        assert sources[name]["patched"][0] == pytest.approx(float(ld.mean()), abs=1e-4)
        assert sources[name]["change"][0] == pytest.approx(float((ld - base.ld).mean()), abs=1e-4)
    effect, (low, high) = found["effect_of_order"]["other names"]
    assert effect == pytest.approx(float((same - flipped).mean()), abs=1e-4) and low <= effect <= high
    of_or = found["connectors"]["'or'"]
    own, _ = of_or["own"]
    assert own == pytest.approx(float((with_or - or_flipped).mean()), abs=1e-4)
    is_abba = torch.tensor([prompt.order == "ABBA" for prompt in prompts.prompts])
    for name, which in (("kept", is_abba | True), ("ABBA", is_abba), ("BABA", ~is_abba)):
        kept, _ = of_or[name]
        expected = float((with_or - flipped)[which].mean() / (same - flipped)[which].mean())
        _, (low, _) = mean_with_ci((same - flipped)[which].numpy())
        assert (kept is None) == (low <= 0), name
        assert kept is None or kept == pytest.approx(expected, rel=1e-2), name
    in_abba, _ = found["effect_of_order"]["other names, in ABBA"]
    assert in_abba == pytest.approx(float((same - flipped)[is_abba].mean()), abs=1e-4)


def test_heads_with_the_order_by_brute_force(tiny, tokenizer, run):
    """Whole runs, with z_cat of layer 1 at each prompt's S2, and one head's z at the end, put in by
    hand."""
    prompts, base, *_ = run
    study = SimpleNamespace(model=tiny, tokenizer=tokenizer, device="cpu",
                            config=SimpleNamespace(seed=3))
    this = ioi.IOI(study, list(HELD_OUT_NAMES), prompts, base)
    n_heads = tiny.config.n_heads
    heads = ioi.heads_with_order(this, [1], n_shown=4 * n_heads)
    assert len({found["head"] for found in heads}) == 4 * n_heads
    others = P.with_other_names(prompts.prompts, list(HELD_OUT_NAMES), 3)
    rows, end, S2 = torch.arange(N), prompts.pos["end"], prompts.pos["S2"]

    def at_S2_from(words):                                  # -> edit
        source = P.tokenise(words, tokenizer)
        values = tiny(source.tokens, keep=(1,))[1][1].z_cat[rows, source.pos["S2"]]

        def edit(z):
            z = z.clone()
            z[rows, S2] = values
            return z
        return edit

    def at_end(values, head):                               # -> edit
        def edit(z):
            z = z.unflatten(-1, (n_heads, -1)).clone()
            z[rows, end, head] = values.unflatten(-1, (n_heads, -1))[:, head]
            return z.flatten(-2)
        return edit

    def difference_with(edits):
        logits = tiny(prompts.tokens, edits)[0][rows, end]
        return logits[rows, prompts.io] - logits[rows, prompts.s]

    same, flipped = at_S2_from(others), at_S2_from(P.flipped(others))
    _, of_same = tiny(prompts.tokens, {1: same}, keep=range(4))
    _, of_flipped = tiny(prompts.tokens, {1: flipped}, keep=range(4))
    ld = difference_with({1: same})
    for found in heads:
        layer, head = map(int, found["head"].split("."))
        if layer < 2:                                       # at the end they know nothing of it
            assert abs(found["in_all"][0]) < 1e-5 and abs(found["direct"][0]) < 1e-5
            continue
        own = at_end(of_flipped[layer].z_cat[rows, end], head)
        edits = {1: same, layer: own}
        lost = float((ld - difference_with(edits)).mean())
        assert found["in_all"][0] == pytest.approx(lost, abs=1e-4), found["head"]
        for later in range(layer + 1, 4):
            kept = of_same[later].z_cat[rows, end]

            def freeze(z, kept=kept):
                z = z.clone()
                z[rows, end] = kept
                return z
            edits[later] = freeze
        lost = float((ld - difference_with(edits)).mean())
        assert found["direct"][0] == pytest.approx(lost, abs=1e-4), found["head"]


def test_the_order_in_features_by_brute_force(tiny, tokenizer, run, saes):
    """Whole runs, with z_cat of layer 2 at each prompt's S2 put together by hand."""
    prompts, base, *_ = run
    sae = saes[2]
    study = SimpleNamespace(model=tiny, tokenizer=tokenizer, device="cpu", saes={2: sae},
                            config=SimpleNamespace(seed=3))
    this = ioi.IOI(study, list(HELD_OUT_NAMES), prompts, base)
    found = ioi.study_signal(this, [0, 2], " of")["features"]
    assert list(found) == [2], "layer 0 has no SAE here"
    others = P.with_other_names(prompts.prompts, list(HELD_OUT_NAMES), 3)
    rows, end, S2 = torch.arange(N), prompts.pos["end"], prompts.pos["S2"]

    def z_of(words):
        source = P.tokenise(words, tokenizer)
        return tiny(source.tokens, keep=(2,))[1][2].z_cat[rows, source.pos["S2"]]

    def difference_with(values):
        def edit(z):
            z = z.clone()
            z[rows, S2] = values
            return z
        logits = tiny(prompts.tokens, {2: edit})[0][rows, end]
        return logits[rows, prompts.io] - logits[rows, prompts.s]

    same, flipped = z_of(others), z_of(P.flipped(others))
    f, f_flipped = sae.encode(same), sae.encode(flipped)
    ld = difference_with(same)

    def is_mean(effect, of_what, expected):
        mean, (low, high) = effect
        assert mean == pytest.approx(float(expected.mean()), abs=1e-4), of_what
        assert low <= mean <= high

    with_features = same + sae.decode(f_flipped) - sae.decode(f)
    is_mean(found[2]["parts"]["all"], "all", ld - difference_with(flipped))
    is_mean(found[2]["parts"]["all features"], "features", ld - difference_with(with_features))
    with_error = same + (flipped - sae(flipped)) - (same - sae(same))
    is_mean(found[2]["parts"]["SAE error"], "error", ld - difference_with(with_error))

    is_abba = torch.tensor([prompt.order == "ABBA" for prompt in prompts.prompts])
    largest = (f_flipped - f).abs().mean(0).topk(20).indices.tolist()
    effects = []
    for i in largest:
        changed = same.clone()
        for row in range(N):
            changed[row] += (f_flipped[row, i] - f[row, i]) * sae.W_dec[i]
        effects.append(ld - difference_with(changed))
    by_size = sorted(range(20), key=lambda n: -abs(float(effects[n].mean())))
    shown = found[2]["features"]
    assert found[2]["n_tried"] == 20
    for one, n in zip(shown, by_size[:5], strict=True):
        i, effect = largest[n], effects[n]
        assert one["feature"] == i
        is_mean(one["effect"], i, effect)
        assert one["ABBA"] == pytest.approx(float(effect[is_abba].mean()), abs=1e-4)
        assert one["BABA"] == pytest.approx(float(effect[~is_abba].mean()), abs=1e-4)
        in_abba = torch.cat([f[is_abba, i], f_flipped[~is_abba, i]]).mean()
        in_baba = torch.cat([f[~is_abba, i], f_flipped[is_abba, i]]).mean()
        assert one["f_in_ABBA"] == pytest.approx(float(in_abba), abs=1e-4)
        assert one["f_in_BABA"] == pytest.approx(float(in_baba), abs=1e-4)
        order, = one["reads"]
        assert order == ("ABBA" if in_abba > in_baba else "BABA"), "where it is more active"
        shares = one["reads"][order]
        assert not shares or sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_the_layers_patched_are_chosen_on_one_half_and_measured_on_the_other(
        tiny, tokenizer, run, monkeypatch):
    prompts, base, *_ = run
    config = SimpleNamespace(seed=3, signal_layers=())
    study = SimpleNamespace(model=tiny, tokenizer=tokenizer, device="cpu", config=config)
    this = ioi.IOI(study, list(HELD_OUT_NAMES), prompts, base)

    def patch_S2(self, z):
        """On the first half layers 1 and 3 matter, on the second 0 and 2, and more so."""
        layer, = z
        is_first = torch.arange(N) < N // 2
        matters = torch.where(is_first, float(layer in (1, 3)), 5 * float(layer in (0, 2)))
        return self.clean.ld + matters

    monkeypatch.setattr("ioi.IOI.patch_S2", patch_S2)
    found = ioi.study_circuit(this)
    assert found["signal_layers"] == [1, 3]
    assert found["signal_rows"].tolist() == list(range(N // 2, N))
    half = this.pick(found["signal_rows"])
    assert torch.equal(half.batch.tokens, prompts.tokens[N // 2:])
    assert torch.equal(half.clean.z[2], base.z[2][N // 2:]) and len(half.batch.prompts) == N - N // 2
    config.signal_layers = (2,)
    found = ioi.study_circuit(this)
    assert found["signal_layers"] == [2] and len(found["signal_rows"]) == N, "all are free for it"


def test_the_frequent_word_is_the_nearest_in_count():
    class Words:
        words, n_vocab = [" and", " or", " of", "of", " 7", " the"], 6
        decode = lambda self, ids: self.words[ids[0]]
        single = lambda self, text: self.words.index(text)

    rows = torch.tensor([[0] * 5 + [1] * 5 + [2] * 4 + [3] * 5 + [4] * 5 + [5] * 9])
    assert ioi.frequent_word(rows, Words(), (" and", " or")) == " of"


def test_all_saes_and_transcoders_together_equal_a_run_with_both_edits(tiny, run, saes):
    prompts, *_ = run
    g = torch.Generator().manual_seed(0)
    transcoders = {layer: S.Transcoder(256, 32, 256, g).requires_grad_(False) for layer in range(4)}
    edit_z = {layer: S.splice(sae) for layer, sae in saes.items()}
    edit_mlp = {layer: S.splice_mlp(one) for layer, one in transcoders.items()}
    found = ioi.spliced_difference(tiny, prompts, edit_z, edit_mlp)
    rows = torch.arange(N)
    at_end = tiny(prompts.tokens, edit_z, edit_mlp=edit_mlp)[0][rows, prompts.pos["end"]]
    torch.testing.assert_close(found, at_end[rows, prompts.io] - at_end[rows, prompts.s], rtol=1e-4,
                               atol=1e-4)
    score, pairs = ioi.why_io(tiny, saes, transcoders, 3, 0, prompts, n=2)
    assert sum(value for *_, value in pairs) == pytest.approx(score, abs=1e-3)
    assert any(name.startswith("MLP feature") for pair in pairs for name in pair[:2])


# ---- the program ----


def test_the_program_writes_tables_json_and_figures(tmp_path):
    done = program("ioi", "--n-prompts", "20", "--saes", "data/tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny" / "ioi"
    for name in ("heads", "circuit", "features", "signal", "side_and_position"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    signal = json.loads((folder / "signal.json").read_text())
    assert signal["sources"]["itself"]["recovered"] == pytest.approx(1, abs=1e-4)
    assert signal["sources"]["itself"]["change"][0] == pytest.approx(0, abs=1e-4)
    assert signal["n_prompts"] == 10 and "the first chose the layers" in done.stdout
    assert (folder / "qk.json").is_file() and (folder / "circuit.json").is_file()
    assert "does not do the task" not in done.stdout


def test_a_model_that_cannot_do_the_task_is_said_to_be_so(tmp_path):
    folder = tmp_path / "random"
    random_gpt2(folder, n_layer=2, n_head=2, n_embd=16, vocab_size=4096, n_positions=60)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TINY / name, folder / name)
    for layer in range(2):
        (folder / f"L{layer}").mkdir()
        S.SAE(16, 24).save(folder / f"L{layer}" / "sae.safetensors")
    done = program("ioi", "--model", str(folder), "--saes", str(folder), "--n-prompts", "20",
                   "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "does not do the task" in done.stdout and "nan" not in done.stdout
    assert "in logits, and no roles" in done.stdout and "no role  " not in done.stdout
    assert not list(tmp_path.glob("**/circuit.png")), "it would give logits as percentages"


def test_a_window_that_ends_before_the_names_is_noticed():
    pos = {"end": torch.tensor([14, 16]), "IO": torch.tensor([2, 4]), "S1": torch.tensor([4, 2])}
    for window, reaches in ((None, True), (15, True), (14, False)):
        config = SimpleNamespace(windows=(8, window))
        of_prompts = SimpleNamespace(batch=SimpleNamespace(pos=pos),
                                     model=SimpleNamespace(config=config))
        assert ioi.sees_both_names(of_prompts, 1) == reaches
    of_prompts.model.config = SimpleNamespace()             # a GPT-2 has no windows
    assert ioi.sees_both_names(of_prompts, 1)


@pytest.mark.parametrize("flags, words", [
    (("--names", "Mary,John,Paul,Bartholomew"), "only 3 of these names"),
    (("--names", "Mary"), "--names takes four"),
    (("--n-prompts", "4"), "--n-prompts must be 20 or more"),
    (("--corpus", "no-such-file.txt"), "no-such-file.txt"),
    (("--saes", "no-such-folder"), "no-such-folder"),
])
def test_mistakes_get_one_sentence(tmp_path, flags, words):
    done = program("ioi", "--saes", "data/tiny", *flags, "--out", str(tmp_path))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
