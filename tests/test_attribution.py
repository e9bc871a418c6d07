"""attribution.py: every sum against what it should sum to, every attribution against the
intervention it stands for, and a hand-wired induction circuit whose answer is known."""

import json
import re

import pytest
import torch

import attribution as A
import direct as D
import model as models
import sae as S
from conftest import ROOT, SHAPES, program
from data.errors import UserError
from data.weights import digest

PROMPT = torch.tensor([3, 14, 15, 9, 26, 5, 35])
EXACT = {torch.float32: 1e-4, torch.float64: 1e-10}


def random_saes(model, d_sae=12, seed=0, skip=()):
    """SAEs of which some features are active, of the model's own type; every second one is a
    JumpReLU."""
    saes = {}
    for layer in range(model.config.n_layers):
        g = torch.Generator().manual_seed(seed + layer)
        sae = S.SAE(model.config.n_heads * model.config.d_head, d_sae, g)
        with torch.no_grad():
            sae.W_enc += 0.2 * torch.randn(sae.W_enc.shape, generator=g)
            sae.b_dec += 0.2 * torch.randn(sae.d_in, generator=g)
            sae.b_enc += 0.3 * torch.randn(d_sae, generator=g) - 0.2
            sae.threshold += 0.2 * (layer % 2)
        if layer not in skip:
            saes[layer] = sae.to(next(model.parameters()).dtype).requires_grad_(False)
    return saes


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    path, (write, shape) = tmp_path_factory.mktemp("model"), SHAPES[request.param]
    write(path, **shape)
    return path


def random_transcoders(model, d_sae=5, seed=9, skip=()):
    """The same for MLPs."""
    transcoders = {}
    d_model = model.config.d_model
    for layer in range(model.config.n_layers):
        g = torch.Generator().manual_seed(seed + layer)
        transcoder = S.Transcoder(d_model, d_sae, d_model, g)
        with torch.no_grad():
            transcoder.b_dec += 0.2 * torch.randn(d_model, generator=g)
            transcoder.b_enc += 0.3 * torch.randn(d_sae, generator=g)
            transcoder.threshold += 0.2 * (layer % 2)
        if layer not in skip:
            transcoders[layer] = transcoder.to(next(model.parameters()).dtype).requires_grad_(False)
    return transcoders


@pytest.fixture(params=[(torch.float32, False), (torch.float64, False), (torch.float64, True)],
                ids=["float32", "float64", "through MLPs, float64"])
def traced(request, folder):
    dtype, through_mlps = request.param
    model = models.load_model(folder, dtype=dtype)
    transcoders = random_transcoders(model) if through_mlps else {}
    return A.trace_prompt(model, random_saes(model), PROMPT, transcoders), EXACT[dtype]


def pre_activations(run, layer):
    sae = run.saes[layer]
    return (run.cache[layer].z_cat[0] - sae.b_dec) @ sae.W_enc + sae.b_enc          # (T,d_sae)


def active_nodes(run, layer):
    found = run.f[layer].nonzero().tolist()
    assert found, "this test should have active features"
    return found


# ---- sums ----


def test_dfa_and_bias_sum_to_the_pre_activation(traced):
    run, exact = traced
    for layer, sae in run.saes.items():
        pre, kept = pre_activations(run, layer), run.cache[layer]
        for i in range(sae.d_sae):
            found = D.dfa(kept.pattern, kept.v, sae.W_enc[:, i])
            assert found.shape == kept.pattern.shape
            total = found.sum((1, 3))[0] + D.feature_bias(sae)[i]
            assert (total - pre[:, i]).abs().max() < exact * max(1, pre[:, i].abs().max()), \
                "DFA with its bias does not sum to the pre-activation: is b_enc - b_dec . W_enc in it?"


def test_head_logits_are_what_the_stream_loses_without_the_head(traced):
    run, exact = traced
    model, last = run.model, len(run.tokens) - 1
    kept = run.cache[model.config.n_layers - 1]
    final = kept.resid_post[0, last]
    direction = model.logit_directions(torch.tensor(3)) / model.final_scale(final)
    for layer, kept in run.cache.items():
        scale = kept.scales["attn_out"][0, last] if "attn_out" in kept.scales else 1.0
        found = D.head_logits(kept.z_cat[0, last], run.matrices[layer], direction / scale)
        # heads and bias together are what the layer adds to the stream, and that along the
        # direction
        total = found.sum() + run.matrices[layer].b_O @ direction
        difference = (total - kept.attn_out[0, last] @ direction).abs()
        assert difference < exact * max(1, found.abs().max())
        for h in range(model.config.n_heads):
            alone = kept.z_cat[0, last].unflatten(-1, (model.config.n_heads, -1)).clone()
            alone[torch.arange(len(alone)) != h] = 0
            again = D.head_logits(alone.flatten(), run.matrices[layer], direction / scale)
            assert (again[h] - found[h]).abs() < exact


def test_parts_add_up_to_the_residual_stream(traced):
    run, exact = traced
    for layer, kept in run.cache.items():
        stream = torch.zeros_like(kept.resid_pre[0])
        stream.index_add_(0, run.components.position[:run.n_before[layer]],
                          run.components.vector[:run.n_before[layer]])
        assert (stream - kept.resid_pre[0]).abs().max() < exact * kept.resid_pre.abs().max(), \
            (f"something that is written before layer {layer} is missing: "
             "b_O, a post-norm's gain, its scale?")
        stream.index_add_(0, run.components.position[run.n_before[layer]:run.n_mid[layer]],
                          run.components.vector[run.n_before[layer]:run.n_mid[layer]])
        assert (stream - kept.resid_pre[0] - kept.attn_out[0]).abs().max() < exact * 10


def test_children_sum_to_the_pre_activation(traced):
    run, exact = traced
    for layer in run.saes:
        pre = pre_activations(run, layer)
        for position, i in [*active_nodes(run, layer), (1, 0), (6, 5)]:
            found = A.read_terms(run, A.Place("feature", layer, position, i))
            size = max(float(found.value.abs().max()), 1.0)
            assert abs(found.pre - float(pre[position, i])) < exact * size, \
                f"{layer}.{i} at {position}"


def test_every_node_of_an_unpruned_tree_is_the_sum_of_its_children(traced):
    run, exact = traced
    layer = 1 if run.transcoders else min(2, max(run.saes))
    position, i = [node for node in active_nodes(run, layer) if node[0] <= 3][-1]
    root = A.trace(run, A.Place("feature", layer, position, i), share=0, depth=10, breadth=None)
    seen = []

    def check(node):
        if node.children:
            seen.append(node)
            size = max(1.0, max(abs(child.value) for child in node.children))
            assert abs(sum(child.value for child in node.children) - node.value) < exact * size
            assert node.pruned == 0 == node.n_pruned
            for child in node.children:
                check(child)
        else:
            assert node.place.feature < 0, "a feature was not taken apart"

    check(root)
    assert len(seen) > 20


def test_what_is_pruned_is_added_up(traced):
    run, exact = traced
    layer = max(run.saes)
    position, i = active_nodes(run, layer)[-1]
    root = A.trace(run, A.Place("feature", layer, position, i), share=0.05, depth=2, breadth=4)
    for node in [root, *(child for child in root.children if child.children)]:
        size = max(1.0, max(abs(child.value) for child in node.children))
        assert len(node.children) <= 4 and abs(node.children[-1].value) >= 0.05 * abs(root.value)
        everything = A.read_terms(run, node.place).value
        assert node.n_pruned + len(node.children) == int((everything != 0).sum())
        total = sum(child.value for child in node.children) + node.pruned
        assert abs(total - node.value) < exact * size * 10
        ends = A.expand(run, node._replace(children=()), A.read_terms(run, node.place),
                        node.value / A.read_terms(run, node.place).pre, 0, 1, None)
        errors = [child.value for child in ends.children
                  if child.place.kind in ("error", "MLP error")
                  or child.place.kind in ("attention", "MLP") and child.place.position > 0]
        assert abs(sum(errors) - node.unexplained) < exact * size * 10
    grandchildren = [node for child in root.children for node in child.children]
    assert not any(node.children for node in grandchildren), \
        "depth 2"


def test_qk_pairs_sum_to_the_score(traced):
    run, exact = traced
    config = run.model.config
    for layer, kept in run.cache.items():
        window = (getattr(config, "windows", None) or [None] * config.n_layers)[layer]
        for head in range(config.n_heads):
            for query in (0, 4, 6):
                seen = [k for k in range(query + 1) if window is None or query - k < window]
                scores = config.score_scale * kept.k[0, :, head] @ kept.q[0, query, head]
                size = max(1.0, float(scores.abs().max()))
                for key in seen:
                    found = A.qk(run, layer, head, query, key)
                    assert abs(float(found.pairs.sum()) - float(scores[key])) < exact * size, \
                        "constants, the norm's scale, the rotation, the scale of q and k?"
                    assert found.pairs.shape == (len(found.query), len(found.key))
                    others = [k for k in seen if k != key]
                    if others:
                        mean = float(scores[key] - scores[others].mean())
                        against_mean = A.qk(run, layer, head, query, key, "others").score
                        assert abs(against_mean - mean) < exact * size
                        one = float(scores[key] - scores[others[0]])
                        against_one = A.qk(run, layer, head, query, key, others[0]).score
                        assert abs(against_one - one) < exact * size


def test_what_is_equal_at_all_keys_cancels_in_a_contrast(tiny):
    """GPT-2's key bias; in Gemma the rotation makes it differ from key to key."""
    run = A.trace_prompt(tiny, {}, PROMPT)
    for layer in range(4):
        score, contrast = (A.qk(run, layer, 1, 5, 2, against) for against in (None, "others"))
        column = score.key.index(A.NOBODY)
        assert score.pairs[:, column].abs().max() > 0.01
        assert contrast.pairs[:, contrast.key.index(A.NOBODY)].abs().max() < 1e-4


def test_layers_without_an_sae_and_bos_are_whole(folder):
    model = models.load_model(folder, dtype=torch.float64)
    run = A.trace_prompt(model, random_saes(model, skip=(0,)), PROMPT)
    layer = max(run.saes)
    position, i = active_nodes(run, layer)[0]
    pre = pre_activations(run, layer)
    assert abs(A.read_terms(run, A.Place("feature", layer, position, i)).pre - float(pre[position, i])) < 1e-10
    whole = run.components.kind == A.ATTENTION
    assert ((run.components.layer == 0) | (run.components.position == 0))[whole].all()
    assert all((f[0] == 0).all() for f in run.f.values()), "SAEs do not see BOS"


# ---- interventions ----


def values(model, layer, resid, scale):
    """v (T,H,d_head) of a layer from a residual stream and a frozen norm scale, by the checkpoint's
    own weights."""
    block, config = model.blocks[layer], model.config
    if isinstance(model, models.GPT2):
        norm, D = block.ln_1, config.d_model
        n = (resid - resid.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
        v = n @ block.attn.c_attn.weight[:, 2 * D:] + block.attn.c_attn.bias[2 * D:]
    else:
        n = resid / scale * (1 + block.input_layernorm.weight)
        v = n @ block.self_attn.v_proj.weight
    v = v.unflatten(-1, (-1, config.d_head))
    return v.repeat_interleave(config.n_heads // v.shape[-2], -2)


def write_out(model, layer, z_cat, scales):
    """attn_out of a z_cat with the post-norm's scale frozen, by the checkpoint's own weights."""
    block = model.blocks[layer]
    if isinstance(model, models.GPT2):
        return z_cat @ block.attn.c_proj.weight + block.attn.c_proj.bias
    out, post = z_cat @ block.self_attn.o_proj.weight, block.post_attention_layernorm
    return out / scales["attn_out"][0] * (1 + post.weight) if post else out


def test_one_edge_is_what_the_node_loses_when_the_upstream_feature_is_not_written(folder):
    """Subtract f_j W_dec[j] @ W_O from resid_pre at the source position alone, keep pattern and
    norm scale."""
    model = models.load_model(folder, dtype=torch.float64)
    run, checked = A.trace_prompt(model, random_saes(model), PROMPT), 0
    for layer in range(1, model.config.n_layers):
        kept, sae = run.cache[layer], run.saes[layer]
        for position, i in active_nodes(run, layer)[-2:]:
            found = A.read_terms(run, A.Place("feature", layer, position, i))
            reader = A.Place("feature", layer, position, i)
            for part in A.upstream_features(run, reader)[0].tolist():
                _, l, k, j, _ = run.components.place(part)
                z = (run.f[l][k, j] * run.saes[l].W_dec[j])[None]
                scales = {name: one[:, k:k + 1] for name, one in run.cache[l].scales.items()}
                written = write_out(model, l, z, scales) - write_out(model, l, 0 * z, scales)
                resid = kept.resid_pre[0].clone()
                resid[k] -= written[0]
                v = values(model, layer, resid, kept.scales["attn_in"][0])
                z = torch.einsum("hk,khd->hd", kept.pattern[0, :, position], v).flatten()
                pre = (z - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]
                edge = float(found.value[found.component == part].sum())
                assert abs(found.pre - float(pre) - edge) < 1e-9 * max(1.0, abs(found.pre))
                checked += 1
    assert checked > 10


def frozen_root(run, layer, position, feature, f_given):
    """The root's pre-activation as a function of every feature's activation, by a forward pass of
    its own in which patterns, norm scales, gates, SAE errors, MLP outputs and BOS are the clean
    run's and carry no gradient.

    f_given: {(layer): (T,d_sae)} added to each layer's features: zeros, whose gradient is asked
    for."""
    model, resid = run.model, sum(run.model.embed_parts(run.tokens[None]).values())[0]
    for l in range(layer + 1):
        kept, sae = run.cache[l], run.saes[l]
        v = values(model, l, resid, kept.scales["attn_in"][0])
        z = torch.einsum("hqk,khd->qhd", kept.pattern[0], v).flatten(-2)
        pre = (z - sae.b_dec) @ sae.W_enc + sae.b_enc
        if l == layer:
            return pre[position, feature]
        f = pre * (run.f[l] != 0) + f_given[l]
        error = kept.z_cat[0] - sae.decode(run.f[l])
        z_cat = f @ sae.W_dec + sae.b_dec + error
        z_cat = torch.cat([kept.z_cat[0, :1], z_cat[1:]])
        resid = resid + write_out(model, l, z_cat, kept.scales) + kept.mlp_out[0]


def test_all_paths_through_a_feature_sum_to_its_effect_with_everything_else_frozen(folder):
    model = models.load_model(folder, dtype=torch.float64)
    tokens = PROMPT[:4]
    run = A.trace_prompt(model, random_saes(model), tokens)
    layer = min(2, model.config.n_layers - 1)
    position, i = [node for node in active_nodes(run, layer) if node[0] == 3][-1]
    given = {l: torch.zeros_like(f, requires_grad=True) for l, f in run.f.items()}
    root = frozen_root(run, layer, position, i, given)
    assert abs(float(root.detach()) - A.read_terms(run, A.Place("feature", layer, position, i)).pre) < 1e-9
    gradients = torch.autograd.grad(root, [given[l] for l in range(layer)])
    paths = {}

    def walk(node):
        for child in node.children:
            if child.place.feature >= 0:
                key = (child.place.layer, child.place.position, child.place.feature)
                paths[key] = paths.get(key, 0.0) + child.value
                walk(child)

    walk(A.trace(run, A.Place("feature", layer, position, i), share=0, depth=10, breadth=None))
    assert len(paths) > 5
    for (l, k, j), total in paths.items():
        # linear: the gradient times what is removed
        effect = float(gradients[l][k, j] * run.f[l][k, j])
        assert abs(total - effect) < 1e-9 * max(1.0, abs(effect)), f"paths through {l}.{j} at {k}"


def test_removing_features_one_by_one_equals_editing_by_hand(folder):
    model = models.load_model(folder, dtype=torch.float64)
    run = A.trace_prompt(model, random_saes(model), PROMPT)
    layer = max(run.saes)
    position, i = active_nodes(run, layer)[-1]
    rows = (run.components.kind == A.FEATURE) & (run.components.layer < layer)
    chosen = rows.nonzero()[:, 0][::3]
    found = A.ablation_effects(run, chosen, A.Place("feature", layer, position, i))
    for n, part in enumerate(chosen.tolist()):
        _, l, k, j, _ = run.components.place(part)

        def without(z):
            z = z.clone()
            z[0, k] -= run.f[l][k, j] * run.saes[l].W_dec[j]
            return z

        _, cache = model(PROMPT[None], edit_z={l: without}, keep=(layer,))
        sae = run.saes[layer]
        pre = (cache[layer].z_cat[0, position] - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]
        fell = A.read_terms(run, A.Place("feature", layer, position, i)).pre - float(pre)
        assert abs(fell - float(found[n])) < 1e-10


# ---- a circuit whose answer is known ----


@pytest.fixture
def induction():
    """Two layers that do induction, written by hand, and SAEs whose features are named.

    The stream is [token | position | token before | token copied], 12 numbers each. Head 0.0 looks
    one position back and writes the token it finds there to *token before*. Head 1.1 looks where
    *token before* is the current token, and copies that position's token and token before. The
    other heads look at the first position and copy nothing.
    """
    V = 12
    torch.manual_seed(0)
    model = models.GPT2(models.GPT2Config(2, 2, 4 * V, 8, V, V)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    token, place, before, copied = (slice(n * V, (n + 1) * V) for n in range(4))
    model.wte.weight[:, token] = torch.eye(V)
    model.wpe.weight[:, place] = torch.eye(V)
    for block in model.h:
        block.ln_1.weight.fill_(1), block.ln_2.weight.fill_(1)
    model.ln_f.weight.fill_(1)
    d_head, eye = 2 * V, torch.eye(V)
    columns = lambda which, head, half: slice(which * 4 * V + head * d_head + half * V,
                                              which * 4 * V + head * d_head + (half + 1) * V)
    first, second = model.h[0].attn, model.h[1].attn
    first.c_attn.weight[place, columns(0, 0, 0)] = 20 * eye                     # query: my position
    # key: the position after mine
    first.c_attn.weight[place, columns(1, 0, 0)] = 20 * torch.roll(eye, 1, 1)
    first.c_attn.weight[token, columns(2, 0, 0)] = eye
    first.c_proj.weight[0:V, before] = eye
    second.c_attn.weight[token, columns(0, 1, 0)] = 20 * eye                    # query: my token
    # key: the token before mine
    second.c_attn.weight[before, columns(1, 1, 0)] = 20 * eye
    second.c_attn.weight[token, columns(2, 1, 0)] = eye
    second.c_attn.weight[before, columns(2, 1, 1)] = eye
    second.c_proj.weight[d_head:d_head + V, copied] = eye
    saes = {layer: S.SAE(4 * V, 2 * V).requires_grad_(False) for layer in (0, 1)}
    # feature i: token i in a head's first V numbers; V + i: in the others
    for layer, sae in saes.items():
        start = layer * d_head
        sae.W_enc.zero_(), sae.W_dec.zero_()
        sae.W_enc[start:start + d_head] = torch.eye(2 * V)
        sae.W_dec[:, start:start + d_head] = torch.eye(2 * V)
        sae.b_enc.fill_(-0.5)
    return model, saes, V


def test_the_hand_wired_induction_circuit_is_found(induction):
    model, saes, V = induction
    # ... 1 2 ... 1: next is 2, whose place is 2
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 1])
    run = A.trace_prompt(model, saes, tokens)
    assert int(run.f[0][2].argmax()) == 1, "head 0.0 should find the token before"
    assert int(run.f[1][6].argmax()) in (2, V + 1)
    assert float(run.cache[1].pattern[0, 1, 6, 2]) > 0.95

    per_source = D.dfa(run.cache[1].pattern, run.cache[1].v, saes[1].W_enc[:, 2])[0, :, 6]
    assert divmod(int(per_source.argmax()), 7) == (1, 2), \
        "DFA: head 1.1, from where the token 2 stands"
    assert D.head_weights(saes[1].W_dec, 2)[2].tolist() == [0.0, 1.0]

    next_token = A.trace(run, A.Place("feature", 1, 6, 2))
    top = next_token.children[0]
    assert (top.place.kind, top.place.position, top.head) == ("embedding", 2, 1), \
        "what was copied is the token at 2"

    what_was_before = A.trace(run, A.Place("feature", 1, 6, V + 1))
    top = what_was_before.children[0]
    assert (top.place, top.head) == (A.Place("feature", 0, 2, 1), 1), \
        "the previous-token head's feature at the source"
    below = top.children[0]
    assert (below.place.kind, below.place.position, below.head) == ("embedding", 1, 0), \
        "which read the token at 1"

    why = A.qk(run, 1, 1, 6, 2, "others")
    a, b = divmod(int(why.pairs.argmax()), len(why.key))
    assert why.query[a] == A.Place("embedding", -1, -1), "the token here is 1"
    assert why.key[b] == A.Place("feature", 0, -1, 1), \
        "it looks at 2 as the token here is 1 and the feature there says that 1 came before"
    assert float(why.pairs[a, b]) > 0.5 * why.score


# ---- measures ----


def test_head_weights_are_shares():
    W_dec = torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
    assert torch.allclose(D.head_weights(W_dec, 2), torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))


def test_scores_that_are_not_there_are_named(tiny):
    run = A.trace_prompt(tiny, {}, PROMPT)
    for arguments, words in [((9, 0, 5, 2), "layer 9"), ((0, 9, 5, 2), "head 0.9"),
                             ((0, -1, 5, 2), "head 0.-1"),
                             ((0, 0, 2, 5), "query 2 cannot attend to key 5; it sees keys 0 to 2"),
                             ((0, 0, 5, 2, 6), "query 5 cannot attend to key 6"),
                             ((0, 0, -1, 0), "query -1"), ((0, 0, 99, 2), "query 99"),
                             ((0, 0, 5, -1), "key -1"), ((0, 0, 5, 2, 2), "against itself")]:
        with pytest.raises(UserError, match=re.escape(words)):
            A.qk(run, *arguments)


def test_a_feature_that_is_not_active_is_taken_apart_too(traced):
    run, exact = traced
    layer = max(run.saes)
    position, i = (run.f[layer][1:] == 0).nonzero()[0].tolist()
    root = A.trace(run, A.Place("feature", layer, position + 1, i), share=0, depth=1, breadth=None)
    total = sum(child.value for child in root.children)
    assert abs(total - root.value) < exact * max(1, abs(root.value))
    # now exactly at 0, or a rounding from it
    run.saes[layer].b_enc[i] -= root.value
    root = A.trace(run, A.Place("feature", layer, position + 1, i))
    assert abs(root.value) < 1e-3
    assert all(abs(x) < float("inf") for x in (root.unexplained, root.pruned))


def test_a_model_of_another_type_than_its_saes_is_named(folder):
    model = models.load_model(folder, dtype=torch.bfloat16)
    saes = {layer: sae.float() for layer, sae in random_saes(model).items()}
    with pytest.raises(UserError, match="bfloat16 and torch.float32"):
        A.trace_prompt(model, saes, PROMPT)
    saes = {layer: sae.bfloat16() for layer, sae in saes.items()}
    with pytest.raises(UserError, match="takes float32 or float64"):
        A.trace_prompt(model, saes, PROMPT)


# ---- the program ----


def test_the_program_prints_tables_and_writes_a_page_that_is_safe(tmp_path):
    # layer 1 has no pages, only numbers; those of layer 3 are of another SAE
    for layer, digest_of, pages in ((1, 1, ()), (2, 2, ("0.js",)), (3, 2, ("0.js",))):
        of_layer = tmp_path / "tiny" / "features" / f"L{layer}"
        of_layer.mkdir(parents=True)
        sae = digest(S.SAE.load(ROOT / "data" / "tiny" / f"L{digest_of}"))
        (of_layer / "features.json").write_text(json.dumps({"sae": sae}))
        for page in pages:
            (of_layer / page).touch()
    done = program("explorer", "A <script>alert('x')</script> & </script> cat", "--out",
                   tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("sources by DFA", "recursive DFA", "share of decoder", "why head"):
        assert words in done.stdout
    page = (tmp_path / "tiny" / "explorer" / "explorer.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2, "a token was not escaped"
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page), \
        "it loads something from elsewhere"
    found = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert found["dashboards"] == {"feature": [2], "MLP feature": []}, \
        "a link to dashboards that are not there, or none to those that are"
    assert "<script" in "".join(found["tokens"])
    for node in found["nodes"].values():
        total = sum(child["value"] for child in node["children"]) + node["pruned"]
        assert total == pytest.approx(node["pre"], abs=2e-3 * max(1, abs(node["pre"])))
        for child in node["children"]:
            assert child["name"] is None or child["name"] in found["nodes"], \
                "a child cannot be opened"
            assert child["edge"] is None or child["edge"] in found["qk"]


@pytest.mark.parametrize("arguments, words", [
    ([""], "prompt is empty"),
    (["hello", "--layer", "9"], "layer 9 is out of range"),
    (["hello there", "--position", "99"], "position 99"),
    (["hello there", "--feature", "3.99999"], "feature 99999"),
    (["hello there", "--feature", "9.1"], "layer 9 is out of range"),
    (["word " * 200], "tokens does not fit"),
    (["hello", "--saes", "nowhere"], "--saes nowhere"),
    (["hello", "--model", "nobody"], "--model nobody"),
    (["hello", "--position", "x"], "--position takes"),
    (["hello", "--position", "0"], "position 0"),
    (["hello", "--layer", "-7"], "layer -7 is out of range"),
    (["hello", "--position", "-5"], "position -5"),
    (["hello", "--feature", "-9"], "layer.feature"),
    (["hello", "--feature", "mlp.9.1"], "layer 9 is out of range"),
    (["hello", "--feature", "mlp."], "--feature mlp. names no feature"),
    (["hello", "--against", "a"], "--against is for --logit"),
    (["hello", "--logit", "a", "--feature", "3.1"], "two things at once"),
    (["hello", "--logit", " two words"], "--logit ' two words' is 3 tokens"),
    (["hello", "--logit", "a", "--against", "a"], "less itself is 0"),
], ids=str)
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, words):
    done = program("explorer", *arguments, "--out", tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_layer_without_an_sae_is_named(tiny):
    saes = {0: S.SAE.load(ROOT / "data" / "tiny" / "L0")}
    with pytest.raises(UserError, match="layer 1 has no SAE; there are SAEs for layers 0"):
        A.trace(A.trace_prompt(tiny, saes, torch.arange(5)), A.Place("feature", 1, 3, 0))
