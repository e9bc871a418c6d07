"""model.py against transformers, and the seam at z_cat against what it promises."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as models
import sae as S
from direct import token_effects
from conftest import GEMMA_SHAPES, GPT2_SHAPES, ROOT, SHAPES, random_gemma, random_gpt2
from data.errors import UserError
from data.tokens import set_n_tokens
from data.weights import TINY


def random_tokens(model, B=3, seed=0):
    return torch.randint(model.config.d_vocab, (B, model.config.n_ctx),
                         generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_parity_with_transformers(ours, theirs, tokens):
    z, gemma = {}, isinstance(ours, models.Gemma)
    outs = ([block.self_attn.o_proj for block in theirs.model.layers] if gemma
            else [block.attn.c_proj for block in theirs.transformer.h])
    hooks = [out.register_forward_pre_hook(lambda m, args, layer=layer: z.update({layer: args[0]}))
             for layer, out in enumerate(outs)]
    reference = theirs(tokens, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    logits, cache = ours(tokens, keep=range(ours.config.n_layers))
    assert (logits - reference.logits).abs().max() < 1e-4, \
        "logits differ: is the GELU the tanh form, and eps the config's?"
    assert torch.allclose(ours(tokens)[0], logits,
                          atol=1e-4), "fused attention and explicit pattern give different logits"
    for layer, kept in cache.items():
        assert torch.allclose(kept.resid_pre, reference.hidden_states[layer], atol=1e-4), \
            f"the residual stream before layer {layer}: embedding, norms, MLP?"
        assert (kept.pattern - reference.attentions[layer]).abs().max() < 1e-5, \
            f"pattern of layer {layer}: mask, window, scale, soft cap?"
        assert (kept.z_cat - z[layer]).abs().max() < 1e-5 * max(1, z[layer].abs().max()), \
            f"z_cat of layer {layer}: are heads side by side?"


def test_parity_with_transformers_on_random_configurations(pair):
    assert_parity_with_transformers(*pair, random_tokens(pair[0]))


def test_parity_with_transformers_on_tiny(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(TINY, attn_implementation="eager",
                                                          dtype=torch.float32).eval()
    assert_parity_with_transformers(tiny, theirs, random_tokens(tiny))


def test_z_cat_at_is_the_cached_z_cat(pair):
    ours, _ = pair
    tokens = random_tokens(ours)
    _, cache = ours(tokens, keep=range(ours.config.n_layers))
    for layers in ([0], [ours.config.n_layers - 1], list(cache)):
        found = ours.z_cat_at(tokens, layers)
        assert found.keys() == set(layers)
        for layer in layers:
            assert torch.allclose(found[layer], cache[layer].z_cat,
                                  atol=1e-5), f"z_cat_at differs from the full run at layer {layer}"


def test_cached_parts_add_up_to_the_next_layer(pair):
    ours, _ = pair
    _, cache = ours(random_tokens(ours), keep=range(ours.config.n_layers))
    for layer in range(ours.config.n_layers - 1):
        one = cache[layer]
        assert torch.allclose(one.resid_post, cache[layer + 1].resid_pre,
                              atol=1e-5)
        z = torch.einsum("bhqk,bkhd->bqhd", one.pattern, one.v).flatten(-2)
        assert torch.allclose(z, one.z_cat, atol=1e-5), "z_cat is not pattern @ v"


def test_the_way_can_be_gone_in_pieces(pair):
    model, _ = pair
    tokens, n = random_tokens(model), model.config.n_layers
    edit = {n - 1: lambda z: 2 * z}
    logits, cache = model(tokens, edit, keep=range(n))
    x, _ = model.run_layers(model.embed(tokens), keep=range(n - 1), layers=range(n - 1))
    assert torch.equal(x, cache[n - 1].resid_pre)
    x, kept = model.run_layers(x, edit, keep=(n - 1,), layers=(n - 1,))
    assert torch.equal(kept[n - 1].z_cat, cache[n - 1].z_cat)
    assert torch.equal(model.unembed(x), logits)


def test_logit_directions_give_every_logit_less_the_mean(pair):
    model, _ = pair
    model, cap = copy.deepcopy(model).double(), getattr(model.config, "logit_softcap", None)
    tokens = random_tokens(model)
    x, _ = model.run_layers(model.embed(tokens))
    logits = model.unembed(x)
    logits = cap * torch.atanh(logits / cap) if cap else logits         # before the soft cap
    found = x / model.final_scale(x) @ model.logit_directions(torch.arange(model.config.d_vocab)).T
    constant = 0
    if hasattr(model, "ln_f"):
        constant = model.ln_f.bias @ (model.wte.weight - model.wte.weight.mean(0)).T
    torch.testing.assert_close(found + constant, logits - logits.mean(-1, keepdim=True), rtol=1e-9,
                               atol=1e-9)


def test_logits_of_some_tokens_are_those_of_all(pair):
    model = copy.deepcopy(pair[0]).double()
    tokens = random_tokens(model)
    x, _ = model.run_layers(model.embed(tokens))
    some = torch.stack([tokens, tokens.flip(1), tokens * 0], -1)
    torch.testing.assert_close(model.unembed(x, some), model.unembed(x).gather(-1, some),
                               rtol=1e-12, atol=1e-12)


# ---- a run from which another goes on ----


def at_starts(start, T, S):                                             # (B,) -> (B,S)
    """S positions of each row from its own start on; beyond the end, the last again."""
    return (start[:, None] + torch.arange(S)).clamp(max=T - 1)


def test_a_span_ends_at_the_end():
    start, end = torch.tensor([3, 5, 9]), torch.tensor([6, 9, 9])
    assert models.span(start, end).tolist() == [[3, 4, 5, 6, 6], [5, 6, 7, 8, 9], [9] * 5]
    assert models.span(start[:0], end[:0]).shape == (0, 1), "of no rows"


def random_rerun(model, B=5, T=20):
    """Rows of a run, some of them twice, each with a start of its own."""
    g = torch.Generator().manual_seed(3)
    run = model.run(torch.randint(0, model.config.d_vocab, (B, T), generator=g))
    rows = torch.tensor([4, 0, 0, 2, 1, 3, 4])
    start = torch.tensor([1, 5, 12, 7, 19, 2, 9])
    return run, rows, start, at_starts(start, T, T - 1), g


def test_a_run_is_what_the_model_computes(pair):
    model = copy.deepcopy(pair[0]).double()
    run, *_ = random_rerun(model)
    _, cache = model(run.tokens, keep=range(model.config.n_layers))
    for layer, kept in cache.items():
        sharing = model.config.n_heads // model.config.n_kv_heads
        torch.testing.assert_close(run.k[layer].repeat_interleave(sharing, 2), kept.k)
        torch.testing.assert_close(run.v[layer].repeat_interleave(sharing, 2), kept.v)
        torch.testing.assert_close(run.z_cat[layer], kept.z_cat)
        torch.testing.assert_close(run.resid_pre[layer], kept.resid_pre)
    torch.testing.assert_close(run.final, kept.resid_post)


def test_a_rerun_of_a_run_with_edits_keeps_them(pair):
    """An edit of an early position, in the run; another of a later one, when it goes on."""
    model = copy.deepcopy(pair[0]).double()
    run, *_ = random_rerun(model)
    last = model.config.n_layers - 1

    def early(z):
        return torch.cat([z[:, :3], -z[:, 3:4], z[:, 4:]], 1)

    def late(z):
        return torch.cat([z[:, :15], 2 * z[:, 15:16], z[:, 16:]], 1)

    rows = torch.arange(len(run.tokens))
    edited = model.run(run.tokens, {0: early})
    assert not torch.equal(edited.final, run.final)
    positions = torch.arange(15, 20).expand(len(rows), -1)
    found = model.rerun(edited, rows, positions, {last: late})
    whole = model.run(run.tokens, {0: early, last: late} if last else {0: lambda z: late(early(z))})
    torch.testing.assert_close(found, whole.final[:, 15:], rtol=1e-10, atol=1e-10)


def test_a_rerun_with_edits_equals_the_whole_run(pair):
    """Rows of unequal starts, edits in two layers, one of which sees what the other led to."""
    model = copy.deepcopy(pair[0]).double()
    run, rows, start, positions, g = random_rerun(model)
    row, last = torch.arange(len(rows)), model.config.n_layers - 1
    value = torch.randn(len(rows), model.config.d_z_cat, generator=g, dtype=torch.float64)

    def put(z):
        z = z.clone()
        z[row, start] = value
        return z

    def double(z):
        z = z.clone()
        z[row, start] *= 2
        z[row, (start + 2).clamp(max=19)] -= z[row, start]
        return z

    edits = {last - 1: put, last: double}
    whole, cache = model.run_layers(model.embed(run.tokens[rows]), edits, keep=(last,))
    ours = model.rerun(run, rows, positions, edits)
    kept = dict(model.rerun_caches(run, rows, positions, edits))
    assert list(kept) == [last - 1, last], "from the first layer that differs"
    torch.testing.assert_close(ours, whole[row[:, None], positions], rtol=1e-10, atol=1e-10)
    assert (ours - run.final[rows[:, None], positions]).abs().max() > 1e-3, "the edits do something"
    for name in ("resid_pre", "q", "z_cat", "attn_out", "mlp_out"):
        expected = getattr(cache[last], name)[row[:, None], positions]
        torch.testing.assert_close(getattr(kept[last], name), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kept[last].pattern.transpose(1, 2),
                               cache[last].pattern.transpose(1, 2)[row[:, None], positions],
                               rtol=1e-10, atol=1e-10)
    for name, of_whole in cache[last].scales.items():
        torch.testing.assert_close(kept[last].scales[name], of_whole[row[:, None], positions],
                                   rtol=1e-10, atol=1e-10)


def test_a_rerun_with_other_tokens_equals_the_whole_run(pair):
    model = copy.deepcopy(pair[0]).double()
    run, rows, start, positions, g = random_rerun(model)
    row = torch.arange(len(rows))
    tokens = run.tokens[rows].clone()
    tokens[row, start] = (tokens[row, start] + 1) % model.config.d_vocab
    tokens[row, (start + 3).clamp(max=19)] = 5
    whole, _ = model.run_layers(model.embed(tokens))
    ours = model.rerun(run, rows, positions, tokens=tokens)
    torch.testing.assert_close(ours, whole[row[:, None], positions], rtol=1e-10, atol=1e-10)


def test_a_rerun_of_no_rows_is_empty(pair):
    model = pair[0]
    run, *_ = random_rerun(model)
    none = torch.zeros(0, dtype=torch.long)
    ours = model.rerun(run, none, models.span(none, none), {0: lambda z: 2 * z})
    assert ours.shape == (0, 1, model.config.d_model)


def test_a_rerun_of_one_position_is_what_a_patch_there_does(pair):
    model = copy.deepcopy(pair[0]).double()
    run, rows, start, _, g = random_rerun(model)
    row = torch.arange(len(rows))
    edit = {0: lambda z: z.index_put((row, start), z[row, start] * 3)}
    whole, _ = model.run_layers(model.embed(run.tokens[rows]), edit)
    ours = model.rerun(run, rows, start[:, None], edit)
    torch.testing.assert_close(ours[:, 0], whole[row, start], rtol=1e-10, atol=1e-10)


# ---- edits ----


def test_greedy_text_is_what_transformers_generates(pair):
    ours, theirs = pair
    tokens = random_tokens(ours)[:, :5]
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(tokens, 6), expected)
    assert torch.equal(ours.generate(tokens, 0), tokens)


def test_sampled_text_follows_the_temperature(tiny):
    """Each token is one draw from softmax(logits / temperature), and a row of padding is none."""
    tokens = random_tokens(tiny)[:, :4]
    found = tiny.generate(tokens, 3, 0.7, torch.Generator().manual_seed(5))
    random = torch.Generator().manual_seed(5)
    expected = tokens
    for _ in range(3):
        logits, _ = tiny(expected)
        p = (logits[:, -1] / 0.7).softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=random)], 1)
    assert torch.equal(found, expected)
    assert torch.equal(tiny.generate(tokens, 3, 1e-6, torch.Generator().manual_seed(5)),
                       tiny.generate(tokens, 3)), "cold, it is the most likely token"
    n_tokens = tiny.n_tokens
    try:
        tiny.n_tokens = 50
        assert int(tiny.generate(tokens, 5, 3.0)[:, 4:].max()) < 50
    finally:
        tiny.n_tokens = n_tokens
    with pytest.raises(UserError, match="128"):
        tiny.generate(tokens, 125)


def test_edits_see_the_text_as_it_grows(tiny):
    """A feature clamped at every position: token by token what the whole row with this edit
    predicts; BOS stays."""
    sae = S.SAE.load(TINY / "L3")
    tokens = random_tokens(tiny)[:2, :4]
    lengths = []
    steer = S.clamp(sae, 7, 40.0)

    def edit(z):
        lengths.append(z.shape[1])
        return steer(z)

    found = tiny.generate(tokens, 4, edit_z={3: edit})
    assert lengths == [4, 5, 6, 7]
    logits, _ = tiny(found, edit_z={3: steer})
    assert torch.equal(logits[:, 3:-1].argmax(-1), found[:, 4:])
    assert not torch.equal(found, tiny.generate(tokens, 4)), "this clamp should change the text"
    twice = tiny.generate(tokens, 4, edit_mlp={2: lambda mlp_in, mlp_out: 0 * mlp_out})
    assert not torch.equal(twice, tiny.generate(tokens, 4))


def test_identity_edit_changes_nothing_bit_for_bit(pair):
    ours, _ = pair
    tokens = random_tokens(ours)
    edits = {layer: lambda z: z for layer in range(ours.config.n_layers)}
    assert torch.equal(ours(tokens)[0], ours(tokens, edit_z=edits)[0])


def test_edit_leaves_earlier_layers_bit_equal_and_later_edits_see_it(pair):
    ours, _ = pair
    tokens, last = random_tokens(ours), ours.config.n_layers - 1
    everything = range(ours.config.n_layers)
    _, before = ours(tokens, keep=everything)
    seen = []
    _, after = ours(tokens, edit_z={last - 1: lambda z: 2 * z, last: lambda z: seen.append(z) or z},
                    keep=everything)
    for layer in range(last - 1):
        assert all(torch.equal(a, b) for a,
                   b in zip(before[layer][:8], after[layer][:8])), \
            f"an edit reached back to layer {layer}"
    assert torch.equal(after[last - 1].pattern, before[last - 1].pattern)
    assert torch.equal(after[last - 1].z_cat, 2 * before[last - 1].z_cat)
    assert not torch.allclose(seen[0], before[last].z_cat), \
        "the later edit did not see what the earlier one led to"


def test_zeroing_a_slice_of_z_cat_removes_that_head(pair):
    ours, theirs = pair
    tokens, d_head = random_tokens(ours), ours.config.d_head
    layer, head = ours.config.n_layers - 1, ours.config.n_heads - 1
    mine = slice(head * d_head, (head + 1) * d_head)

    def zero_head(z):
        z = z.clone()
        z[..., mine] = 0
        return z

    projection = (theirs.model.layers[layer].self_attn.o_proj.weight.T if isinstance(
        ours, models.Gemma) else theirs.transformer.h[layer].attn.c_proj.weight)
    kept = projection.detach().clone()
    with torch.no_grad():
        # rows of W_O that read the head
        projection[mine] = 0
        reference = theirs(tokens).logits
        projection.copy_(kept)
    assert (ours(tokens, edit_z={layer: zero_head})[0]
            - reference).abs().max() < 1e-4, "the heads' slices of z_cat are in another order"


def test_head_matrices_give_q_k_v_and_attn_out(pair):
    """Per head, from resid_pre to attn_out with nothing but the matrices, the scales and the
    pattern."""
    ours, _ = pair
    _, cache = ours(random_tokens(ours), keep=range(ours.config.n_layers))
    for layer, one in cache.items():
        n, m = one.resid_pre / one.scales["attn_in"], ours.head_matrices(layer)
        for name, W, b in (("q", m.W_Q, m.b_Q), ("k", m.W_K, m.b_K), ("v", m.W_V, m.b_V)):
            rebuilt = (torch.einsum("btm,hmd->bthd", n, W) + b) / one.scales.get(name, 1)
            if name != "v":
                rebuilt = ours.rotate(rebuilt, layer)
            assert torch.allclose(rebuilt, getattr(one, name), atol=1e-4), \
                f"{name} of layer {layer}: is the norm's gain, bias or centring missing?"
        z = one.z_cat.unflatten(-1, (ours.config.n_heads, -1))
        attn_out = (torch.einsum("bthd,hdm->btm", z, m.W_O) + m.b_O) / one.scales.get("attn_out", 1)
        assert torch.allclose(attn_out, one.attn_out, atol=1e-4), \
            "W_O: is the post-norm's gain missing?"


def test_the_cached_q_and_k_give_the_pattern(pair):
    ours, _ = pair
    _, cache = ours(random_tokens(ours), keep=range(ours.config.n_layers))
    cap, windows = getattr(ours.config, "score_softcap",
                           None), getattr(ours.config, "windows", None)
    for layer, one in cache.items():
        T = one.q.shape[1]
        for q in (0, 5, T - 1):
            first = max(0, q - windows[layer] + 1) if windows and windows[layer] else 0
            scores = torch.einsum("bhd,bkhd->bhk", one.q[:, q], one.k[:, first:q + 1])
            scores = ours.config.score_scale * scores
            scores = cap * torch.tanh(scores / cap) if cap else scores
            assert torch.allclose(one.pattern[:, :, q, first:q + 1], scores.softmax(-1), atol=1e-5)
            assert one.pattern[:, :, q, q + 1:].sum() == 0 == one.pattern[:, :, q, :first].sum(), \
                "a query may not see later keys, nor those before its window"


def test_value_bias_is_z_of_a_stream_without_direction(pair):
    ours, _ = pair
    # a constant vector is 0 after LayerNorm's centring; RMSNorm has none, so there the stream
    # itself is 0
    constant = 0.0 if isinstance(ours, models.Gemma) else 7.0
    nothing = ours.blocks[0].heads(torch.full((1, 5, ours.config.d_model), constant)).z_cat
    assert torch.allclose(nothing, ours.value_bias(0).expand_as(nothing), atol=1e-5)


# ---- loading ----


@pytest.fixture
def saved(tmp_path):
    random_gpt2(tmp_path, **GPT2_SHAPES["small"])
    return tmp_path


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_the_original_layout_without_prefix_and_with_masks_loads_the_same(saved):
    tokens = torch.arange(20)[None]
    before = models.load_model(saved)(tokens)[0]

    def as_first_released(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    change_weights(saved, as_first_released)
    assert torch.equal(models.load_model(saved)(tokens)[0], before)


@pytest.mark.parametrize("shape", ["GPT-2 small", "Gemma 2"])
@pytest.mark.parametrize("kept", ["as lm_head alone", "as both, lm_head first"])
def test_the_tied_pair_is_read_under_either_name(tmp_path, shape, kept):
    write, sizes = SHAPES[shape]
    write(tmp_path, **sizes)
    tokens = torch.arange(3, 20)[None]
    before = models.load_model(tmp_path)(tokens)[0]

    def rename(tensors):
        name = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
        tensors["lm_head.weight"] = tensors[name]
        if kept == "as lm_head alone":
            del tensors[name]
        else:
            tensors["lm_head.weight"] = 0 * tensors[name]   # the embedding is what counts

    change_weights(tmp_path, rename)
    assert torch.equal(models.load_model(tmp_path)(tokens)[0], before)


@pytest.mark.parametrize("shape", ["GPT-2 small", "Gemma 2"])
def test_rows_of_a_padded_embedding_are_no_tokens(tmp_path, shape):
    """What a token does to the logits is compared with the mean over tokens alone."""
    write, sizes = SHAPES[shape]
    write(tmp_path, **sizes)
    plain = models.load_model(tmp_path)
    n = plain.config.d_vocab

    def pad(tensors):
        name = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
        tensors[name] = torch.cat([tensors[name], 3 + tensors[name][:27]])

    change_weights(tmp_path, pad)
    change_config(tmp_path, vocab_size=n + 27)
    padded = models.load_model(tmp_path)
    assert padded.n_tokens == n + 27, "as far as the model knows"
    set_n_tokens(padded, SimpleNamespace(n_vocab=n), tmp_path)
    tokens = torch.arange(n)
    assert torch.equal(padded.logit_directions(tokens), plain.logit_directions(tokens))
    sae = S.SAE(plain.config.d_z_cat, 8)
    effects = token_effects(padded, 0, sae, torch.arange(8))
    assert torch.equal(effects, token_effects(plain, 0, sae, torch.arange(8)))
    assert effects.shape == (8, n)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("transformer.h.1.ln_1.bias"), ["missing", "h.1.ln_1.bias"]),
    (lambda t: t.update({"transformer.h.7.ln_1.bias": torch.zeros(32)}),
     ["h.7.ln_1.bias", "not part"]),
    (lambda t: t.update({"transformer.wpe.weight": torch.zeros(39, 32)}),
     ["wpe.weight", "(39, 32)", "(40, 32)"]),
], ids=["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named(saved, change, words):
    change_weights(saved, change)
    with pytest.raises(UserError) as error:
        models.load_model(saved)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_truncated_weights_are_named(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (saved / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match="model.safetensors"):
            models.load_model(saved)


def test_missing_weights_and_missing_model_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        models.load_model(saved)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="--model"):
        models.load_model(saved)


@pytest.mark.parametrize(
    "values", [{"activation_function": "relu"}, {"model_type": "llama"}, {"n_embd": 33},
               {"n_layer": "3"}, {"scale_attn_by_inverse_layer_idx": True}, {"n_head": 0}], ids=str)
def test_options_that_are_not_implemented_are_refused_by_name(saved, values):
    change_config(saved, **values)
    with pytest.raises(UserError, match=next(iter(values))):
        models.load_model(saved)


def test_config_files_of_earlier_years_load_the_same(tmp_path):
    """What transformers writes today under rope_parameters and layer_types stood elsewhere, or was
    understood."""
    tokens = torch.arange(30)[None]
    for name, changes in {
            "1, one key for all": {
                "rope_theta": 10000.0, "hidden_act": "gelu", "hidden_activation": None
            }, "2": {"rope_theta": 10000.0},
            "3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    }.items():
        folder = tmp_path / name
        random_gemma(folder, **GEMMA_SHAPES[name])
        before = models.load_model(folder)(tokens)[0]
        config = json.loads((folder / "config.json").read_text())
        for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert torch.equal(models.load_model(folder)(tokens)[0], before), f"Gemma {name}"


@pytest.mark.parametrize("values", [
    {"attention_bias": True}, {"hidden_act": "relu"}, {"head_dim": 15}, {"num_key_value_heads": 3},
    {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}},
    {"rope_parameters": [1]}, {"layer_types": ["full_attention"]}, {"query_pre_attn_scalar": 0},
    {"sliding_window": "7"}, {"query_pre_attn_scalar": -1},
    {"rms_norm_eps": None, "use_bidirectional_attention": True}], ids=str)
def test_options_of_gemma_that_are_not_implemented_are_refused_by_name(tmp_path, values):
    random_gemma(tmp_path, **GEMMA_SHAPES["2"])
    change_config(tmp_path, **values)
    with pytest.raises(UserError, match="config.json: .*" + re.escape(
            {"rope_parameters": "rope_"}.get(next(iter(values)), list(values)[-1]))):
        models.load_model(tmp_path)


@pytest.mark.parametrize("name", ["2", "3"])
def test_sharded_weights_load_the_same_and_a_missing_shard_is_named(tmp_path, name):
    theirs = random_gemma(tmp_path / "whole", **GEMMA_SHAPES[name])
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    tokens = torch.arange(30)[None]
    in_shards, whole = (models.load_model(tmp_path / kind)(tokens)[0]
                        for kind in ("shards", "whole"))
    assert torch.equal(in_shards, whole)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        models.load_model(tmp_path / "shards")
    for damaged in ("{}", '{"weight_map": {"a": "../../x.safetensors"}}', '{"weight_map": 3}'):
        (tmp_path / "shards" / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(UserError, match="index.json"):
            models.load_model(tmp_path / "shards")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_loaded_in_the_type_asked_for(pair, tmp_path, dtype):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    other, tokens = models.load_model(tmp_path, dtype=dtype), random_tokens(ours)
    assert {p.dtype for p in other.parameters()} == {dtype}
    logits, cache = other(tokens, keep=range(ours.config.n_layers))
    assert logits.dtype == dtype == cache[0].pattern.dtype == cache[0].z_cat.dtype
    tolerance = {torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    reference = ours(tokens)[0]
    assert (logits.float() - reference).norm() < tolerance * reference.norm()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK),
                    reason="Linux tells peak memory")
def test_loading_takes_no_more_memory_than_the_model_and_its_largest_tensor(tmp_path):
    """Measured in a process of its own, on 200 MB of Gemma in bfloat16 shards that become
    float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("gemma2", hidden_size=512, intermediate_size=2048,
                                               num_hidden_layers=8, num_attention_heads=8,
                                               num_key_value_heads=4, head_dim=64,
                                               vocab_size=30_000, max_position_embeddings=128)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="40MB")
    size = sum(p.numel() * 4 for p in theirs.parameters())
    largest = max(p.numel() * 4 for p in theirs.parameters())
    script = """
import sys, model
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10       # bytes
model.load_model("tiny")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")     # forget the peak of the imports
before = peak()
loaded = model.load_model(sys.argv[1])
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size + largest, \
        f"{int(done.stdout) >> 20} MiB for a model of {size >> 20} with a tensor of {largest >> 20}"


def test_a_damaged_file_leaves_a_loaded_model_as_it_is(tmp_path):
    """Weights are copied, not mapped: what happens to the file later is no matter."""
    random_gpt2(tmp_path, **GPT2_SHAPES["small"])
    ours, tokens = models.load_model(tmp_path), torch.arange(20)[None]
    before = ours(tokens)[0]
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    assert torch.equal(ours(tokens)[0], before)


def test_prompt_and_layer_out_of_range(tiny):
    too_long = tiny.config.n_ctx + 1
    for T, message in ((0, "the prompt is empty"), (too_long, f"a prompt of {too_long} tokens")):
        with pytest.raises(UserError, match=message):
            tiny(torch.zeros(1, T, dtype=torch.int64))
    for call in (lambda t: tiny(t, keep=(99,)), lambda t: tiny(t, edit_z={-1: None}),
                 lambda t: tiny.z_cat_at(t, [99])):
        with pytest.raises(UserError, match="out of range"):
            call(torch.zeros(1, 3, dtype=torch.int64))
