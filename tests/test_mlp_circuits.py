"""attribution.py through MLPs: one sweep against the whole tree and against autograd, removals
against edits by hand, logits, and a hand-wired circuit that runs through an MLP."""

import pytest
import torch

import attribution as A
import direct as D
import model as models
import sae as S
from data.errors import UserError
from test_attribution import (PROMPT, active_nodes, folder, random_saes,  # noqa: F401
                              random_transcoders, values, write_out)


@pytest.fixture
def run(folder):    # noqa: F811
    model = models.load_model(folder, dtype=torch.float64)
    return A.trace_prompt(model, random_saes(model), PROMPT[:5], random_transcoders(model))


def active_mlp(run, layer):
    found = run.f_mlp[layer].nonzero().tolist()
    assert found, "this test should have active features"
    return found


def readers(run):
    """An attention feature, an MLP feature and two logits, each at the last position."""
    last, layer = len(run.tokens) - 1, 1
    n_layers = run.model.config.n_layers
    attention = [i for position, i in active_nodes(run, layer) if position == last][0]
    mlp = [i for position, i in active_mlp(run, layer) if position == last][0]
    return [A.Place("feature", layer, last, attention), A.Place("MLP feature", layer, last, mlp),
            A.Place("logit", n_layers, last, 7), A.Place("logit", n_layers, last, 7, 4)]


# ---- sums ----


def test_what_is_read_sums_to_what_the_model_computes(run):
    model = run.model
    logits, cache = model(run.tokens[None], keep=(1,))
    softcap = getattr(model.config, "logit_softcap", None)
    if softcap:
        logits = softcap * torch.atanh(logits / softcap)
    last = logits[0, -1]
    pre = run.transcoders[1].pre_activations(cache[1].mlp_in[0, -1])
    attention, mlp, logit, difference = readers(run)
    assert abs(A.read_terms(run, mlp).pre - float(pre[mlp.feature])) < 1e-10
    assert abs(A.read_terms(run, logit).pre - float(last[7] - last[:model.n_tokens].mean())) < 1e-9
    assert abs(A.read_terms(run, difference).pre - float(last[7] - last[4])) < 1e-9


def test_mlp_features_read_at_their_own_position_and_their_own_attention_layer(run):
    _, mlp, logit, _ = readers(run)
    for reader in (mlp, logit):
        terms = A.read_terms(run, reader)
        components = run.components.pick(terms.component[:-1])
        assert (components.position == reader.position).all() and (terms.head == -1).all()
        written_by_heads = components.kind == A.FEATURE
        assert (components.layer[written_by_heads] == min(reader.layer, 1)).any()
        assert int(terms.component[-1]) == -1


def path_totals(node, found):
    """What every leaf contributes over all paths of an unpruned tree."""
    for child in node.children:
        if child.children:
            path_totals(child, found)
        else:
            place = child.place
            key = (place.kind, place.layer, place.position)
            key = "constant" if place == A.NOBODY else key
            found[key] = found.get(key, 0.0) + child.value
    return found


def test_one_sweep_gives_what_the_whole_tree_gives(run):
    for reader in readers(run)[:2]:
        tree = A.trace(run, reader, share=0, depth=20, breadth=None)
        expected = path_totals(tree, {})
        leaves = A.totals(run, reader)
        assert abs(sum(expected.values()) - tree.value) < 1e-9 * max(1, abs(tree.value))
        assert abs(float(leaves.constants.sum()) - expected.pop("constant")) < 1e-9
        found = {}
        for n in (~run.components.is_feature()).nonzero()[:, 0].tolist():
            key = (A.KINDS[run.components.kind[n]], int(run.components.layer[n]),
                   int(run.components.position[n]))
            found[key] = float(leaves.contribution[n])
        for key in found.keys() | expected.keys():
            assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) < 1e-9, key


def test_leaves_sum_to_the_root(run):
    for reader in readers(run):
        leaves = A.totals(run, reader)
        is_leaf = ~run.components.is_feature()
        total = float(leaves.contribution[is_leaf].sum() + leaves.constants.sum())
        assert abs(total - A.read_terms(run, reader).pre) < 1e-9
        found = A.ends(run, reader)
        assert abs(sum(net for net, size in found.values()) - total) < 1e-9
        assert found["outputs not taken apart"] == (0, 0), "all layers have SAEs and transcoders"


def test_what_is_not_explained_shrinks_when_mlps_are_taken_apart(run):
    """By hand: the share of the leaves that are errors or whole outputs."""
    without = A.trace_prompt(run.model, run.saes, run.tokens)
    reader = readers(run)[0]
    for traced in (run, without):
        leaves = A.totals(traced, reader)
        sizes = {}
        for n in (~traced.components.is_feature()).nonzero()[:, 0].tolist():
            size = float(leaves.contribution[n].abs())
            kind = A.KINDS[traced.components.kind[n]]
            is_bos = int(traced.components.position[n]) == 0
            says_nothing = "error" in kind or (kind in ("MLP", "attention") and not is_bos)
            sizes[says_nothing] = sizes.get(says_nothing, 0.0) + size
        everything = sum(sizes.values()) + float(leaves.constants.abs().sum())
        found = A.ends(traced, reader)
        assert A.unexplained_share(found) == pytest.approx(sizes[True] / everything)
        assert sum(size for net, size in found.values()) == pytest.approx(everything)


# ---- interventions ----


def mlp_read(model, layer, resid_mid, scale):
    """mlp_in of a stream with the norm's scale frozen, by the checkpoint's own weights."""
    block = model.blocks[layer]
    if isinstance(model, models.GPT2):
        norm = block.ln_2
        return (resid_mid - resid_mid.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
    return resid_mid / scale * (1 + block.pre_feedforward_layernorm.weight)


def frozen_root(run, reader, given):
    """What a reader reads as a function of every feature's activation, by a forward pass of its own
    in which patterns, norm scales, gates, errors and BOS are the clean run's and carry no
    gradient. given: {("feature" or "MLP feature", layer): (T,d_sae)} added to activations."""
    model = run.model
    resid = sum(model.embed_parts(run.tokens[None]).values())[0]
    for l in range(model.config.n_layers):
        kept, sae, transcoder = run.cache[l], run.saes[l], run.transcoders[l]
        v = values(model, l, resid, kept.scales["attn_in"][0])
        z = torch.einsum("hqk,khd->qhd", kept.pattern[0], v).flatten(-2)
        pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
        if (reader.kind, reader.layer) == ("feature", l):
            return pre[reader.position, reader.feature]
        f = pre * (run.f[l] != 0) + given["feature", l]
        z_cat = f @ sae.W_dec + sae.b_dec + kept.z_cat[0] - sae.decode(run.f[l])
        z_cat = torch.cat([kept.z_cat[0, :1], z_cat[1:]])
        resid = resid + write_out(model, l, z_cat, kept.scales)
        mlp_in = mlp_read(model, l, resid, kept.scales["mlp_in"][0])
        pre = mlp_in @ transcoder.W_enc + transcoder.b_enc
        if (reader.kind, reader.layer) == ("MLP feature", l):
            return pre[reader.position, reader.feature]
        f = pre * (run.f_mlp[l] != 0) + given["MLP feature", l]
        y = f @ transcoder.W_dec + transcoder.b_dec + kept.mlp_out[0] \
            - transcoder.decode(run.f_mlp[l])
        resid = resid + torch.cat([kept.mlp_out[0, :1], y[1:]])
    direction, constant = A.scaled_logit_direction(run, reader)
    return resid[reader.position] @ direction + constant[0]


def test_all_paths_through_a_feature_are_its_gradient_with_everything_else_frozen(run):
    for reader in (readers(run)[0], readers(run)[1]):
        given = {("feature", l): torch.zeros_like(f, requires_grad=True)
                 for l, f in run.f.items()}
        given |= {("MLP feature", l): torch.zeros_like(f, requires_grad=True)
                  for l, f in run.f_mlp.items()}
        root = frozen_root(run, reader, given)
        assert abs(float(root.detach()) - A.read_terms(run, reader).pre) < 1e-9
        gradients = dict(zip(given, torch.autograd.grad(root, list(given.values()),
                                                        allow_unused=True)))
        paths = {}

        def walk(node):
            for child in node.children:
                if child.place.kind in A.FEATURES:
                    key = child.place[:4]
                    paths[key] = paths.get(key, 0.0) + child.value
                    walk(child)

        walk(A.trace(run, reader, share=0, depth=20, breadth=None))
        assert {kind for kind, *_ in paths} == set(A.FEATURES) and len(paths) > 5
        of_sweep = A.totals(run, reader).contribution
        rows = {(A.KINDS[kind], l, k, j): n for n, (kind, l, k, j) in
                enumerate(zip(*(column.tolist() for column in run.components[:4])))}
        for (kind, l, k, j), total in paths.items():
            assert abs(total - float(of_sweep[rows[kind, l, k, j]])) < 1e-9
            f = (run.f if kind == "feature" else run.f_mlp)[l][k, j]
            effect = float(gradients[kind, l][k, j] * f)
            assert abs(total - effect) < 1e-9 * max(1.0, abs(effect)), (kind, l, k, j)


def test_removing_features_equals_editing_by_hand(run):
    model = run.model
    for reader in readers(run):
        upstream, _ = A.upstream_features(run, reader)
        upstream = upstream[:6]
        found = A.ablation_effects(run, upstream, reader)
        for n, row in enumerate(upstream.tolist()):
            kind, l, k, j, _ = run.components.place(row)
            edit_z, edit_mlp = {}, {}
            if kind == "feature":
                def without(z):
                    z = z.clone()
                    z[0, k] -= run.f[l][k, j] * run.saes[l].W_dec[j]
                    return z
                edit_z[l] = without
            else:
                def without_mlp(mlp_in, mlp_out):
                    out = mlp_out.clone()
                    out[0, k] -= run.f_mlp[l][k, j] * run.transcoders[l].W_dec[j]
                    return out
                edit_mlp[l] = without_mlp
            every = range(model.config.n_layers)
            logits, cache = model(run.tokens[None], edit_z, every, edit_mlp)
            if reader.kind == "feature":
                sae = run.saes[reader.layer]
                after = sae.pre_activations(cache[reader.layer].z_cat[0, -1])[reader.feature]
            elif reader.kind == "MLP feature":
                transcoder = run.transcoders[reader.layer]
                mlp_in = cache[reader.layer].mlp_in[0, -1]
                after = transcoder.pre_activations(mlp_in)[reader.feature]
            else:
                softcap = getattr(model.config, "logit_softcap", None)
                last = softcap * torch.atanh(logits / softcap) if softcap else logits
                last = last[0, -1]
                less = last[reader.against] if reader.against >= 0 else last[:model.n_tokens].mean()
                after = last[reader.feature] - less
            fell = A.read_terms(run, reader).pre - float(after)
            assert abs(fell - float(found[n])) < 1e-8, (reader, kind, l)


def test_readers_that_are_not_there_are_named(run):
    with pytest.raises(UserError, match="layer 0 has no transcoder; .* for layers none"):
        A.trace(run._replace(transcoders={}), A.Place("MLP feature", 0, 2, 0))
    with pytest.raises(UserError, match="feature 5 .* this transcoder has features 0 to 4"):
        A.trace(run, A.Place("MLP feature", 1, 2, 5))
    with pytest.raises(UserError, match="less itself"):
        A.trace(run, A.Place("logit", 2, 2, 3, 3))
    with pytest.raises(UserError, match="token 999"):
        A.trace(run, A.Place("logit", 2, 2, 999))


# ---- a circuit whose answer is known ----


@pytest.fixture
def bigram():
    """One layer, written by hand: after the tokens 3 4 comes 7, after 5 4 comes 8.

    The stream is [token | position | token before | next token], 12 numbers each. Head 0.0 writes
    the token before. Neuron 0 of the MLP fires if the token is 4 and 3 came before, neuron 1 if it
    is 4 and 5 came before; they write the next token, which the unembedding reads there.
    """
    V = 12
    model = models.GPT2(models.GPT2Config(1, 1, 4 * V, 8, V, V)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    token, place, before, following = (slice(n * V, (n + 1) * V) for n in range(4))
    eye = torch.eye(V, dtype=torch.float64)
    model.wte.weight[:, token] = eye
    model.wte.weight[:, following] = eye
    model.wpe.weight[:, place] = eye
    block = model.h[0]
    for norm in (block.ln_1, block.ln_2, model.ln_f):
        norm.weight.fill_(1)
    # query: my position; key: the position after mine
    block.attn.c_attn.weight[place, place] = 20 * eye
    block.attn.c_attn.weight[place, 4 * V + V:4 * V + 2 * V] = 20 * torch.roll(eye, 1, 1)
    block.attn.c_attn.weight[token, 8 * V:8 * V + V] = eye
    block.attn.c_proj.weight[0:V, before] = eye
    for neuron, (first, then) in enumerate(((3, 7), (5, 8))):
        block.mlp.c_fc.weight[token.start + 4, neuron] = 4
        block.mlp.c_fc.weight[before.start + first, neuron] = 4
        block.mlp.c_fc.bias[neuron] = -20
        block.mlp.c_proj.weight[neuron, following.start + then] = 5
    sae = S.SAE(4 * V, V).double().requires_grad_(False)    # feature i: token i came before
    for parameter in sae.parameters():
        parameter.zero_()
    sae.W_enc[:V] = eye
    sae.W_dec[:, :V] = eye
    sae.b_enc.fill_(-0.5)
    transcoder = S.Transcoder(4 * V, 2, 4 * V).double().requires_grad_(False)   # its neurons
    transcoder.W_enc.copy_(block.mlp.c_fc.weight[:, :2])
    transcoder.b_enc.copy_(block.mlp.c_fc.bias[:2])
    transcoder.W_dec.copy_(block.mlp.c_proj.weight[:2])
    return model, {0: sae}, {0: transcoder}


def test_the_hand_wired_circuit_through_an_mlp_is_found(bigram):
    model, saes, transcoders = bigram
    tokens = torch.tensor([0, 9, 3, 4])
    assert int(model(tokens[None])[0][0, -1].argmax()) == 7, "it does what it was wired for"
    run = A.trace_prompt(model, saes, tokens, transcoders)
    assert run.f_mlp[0][3].gt(0).tolist() == [True, False]
    reader = A.Place("logit", 1, 3, 7, against=8)
    tree = A.trace(run, reader)
    top = tree.children[0]
    assert top.place == A.Place("MLP feature", 0, 3, 0)
    assert top.value > 0.8 * tree.value
    below = {child.place for child in top.children[:3]}
    assert below >= {A.Place("embedding", -1, 3), A.Place("feature", 0, 3, 3)}, \
        "the token, and what came before it"
    came_before = next(child for child in top.children if child.place.kind == "feature")
    source = came_before.children[0]
    assert (source.place, source.head) == (A.Place("embedding", -1, 2), 0)
    whole = A.trace_prompt(model, saes, tokens)
    assert A.trace(whole, reader).children[0].place.kind == "MLP"
    share = A.unexplained_share(A.ends(run, reader))
    assert share < 0.1
    assert A.unexplained_share(A.ends(whole, reader)) > 2 * share
    upstream, _ = A.upstream_features(run, reader)
    fall = A.ablation_effects(run, upstream[:1], reader)
    assert float(fall) > 0.9 * tree.value, "without it, nothing is left of the difference"


def test_the_strongest_path_takes_the_largest_step_each_time(run):
    """By a loop over all terms, summed over heads; from a feature, and from a logit."""
    components = run.components
    layer = run.model.config.n_layers - 1
    last = len(run.tokens) - 1
    feature = int(run.f[layer][last].argmax())
    for root in (A.Place("feature", layer, last, feature), A.Place("logit", layer + 1, last, 3)):
        path = A.strongest_path(run, root)
        reader = root
        for step in path:
            assert step.reader == reader
            terms = A.read_terms(run, reader)
            by_row = {}
            for head, row, value in zip(terms.head.tolist(), terms.component.tolist(),
                                        terms.value.tolist()):
                if row >= 0:
                    by_row.setdefault(row, {})[head] = value
            total = {row: sum(heads.values()) for row, heads in by_row.items()}
            assert step.pre == pytest.approx(float(terms.value.sum()), abs=1e-10)
            assert step.row == max(total, key=total.get)
            assert step.value == pytest.approx(total[step.row], abs=1e-10)
            assert step.value > 0
            heads = {head: value for head, value in by_row[step.row].items() if head >= 0}
            assert step.by_head == heads
            sizes = [abs(value) for value in step.by_head.values()]
            assert sizes == sorted(sizes, reverse=True)
            reader = components.place(step.row)
        if path and reader.kind in A.FEATURES:
            _, values = A.read_terms(run, reader).over_heads()
            assert (values <= 0).all(), "it ended where nothing more contributes"


def test_the_path_of_the_hand_wired_circuit(bigram):
    """From the logit to the neuron that was wired for it, and to a token that it reads."""
    model, saes, transcoders = bigram
    run = A.trace_prompt(model, saes, torch.tensor([0, 9, 3, 4]), transcoders)
    reader = A.Place("logit", 1, 3, 7, 8)
    read = [run.components.place(step.row) for step in A.strongest_path(run, reader)]
    assert read[0] == A.Place("MLP feature", 0, 3, 0)
    assert read[-1].kind == "embedding"
    # without transcoders it ends at the MLP, which is not taken apart
    run = A.trace_prompt(model, saes, torch.tensor([0, 9, 3, 4]))
    read = [run.components.place(step.row) for step in A.strongest_path(run, reader)]
    assert read == [A.Place("MLP", 0, 3)]


def test_the_bias_of_a_transcoder_feature_is_its_own(run):
    """b_dec is no part of what a transcoder reads: at an input of 0 the pre-activation is b_enc."""
    for layer, transcoder in run.transcoders.items():
        at_zero = transcoder.pre_activations(torch.zeros(1, transcoder.d_in, dtype=torch.float64))
        torch.testing.assert_close(D.feature_bias(transcoder), at_zero[0])
