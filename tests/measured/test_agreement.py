"""tests/measured/agreement.py against loops."""

import agreement
import numpy as np
import pytest
import torch
from conftest import ROOT

import direct as A
import sae as S
from agreement import ROOTS, ablation_agreement, choose_removed, head_agreement
from attribution import Components, trace_prompt
from data.errors import UserError


def test_agreement_of_heads_equals_a_loop(tiny):
    saes = {2: S.SAE.load(ROOT / "data" / "tiny" / "L2")}
    rows = torch.randint(4000, (3, 40), generator=torch.Generator().manual_seed(0))
    found = head_agreement(tiny, saes, rows)[2]
    sae, by_feature = saes[2], {}
    _, cache = tiny(rows, keep=(2,))
    f, v = sae.encode(cache[2].z_cat), A.values_minus_bias(tiny, 2, cache[2].v)
    for b in range(3):
        for q in range(1, 40):
            for i in f[b, q].nonzero()[:, 0].tolist():
                one = A.dfa(cache[2].pattern[b:b + 1], v[b:b + 1], sae.W_enc[:, i])[0, :, q].sum(-1)
                whole = one.sum() + A.constant_part(tiny, 2, sae)[i]
                assert whole == pytest.approx(float(f[b, q, i]), abs=1e-4)
                by_feature.setdefault(i, []).append(one)
    top1 = [int(torch.stack(all_).mean(0).argmax() == A.head_weights(sae.W_dec, 4)[i].argmax())
            for i, all_ in by_feature.items()]
    assert found["n_fired"] == len(by_feature) and found["n_fired"] + found["n_silent"] == sae.d_sae
    assert found["top1"] == pytest.approx(sum(top1) / len(top1), abs=2 / len(top1))
    assert found["rank_ci"][0] <= found["rank"] <= found["rank_ci"][1]


def some_rows(n):
    return torch.randint(4000, (n, 24), generator=torch.Generator().manual_seed(1))


def shipped(tiny):
    where = ROOT / "data" / "tiny"
    return S.load_saes(where, tiny), S.load_transcoders(where, tiny)


def what_the_root_is(tiny, saes, root, tokens, edit_z, edit_mlp):
    """By plain runs of the model."""
    with torch.no_grad():
        return float(root_in_a_plain_run(tiny, saes, root, tokens, edit_z, edit_mlp))


def root_in_a_plain_run(tiny, saes, root, tokens, edit_z, edit_mlp):
    if root.kind == "logit":
        x, _ = tiny.run_layers(tiny.embed(tokens[None]), edit_z, edit_mlp=edit_mlp)
        logits = tiny.unembed(x)[0, root.position]
        return logits[root.feature] - logits.mean()
    z = tiny.z_cat_at(tokens[None], [root.layer], edit_z, edit_mlp)[root.layer][0, root.position]
    return saes[root.layer].pre_activations(z)[root.feature]


def without(place, vector):
    """Edits that subtract a feature's vector where it was written."""
    def edit_z(z):
        z = z.clone()
        z[:, place.position] -= vector
        return z
    if place.kind == "feature":
        return {place.layer: edit_z}, {}
    return {}, {place.layer: lambda mlp_in, mlp_out: edit_z(mlp_out)}


@pytest.mark.parametrize("kind", ROOTS)
def test_falls_are_those_of_plain_runs_and_the_strongest_come_first(tiny, kind, monkeypatch):
    saes, transcoders = shipped(tiny)
    chosen, compared = [], []
    compare = agreement.compare

    def choose(traced, root, rng):
        found = choose_removed(traced, root, rng)
        chosen.extend((traced, root, of_kind, *found[of_kind]) for of_kind in found or {})
        return found

    monkeypatch.setattr(agreement, "choose_removed", choose)
    monkeypatch.setattr(agreement, "compare", lambda attributed, fall: (
        compared.append((attributed, fall)) or compare(attributed, fall)))
    found = ablation_agreement(tiny, saes, transcoders, some_rows(4), ROOTS[kind], n_roots=2)
    assert {of_kind: list(ways) for of_kind, ways in found.items()} == {
        "feature": ["one step", "all paths through attention", "all paths", *agreement.HELD],
        "MLP feature": ["one step", "all paths", *agreement.HELD]}
    assert len(chosen) == 4 and len(compared) == 18         # 2 roots, 2 kinds; 5 and 4 ways
    falls = [compared[i][1] for i in (0, 5, 9, 14)]
    for (traced, root, of_kind, rows, in_one_step), fall in zip(chosen, falls):
        assert len(rows.unique()) == len(rows) == 20
        assert in_one_step[:10].abs().min() >= in_one_step[10:].abs().max()
        dictionaries, f = {"feature": (saes, traced.f),
                           "MLP feature": (transcoders, traced.f_mlp)}[of_kind]
        clean = what_the_root_is(tiny, saes, root, traced.tokens, {}, {})
        for row, value in list(zip(rows.tolist(), fall.tolist()))[::5]:
            place = traced.components.place(row)
            vector = f[place.layer][place.position, place.feature] \
                * dictionaries[place.layer].W_dec[place.feature]
            anew = what_the_root_is(tiny, saes, root, traced.tokens, *without(place, vector))
            assert value == pytest.approx(clean - anew, abs=2e-4)


def both_roots(tiny, saes, transcoders):
    traced = trace_prompt(tiny, saes, some_rows(1)[0], transcoders)
    rng = np.random.default_rng(0)
    return [(traced, choose(traced, 1234, rng)) for choose in ROOTS.values()]


@pytest.mark.parametrize("hold_active", [False, True])
def test_with_leaves_held_and_nothing_removed_the_run_is_the_clean_one(tiny, hold_active):
    """Features not there are removed, which changes nothing: all is as in the clean run."""
    for traced, root in both_roots(tiny, *shipped(tiny)):
        silent = traced.components._replace(feature=torch.cat(
            [(traced.f[0][at] == 0).nonzero()[:1, 0] for at in traced.components.position]))
        rows = (silent.layer == 0) & (silent.kind == agreement.FEATURE)
        rows = rows.nonzero()[:5, 0]
        falls = agreement.falls_with_leaves_held(traced._replace(components=silent), rows, root,
                                                 hold_active)
        assert falls.abs().max() < 2e-3, "errors are not put back as they were"


def test_leaves_held_is_plain_removal_where_saes_make_no_error_and_mlps_are_fixed(tiny):
    """Identity SAEs: relu(x) - relu(-x) = x. Then all that is held are the outputs of MLPs."""
    identity = S.SAE(256, 512)
    with torch.no_grad():
        identity.W_enc.copy_(torch.cat([torch.eye(256), -torch.eye(256)], 1))
        identity.W_dec.copy_(torch.cat([torch.eye(256), -torch.eye(256)]))
        identity.b_enc.zero_()
        identity.b_dec.zero_()
    saes = dict.fromkeys(range(4), identity)
    for traced, root in both_roots(tiny, saes, {}):
        fixed = {layer: lambda mlp_in, mlp_out, kept=kept: kept.mlp_out.expand_as(mlp_out)
                 for layer, kept in traced.cache.items()}
        rows = (traced.components.kind == agreement.FEATURE).nonzero()[::900, 0]
        falls = agreement.falls_with_leaves_held(traced, rows, root, hold_active=False)
        clean = what_the_root_is(tiny, saes, root, traced.tokens, {}, {})
        for row, fall in zip(rows.tolist(), falls.tolist()):
            place = traced.components.place(row)
            if place.layer >= root.layer:
                continue
            vector = traced.f[place.layer][place.position, place.feature] \
                * identity.W_dec[place.feature]
            edit_z, _ = without(place, vector)
            anew = what_the_root_is(tiny, saes, root, traced.tokens, edit_z, fixed)
            assert fall == pytest.approx(clean - anew, abs=2e-4)


def test_held_outputs_equal_a_loop():
    generator = torch.Generator().manual_seed(0)
    sae = S.SAE(6, 9)
    clean, written = torch.randn(2, 4, 6, generator=generator)
    read = torch.randn(2, 4, 6, generator=generator)
    f = sae.encode(clean)
    f[0] = 0
    one, other = f[1:].nonzero()[[0, -1]].tolist()
    gone = Components(torch.tensor([agreement.FEATURE] * 2), torch.tensor([3, 5]),
                      torch.tensor([one[0] + 1, other[0] + 1]), torch.tensor([one[1], other[1]]),
                      torch.zeros(2, 6))
    for hold_active in (False, True):
        write = agreement.held_output(sae, f, written, gone, (agreement.FEATURE, 3), hold_active)
        found = write(read)
        for row in range(2):
            assert torch.allclose(found[row, 0], written[0], atol=1e-6), "BOS is to stay"
            for position in range(1, 4):
                pre = sae.pre_activations(read[row, position])
                expected = written[position].clone()
                for i in range(9):
                    now = pre[i] if f[position, i] > 0 else torch.tensor(0.0)
                    if not hold_active:
                        now = pre[i].clamp_min(0)
                    if row == 0 and [position - 1, i] == one:       # row 1 lost one of layer 5
                        now = torch.tensor(0.0)
                    expected += (now - f[position, i]) * sae.W_dec[i]
                assert torch.allclose(found[row, position], expected, atol=1e-5)
    assert torch.equal(agreement.held_output(None, None, written, gone, (0, 0), True)(read),
                       written.expand(2, -1, -1))


def test_the_same_features_in_two_traces(tiny):
    saes, transcoders = shipped(tiny)
    tokens = some_rows(1)[0]
    whole, alone = trace_prompt(tiny, saes, tokens, transcoders), trace_prompt(tiny, saes, tokens)
    rows = (whole.components.kind == agreement.FEATURE).nonzero()[::7, 0]
    there = agreement.same_features(whole, alone, rows)
    for one, other in zip(whole.components.pick(rows), alone.components.pick(there)):
        assert torch.equal(one, other)


def test_slope_and_signs_of_known_answers():
    attributed = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10, 0.5, 0.25])
    exact = np.array([agreement.compare(attributed, 0.5 * attributed)] * 3)
    assert agreement.summary_over_roots(exact) == {
        "rank": 1, "rank_ci": [1, 1], "sign": 1, "sign_ci": [1, 1], "slope": 0.5,
        "slope_ci": [0.5, 0.5]}
    turned = agreement.summary_over_roots(np.array([agreement.compare(attributed, -attributed)]))
    assert (turned["rank"], turned["sign"], turned["slope"]) == (-1, 0, -1)


def test_too_few_rows_are_named(tiny):
    with pytest.raises(UserError, match="only 1 places with 20 earlier features.*--n-roots"):
        ablation_agreement(tiny, *shipped(tiny), some_rows(1), ROOTS["logit"], n_roots=2)


def test_transcoders_that_are_not_earlier_than_the_root_are_not_asked_of(tiny):
    saes, transcoders = shipped(tiny)
    last = {3: transcoders[3]}
    found = ablation_agreement(tiny, saes, last, some_rows(3), ROOTS["feature"], n_roots=1)
    assert list(found) == ["feature"]
