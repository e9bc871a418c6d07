"""data/sae_files.py: published formats against brute-force formulas and against sae-lens itself."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model as models
import sae as S
from conftest import GEMMA_SHAPES, GPT2_SHAPES, ROOT, random_gemma, random_gpt2
from data.errors import UserError
from data.sae_files import ABOUT, read_sae, sae_paths, write_saelens
from data.weights import TINY, digest

D_IN, D_SAE = 32, 70


def random_tensors(seed=0, d_in=D_IN, d_sae=D_SAE):
    """Weights as a trainer would leave them: decoder rows not of unit norm, thresholds of both
    signs."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    return {
        "W_enc": normal(d_in, d_sae) / 4, "b_enc": normal(d_sae) / 4, "W_dec": normal(d_sae, d_in),
        "b_dec": normal(d_in) / 2, "threshold": normal(d_sae) / 2
    }


def random_z(n=50, d_in=D_IN):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(9))


def by_hand(t, z, subtract, scale=1.0):
    """Features and reconstructions one number at a time, in float64, from the format's own
    definition."""
    t = {name: tensor.double().numpy() for name, tensor in t.items()}
    threshold = t.get("threshold", np.zeros(D_SAE))
    f = np.zeros((len(z), D_SAE))
    for n, row in enumerate(z.double().numpy() * scale):
        for i in range(D_SAE):
            pre = t["b_enc"][i]
            pre += sum((row[d] - subtract * t["b_dec"][d]) * t["W_enc"][d, i] for d in range(D_IN))
            f[n, i] = max(pre, 0.0) if pre > threshold[i] else 0.0
    z_hat = f @ t["W_dec"] + t["b_dec"]
    return torch.from_numpy(f), torch.from_numpy(z_hat / scale)


def assert_equal(sae, f, z_hat, z, message, scale=1.0):
    assert (sae.encode(z) * scale - f).abs().max() < 1e-6 * max(10, f.max()), message
    assert (sae(z) - z_hat).abs().max() < 1e-4 * max(1, z_hat.abs().max()), message
    assert (f > 0).float().mean() > 0.1, "this test should have active features"


def write_kissane(folder, tensors, layer=1, **config):
    path = folder / f"gpt2-small_L{layer}_Hcat_z_v9.pt"
    torch.save({name: one for name, one in tensors.items() if name != "threshold"}, path)
    d_sae, d_in = tensors["W_dec"].shape
    cfg = {
        "act_size": d_in, "dict_size": d_sae, "act_name": f"blocks.{layer}.attn.hook_z",
        "l1_coeff": 0.8, "layer": layer, "seq_len": 128, "enc_dtype": "fp32"
    }
    path.with_name(f"{path.stem}_cfg.json").write_text(json.dumps(cfg | config))
    return path


def test_the_papers_format(tmp_path):
    t, z = random_tensors(), random_z()
    sae = S.SAE.load(write_kissane(tmp_path, t))
    assert_equal(sae, *by_hand({n: x for n, x in t.items() if n != "threshold"}, z, subtract=1), z,
                 "relu((z - b_dec) @ W_enc + b_enc)")


def test_gemma_scope_npz_is_a_jumprelu_without_input_bias(tmp_path):
    t, z = random_tensors(), random_z()
    np.savez(tmp_path / "params.npz", **{name: one.numpy() for name, one in t.items()})
    assert_equal(S.SAE.load(tmp_path / "params.npz"), *by_hand(t, z, subtract=0), z,
                 "f = relu(pre) * (pre > threshold), pre = z @ W_enc + b_enc")


def saelens_folder(folder, tensors, factor=None, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    d_sae, d_in = tensors["W_dec"].shape
    cfg = {
        "architecture": "jumprelu" if "threshold" in tensors else "standard", "d_in": d_in,
        "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "hook_name": "blocks.2.attn.hook_z",
        "sae_lens_training_version": "6.0.0"
    }
    (folder / "cfg.json").write_text(json.dumps(cfg | config))
    if factor:
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    return folder


@pytest.mark.parametrize("jump", [False, True], ids=["standard", "jumprelu"])
@pytest.mark.parametrize("subtract", [False, True], ids=["no_input_bias", "input_bias"])
def test_saelens_folders(tmp_path, jump, subtract):
    t, z = random_tensors(), random_z()
    if not jump:
        del t["threshold"]
    folder = saelens_folder(tmp_path / "sae", t, apply_b_dec_to_input=subtract)
    f, z_hat = by_hand(t, z, subtract)
    sae = S.SAE.load(folder)
    assert_equal(sae, f * t["W_dec"].norm(dim=1), z_hat, z, "apply_b_dec_to_input")
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("folder", sorted((ROOT / "tests" / "saelens").glob("*-*")),
                         ids=lambda folder: folder.name)
def test_files_that_saelens_wrote_in_other_years(folder):
    """tests/saelens/write.py wrote them. Dashboards show features once decoder rows have unit
    norm."""
    theirs = read_safetensors(folder / "expected.safetensors")
    sae = S.SAE.load(folder)
    rows = read_safetensors(folder / "sae_weights.safetensors")["W_dec"]
    norms = rows.norm(dim=1)
    assert (norms - 1).abs().min() > 0.01, "this test should have rows of other norms"
    ours = sae.encode(theirs["z"])
    assert ((ours > 0) == (theirs["features"] > 0)).all() and (ours > 0).any()
    assert torch.allclose(ours, theirs["features"] * norms, atol=1e-5)
    assert torch.allclose(ours, theirs.get("unit features", ours), atol=1e-5)
    assert torch.allclose(sae(theirs["z"]), theirs["z_hat"], atol=1e-5)
    about = read_sae(folder)[1]
    assert about["layer"] == 1 and about["model"] == "gpt2-small"
    is_old = int(folder.name[0]) < 4
    assert about["reads"] == ("z_cat less value_bias" if is_old else "z_cat")


def test_a_row_of_zeros_stays(tmp_path):
    t = random_tensors()
    t["W_dec"][3] = 0
    sae = S.SAE.load(saelens_folder(tmp_path / "sae", t))
    assert (sae.W_dec[3] == 0).all() and torch.equal(sae.W_enc[:, 3], t["W_enc"][:, 3])


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_factor_for_outputs_is_dropped_if_it_is_1(tmp_path, name):
    t = random_tensors()
    plain = S.SAE.load(saelens_folder(tmp_path / "plain", t))
    ones = S.SAE.load(saelens_folder(tmp_path / "ones", t | {name: torch.ones(D_SAE)},
                                     finetuning_scaling_factor=True))
    assert torch.equal(ones.W_enc, plain.W_enc)
    factor = torch.ones(D_SAE)
    factor[7] = 1.1
    with pytest.raises(UserError, match=f"other: {name} is not 1 for all features.*finetuning"):
        read_sae(saelens_folder(tmp_path / "other", t | {name: factor}))


def test_a_training_scale_goes_into_the_biases(tmp_path):
    t, z = random_tensors(), random_z()
    folder = saelens_folder(tmp_path / "sae", t, factor=2.5,
                            normalize_activations="expected_average_only_in")
    f, z_hat = by_hand(t, z, subtract=1, scale=2.5)
    assert_equal(S.SAE.load(folder), f * t["W_dec"].norm(dim=1), z_hat, z,
                 "it read 2.5 z, features are 2.5 times ours", scale=2.5)
    of_2024 = saelens_folder(tmp_path / "2024", t, factor=2.5, normalize_activations=True)
    assert torch.equal(S.SAE.load(of_2024).b_enc, S.SAE.load(folder).b_enc)


def test_our_own_files_and_folders_load(tmp_path):
    sae = S.SAE(D_IN, D_SAE)
    sae.save(tmp_path / "L0" / "sae.safetensors")
    for path in (tmp_path / "L0", tmp_path / "L0" / "sae.safetensors"):
        assert torch.equal(S.SAE.load(path).W_enc, sae.W_enc)


# ---- the bias convention ----


def test_an_sae_of_folded_z_reads_plain_weights_after_the_shift(tmp_path):
    """TransformerLens folds ln_1's bias and b_V into b_O; its z is ours less the constant c. Here
    the folding is done by hand on the weights of a random GPT-2, whose output must not change."""
    theirs = random_gpt2(tmp_path / "plain", **GPT2_SHAPES["small"])
    plain, layer = models.load_model(tmp_path / "plain"), 1
    with torch.no_grad():
        for block in theirs.transformer.h:
            attn, D = block.attn, block.attn.c_proj.weight.shape[0]
            W_V, b_V = attn.c_attn.weight[:, 2 * D:], attn.c_attn.bias[2 * D:]
            c = block.ln_1.bias @ W_V + b_V
            attn.c_proj.bias += c @ attn.c_proj.weight
            # cancels ln_1's bias in the values
            attn.c_attn.bias[2 * D:] = -block.ln_1.bias @ W_V
    theirs.save_pretrained(tmp_path / "folded")
    folded, tokens = models.load_model(tmp_path / "folded"), torch.arange(30)[None]
    logits, kept = plain(tokens, keep=(layer,))
    logits_folded, kept_folded = folded(tokens, keep=(layer,))
    assert torch.allclose(logits, logits_folded, atol=1e-4)
    path = write_kissane(tmp_path, random_tensors())
    wanted = S.SAE.load(path).encode(kept_folded[layer].z_cat)
    assert not torch.allclose(S.SAE.load(path).encode(kept[layer].z_cat), wanted, atol=0.1), \
        "this test should tell the two conventions apart"
    shifted = S.SAE.load(path).shift(plain.value_bias(layer))
    assert torch.allclose(shifted.encode(kept[layer].z_cat), wanted, atol=1e-5), \
        "sae.shift(model.value_bias(layer))"


def test_published_sets_are_loaded_shifted_and_fitted(tmp_path, monkeypatch):
    """The published names lead to files of these names; what they hold is written here."""
    random_gpt2(tmp_path / "gpt2", n_layer=12, n_head=4, n_embd=32, vocab_size=101, n_positions=40)
    model = models.load_model(tmp_path / "gpt2")
    asked = []

    def fetch(repo, filename):
        asked.append((repo, filename))
        folder = tmp_path / str(len(asked))
        folder.mkdir()
        if filename.endswith(".pt"):
            return write_kissane(folder, random_tensors(len(asked)), layer=len(asked) - 1)
        np.savez(folder / "params.npz", **{n: x.numpy() for n, x in random_tensors().items()})
        return folder / "params.npz"

    monkeypatch.setattr("data.hub.fetch", fetch)
    saes = S.load_saes("kissane", model)
    assert list(saes) == list(range(12))
    assert asked[1] == ("ckkissane/attn-saes-gpt2-small-all-layers",
                        "gpt2-small_L1_Hcat_z_lr1.20e-03_l18.00e-01_ds24576_bs4096_dc1.00e-06_rsanthropic_"
                        "rie25000_nr4_v5.pt")
    expected = random_tensors(2)["b_dec"] + model.value_bias(1)
    assert torch.allclose(saes[1].b_dec, expected), "the paper's SAEs read z of folded weights"
    by_hand = S.load_saes(_folder_of(tmp_path / "fetched", 1, asked, tmp_path), model)
    assert torch.equal(by_hand[1].b_dec, saes[1].b_dec), \
        "the same file in a folder is to be shifted as well"
    random_gemma(tmp_path / "gemma", **GEMMA_SHAPES["2, no caps"] | {"num_hidden_layers": 26})
    gemma = models.load_model(tmp_path / "gemma")
    with pytest.raises(UserError, match="12 layers, and this one has 26"):
        S.load_saes("kissane", gemma)
    assert list(S.load_saes("gemma-scope", gemma, (2,))) == [2]
    assert asked[-1] == ("google/gemma-scope-2b-pt-att",
                         "layer_2/width_16k/average_l0_93/params.npz")


def _folder_of(folder, layer, asked, tmp_path):
    """What was fetched for a layer, in L<layer>/ of a folder."""
    (folder / f"L{layer}").mkdir(parents=True)
    source = next((tmp_path / str(layer + 1)).glob("*.pt"))
    (folder / f"L{layer}" / source.name).write_bytes(source.read_bytes())
    return folder


def test_saes_that_do_not_fit_or_are_not_there(tmp_path, tiny):
    S.SAE(D_IN, D_SAE).save(tmp_path / "L2" / "sae.safetensors")
    with pytest.raises(UserError, match="layer 2 reads 32 numbers and this model's z_cat has 256"):
        S.load_saes(tmp_path, tiny)
    with pytest.raises(UserError, match="no SAE of layer 1; it has: 2"):
        S.load_saes(tmp_path, tiny, (2, 1))
    with pytest.raises(UserError, match="no SAEs of this model"):
        S.load_saes(tmp_path / "nowhere", tiny)
    with pytest.raises(UserError, match="out of range"):
        S.load_saes(tmp_path, tiny, (7,))


# ---- what an SAE says it is of ----


@pytest.fixture
def of_tiny(tmp_path, tiny):
    """An SAE of tiny's layer 2 as train.py leaves it, in a folder of its own."""
    sae = S.SAE(256, 16)
    sae.about |= {"model": "tiny", "architecture": tiny.architecture(), "weights": digest(tiny),
                  "layer": 2, "left_out": "position 0", "units": "those of the model"}
    sae.save(tmp_path / "L2" / "sae.safetensors")
    return tmp_path


def test_the_saes_that_ship_say_what_they_are_of(tiny, capsys):
    for layer, sae in S.load_saes(TINY, tiny).items():
        assert sae.about["layer"] == layer and sae.about["weights"] == digest(tiny)
        in_config = json.loads((TINY / f"L{layer}" / "config.json").read_text())
        assert sae.about == {name: in_config[name] for name in ABOUT if name in in_config}
    assert capsys.readouterr().out == "", "nothing to doubt"


def test_what_a_header_says_is_known_or_refused(tmp_path):
    """Else an SAE of another activation would come back as a ReLU."""
    sae = S.SAE(8, 12)
    sae.about["activation"] = "soft"
    sae.save(tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="its header says activation"):
        S.SAE.load(tmp_path / "sae.safetensors")


def test_a_file_that_is_copied_still_says_it(of_tiny, tiny, capsys):
    assert S.load_saes(of_tiny, tiny)[2].about["weights"] == digest(tiny)
    (of_tiny / "L2" / "config.json").write_text('{"layer": 1}')
    assert S.load_saes(of_tiny, tiny)[2].about["layer"] == 2, "the file's own header counts"
    (of_tiny / "L2").rename(of_tiny / "L1")
    with pytest.raises(UserError, match="in the place of layer 1 is of layer 2"):
        S.load_saes(of_tiny, tiny)
    assert capsys.readouterr().out == ""


def test_an_sae_of_another_model_is_refused_or_doubted(of_tiny, tiny, tmp_path, capsys):
    random_gpt2(tmp_path / "deep", n_layer=5, n_head=4, n_embd=256, vocab_size=50, n_positions=20)
    with pytest.raises(UserError, match="of another model, a GPT2 of 4 layers, 4 heads of 64, "
                       "d_model 256; this one is a GPT2 of 5 layers"):
        S.load_saes(of_tiny, models.load_model(tmp_path / "deep"))
    random_gpt2(tmp_path / "twin", n_layer=4, n_head=4, n_embd=256, vocab_size=50, n_positions=20)
    S.load_saes(of_tiny, models.load_model(tmp_path / "twin"))
    assert "layers 2 in" in (said := capsys.readouterr().out)
    assert "trained on other weights, those of tiny" in said


def test_an_sae_that_says_nothing_is_read_with_a_line(tmp_path, tiny, capsys):
    S.SAE(256, 16).save(tmp_path / "L0" / "sae.safetensors")
    S.SAE(256, 16).save(tmp_path / "L3" / "sae.safetensors")
    assert list(S.load_saes(tmp_path, tiny)) == [0, 3]
    assert "layers 0, 3 in" in (said := capsys.readouterr().out)
    assert said.count("\n") == 1 and "do not say which weights" in said


def test_site_and_layer_of_published_saes_are_checked(tmp_path, tiny):
    t = random_tensors(d_in=256)
    folder = saelens_folder(tmp_path / "L1", t)
    with pytest.raises(UserError, match="in the place of layer 1 is of layer 2"):
        S.load_saes(tmp_path, tiny)
    for hook in ({"hook_name": "blocks.1.hook_resid_pre"},
                 {"hook_point": "blocks.1.attn.hook_q", "hook_name": None}, {"hook_name": None}):
        settings = json.loads((folder / "cfg.json").read_text()) | hook
        settings = {name: value for name, value in settings.items() if value is not None}
        (folder / "cfg.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="hook_name .* is not supported, only blocks"):
            read_sae(folder)
    settings["hook_point"] = "blocks.1.attn.hook_z"
    (folder / "cfg.json").write_text(json.dumps(settings))
    assert S.load_saes(tmp_path, tiny)[1].about["layer"] == 1, "the name of 2024"
    write_kissane(tmp_path, random_tensors(), act_name="blocks.1.hook_mlp_out")
    with pytest.raises(UserError, match="hook_mlp_out"):
        read_sae(tmp_path / "gpt2-small_L1_Hcat_z_v9.pt")


# ---- sae-lens itself ----


def run_saelens(script, tmp_path):
    """sae-lens in a process of its own: it brings its own versions and takes seconds to import."""
    pytest.importorskip("sae_lens", reason="tests/requirements-sae-lens.txt is not installed")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_saelens_reads_what_we_write(tmp_path, kind):
    sae, z = S.SAE.load(saelens_folder(tmp_path / "x", random_tensors())), random_z()
    if kind != "jumprelu":
        sae.threshold.zero_()
    sae.about["top_k"] = 3 if kind == "topk" else 0
    write_saelens(sae.state_dict(), tmp_path / "ours", "gpt2", 5, 128, sae.top_k)
    save_file({"z": z.unflatten(-1, (4, 8)).contiguous()}, tmp_path / "z.safetensors")
    run_saelens("""
import sae_lens, torch
from safetensors.torch import load_file, save_file
sae = sae_lens.SAE.load_from_disk("ours")
z = load_file("z.safetensors")["z"]
f = sae.encode(z)
save_file({"f": f.detach(), "z_hat": sae.decode(f).detach().contiguous()}, "theirs.safetensors")
""", tmp_path)
    theirs = read_safetensors(tmp_path / "theirs.safetensors")
    assert (theirs["f"] - sae.encode(z)).abs().max() < 1e-5
    assert (theirs["z_hat"].flatten(-2) - sae(z)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "topk, rescaled"])
def test_we_read_what_saelens_writes(tmp_path, kind):
    t, z = random_tensors(), random_z()
    save_file(t | {"z": z}, tmp_path / "in.safetensors")
    run_saelens(f"""
import sae_lens, torch
from safetensors.torch import load_file, save_file
t = load_file("in.safetensors")
kind, config = {{"jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
                "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
                "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig)}}["{kind}".split(",")[0]]
more = {{"k": 3, "rescale_acts_by_decoder_norm": "{kind}" != "topk"}} if "topk" in "{kind}" else {{}}
of = sae_lens.saes.sae.SAEMetadata(model_name="gpt2-small", hook_name="blocks.1.attn.hook_z")
sae = kind(config(d_in={D_IN}, d_sae={D_SAE}, apply_b_dec_to_input={kind != "jumprelu"},
                  metadata=of, **more))
with torch.no_grad():
    for name, parameter in sae.named_parameters():
        parameter.copy_(t[name])
sae.save_model("theirs")
if "{kind}" != "topk":
    sae.fold_W_dec_norm()
save_file({{"f": sae.encode(t["z"]).detach(), "z_hat": sae(t["z"]).detach()}}, "out.safetensors")
""", tmp_path)
    theirs, ours = read_safetensors(tmp_path / "out.safetensors"), S.SAE.load(tmp_path / "theirs")
    assert (ours.encode(z) - theirs["f"]).abs().max() < 1e-4
    assert (ours(z) - theirs["z_hat"]).abs().max() < 1e-4


def read_safetensors(path):
    from safetensors.torch import load_file
    return load_file(path)


# ---- what is refused ----


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("of_old", [False, True])
def test_topk_folders_of_saelens(tmp_path, rescaled, of_old):
    """Which features are the largest is decided before rows are brought to unit norm, or, if the
    file says so, as if they had it already."""
    k = 3
    t, z = random_tensors(), random_z()
    del t["threshold"]
    how = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}} if of_old else {"k": k}
    sae = S.SAE.load(saelens_folder(tmp_path / "sae", t, architecture="topk", **how,
                                    rescale_acts_by_decoder_norm=rescaled))
    pre = (z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    norms = t["W_dec"].norm(dim=1)
    by = pre * norms if rescaled else pre
    kth = by.topk(k, dim=-1).values[..., -1:]
    f = pre * (by >= kth) * (pre > 0)
    assert (((f > 0) != (pre * (pre >= pre.topk(k, dim=-1).values[..., -1:]) > 0)).any()
            == rescaled), "this test should tell the two apart"
    torch.testing.assert_close(sae(z), f @ t["W_dec"] + t["b_dec"])
    assert sae.top_k == k


@pytest.mark.parametrize("k", [None, 0.5, -1, 10_000, "3"])
def test_a_topk_folder_that_cannot_be_is_refused(tmp_path, k):
    t = random_tensors()
    del t["threshold"]
    folder = saelens_folder(tmp_path / "sae", t, architecture="topk", k=k)
    with pytest.raises(UserError, match="largest of .* features, which cannot be"):
        read_sae(folder)


def test_a_topk_sae_comes_back_as_it_was_saved(tmp_path):
    sae = S.SAE(6, 20, top_k=4)
    sae.save(tmp_path / "sae.safetensors")
    again = S.SAE.load(tmp_path / "sae.safetensors")
    assert again.top_k == 4 and torch.equal(again(torch.ones(2, 6)), sae(torch.ones(2, 6)))
    sae.threshold += 0.1
    sae.save(tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match="has thresholds too"):
        S.SAE.load(tmp_path / "sae.safetensors")


@pytest.mark.parametrize("option", [{"architecture": "gated"}, {"activation_fn_str": "topk"},
                                    {"normalize_activations": "layer_norm"},
                                    {"hook_point_head_index": 0}, {"hook_head_index": 3},
                                    {"hook_name": "blocks.5.hook_resid_pre"}], ids=str)
def test_options_of_saelens_that_we_lack_are_named(tmp_path, option):
    folder = saelens_folder(tmp_path / "sae", random_tensors(), **option)
    with pytest.raises(UserError, match=f"{next(iter(option))} .* is not supported"):
        read_sae(folder)


@pytest.mark.parametrize("said, folded", [
    ({"model_from_pretrained_kwargs": {}, "sae_lens_training_version": "2.0.0"}, True),
    ({"model_from_pretrained_kwargs": {}, "sae_lens_training_version": None}, False),
    ({"model_from_pretrained_kwargs": {"fold_ln": False, "fold_value_biases": False},
      "sae_lens_training_version": "2.0.0"}, False),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, False),
    ({"model_from_pretrained_kwargs": {"fold_ln": True}}, False),
    ({"model_from_pretrained_kwargs": {"fold_ln": True, "fold_value_biases": True}}, True),
    ({"sae_lens_training_version": "3.19.1"}, True),
    ({"sae_lens_training_version": "2.1.3", "sae_lens_version": "6.1.0"}, True),
    ({"sae_lens_training_version": "3.19.2"}, False),
    ({"sae_lens_training_version": "10.0.0"}, False),
    ({"sae_lens_training_version": None, "sae_lens_version": "3.9.9"}, True),
    ({"metadata": {"sae_lens_training_version": "3.2.0"}}, True),
], ids=str)
def test_whether_a_saelens_sae_reads_folded_z(tmp_path, said, folded):
    """By what was asked of the model, else by how SAELens loaded it in that version; the shift then
    puts the constant back, as for the paper's."""
    folder = saelens_folder(tmp_path / "L2", random_tensors(), **said)
    assert (read_sae(folder)[1]["reads"] == "z_cat less value_bias") == folded
    random_gpt2(tmp_path / "gpt2", **GPT2_SHAPES["small"])
    model = models.load_model(tmp_path / "gpt2")
    sae = S.load_saes(tmp_path, model)[2]
    moved = sae.b_dec - S.SAE.load(folder).b_dec
    assert sae.reads == "z_cat"
    assert torch.allclose(moved, model.value_bias(2) * folded, atol=1e-6)


def test_a_saelens_sae_that_does_not_say_is_refused(tmp_path):
    folder = saelens_folder(tmp_path / "sae", random_tensors(), sae_lens_training_version=None)
    with pytest.raises(UserError, match="does not say whether value biases were folded"):
        read_sae(folder)
    asked = {"model_from_pretrained_kwargs": {"fold_value_biases": True}}
    with pytest.raises(UserError, match="LayerNorm was not folded"):
        read_sae(saelens_folder(tmp_path / "sae", random_tensors(), **asked))
    asked = {"model_from_pretrained_kwargs": {"fold_ln": False}, "sae_lens_version": "2.1.3",
             "sae_lens_training_version": None}
    with pytest.raises(UserError, match="LayerNorm was not folded"):
        read_sae(saelens_folder(tmp_path / "sae", random_tensors(), **asked))


def test_float16_keeps_rows_that_never_had_unit_norm(tmp_path):
    sae = S.SAE.load(write_kissane(tmp_path, random_tensors()))
    sae.save(tmp_path / "sae.safetensors", torch.float16)
    assert torch.allclose(S.SAE.load(tmp_path / "sae.safetensors").W_dec, sae.W_dec, atol=2e-3)


def test_a_scale_that_is_missing_is_named(tmp_path):
    folder = saelens_folder(tmp_path / "sae", random_tensors(),
                            normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="activation_scaler.json"):
        read_sae(folder)


def test_a_pt_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"W_enc": Evil()}, tmp_path / "sae.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "ran").unlink(missing_ok=True)
    for name in ("sae.pt", "plain.pt"):
        with pytest.raises(UserError, match=f"{name} is damaged, or holds more .*fetch it again.$"):
            read_sae(tmp_path / name)
    np.savez(tmp_path / "sae.npz", W_enc=np.array([Evil()], dtype=object))
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(UserError, match="sae.npz is damaged, or holds more .*fetch it again.$"):
        read_sae(tmp_path / "sae.npz")
    assert not (tmp_path / "ran").exists(), "a file was unpickled with code execution"


def test_wrong_shapes_missing_tensors_and_other_sizes_are_named(tmp_path):
    t = random_tensors()
    path = write_kissane(tmp_path, t, dict_size=71)
    with pytest.raises(UserError, match="dict_size 71"):
        read_sae(path)
    for change in ({"b_dec": torch.zeros(3)}, {"W_enc": t["W_enc"].T},
                   {"b_enc": torch.full((D_SAE,), torch.nan)}, {"W_dec": torch.zeros(D_SAE)},
                   {"more": torch.zeros(1)}, {"b_dec": torch.arange(D_IN)}):
        with pytest.raises(UserError, match="gpt2-small_L1"):
            read_sae(write_kissane(tmp_path, t | change) if "W_dec" not in change
                     else _saved(tmp_path, t | change))
    for name in ("sae.bin", "nothing.pt"):
        (tmp_path / "sae.bin").write_bytes(b"x")
        with pytest.raises(UserError, match=name):
            read_sae(tmp_path / name)


def _saved(folder, tensors):
    path = folder / "gpt2-small_L1.pt"
    torch.save(tensors, path)
    return path


def test_truncated_files_are_named(tmp_path):
    t = random_tensors()
    np.savez(tmp_path / "params.npz", **{name: one.numpy() for name, one in t.items()})
    pt = write_kissane(tmp_path, t)
    for path in (pt, tmp_path / "params.npz"):
        whole = path.read_bytes()
        for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match=path.name):
                read_sae(path)


def test_a_folder_of_fetched_files_serves_as_well(tmp_path, tiny):
    t = random_tensors(d_in=256)
    (tmp_path / "L3").mkdir()
    np.savez(tmp_path / "L3" / "params.npz", **{name: one.numpy() for name, one in t.items()})
    assert sae_paths(tmp_path, (), 4) == {3: tmp_path / "L3" / "params.npz"}
    assert S.load_saes(tmp_path, tiny)[3].d_sae == D_SAE
