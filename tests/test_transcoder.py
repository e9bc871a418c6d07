"""Transcoders: the same step as an SAE's with another target. In these tests d_in, d_sae and d_out
differ, so that code which mixes them up does not run."""

import json

import pytest
import torch
import torch.nn.functional as F

import data
import sae as S
import sparse as P
import train as T
from conftest import program
from data.errors import UserError

D_IN, D_SAE, D_OUT = 24, 96, 17


def random_transcoder(seed=0, dtype=torch.float32, threshold=0.0, d_in=D_IN, d_sae=D_SAE,
                      d_out=D_OUT, bias=-0.6):
    g = torch.Generator().manual_seed(seed)
    transcoder = S.Transcoder(d_in, d_sae, d_out, g)
    with torch.no_grad():
        transcoder.b_enc += bias + 0.3 * torch.randn(d_sae, generator=g)
        transcoder.b_dec += 0.2 * torch.randn(d_out, generator=g)
        transcoder.threshold += threshold * torch.rand(d_sae, generator=g)
    return transcoder.to(dtype)


def random_pair(B=64, seed=1, dtype=torch.float32, d_in=D_IN, d_out=D_OUT):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, d_in, generator=g).to(dtype),
            torch.randn(B, d_out, generator=g).to(dtype))


# ---- the step ----


@pytest.mark.parametrize("step", [S.dense_step, P.sparse_step], ids=["dense", "sparse"])
@pytest.mark.parametrize("threshold", [0.0, 0.5], ids=["ReLU", "JumpReLU"])
def test_gradients_equal_autograd_in_float64(step, threshold):
    transcoder = random_transcoder(dtype=torch.float64, threshold=threshold)
    x, y = random_pair(dtype=torch.float64)
    named = {name: p.detach().clone().requires_grad_()
             for name, p in transcoder.named_parameters()}
    pre = x @ named["W_enc"] + named["b_enc"]
    f = torch.where(pre > transcoder.threshold, pre, torch.zeros_like(pre))
    mse = ((f @ named["W_dec"] + named["b_dec"] - y) ** 2).sum(1).mean(0)
    (mse + 0.3 * f.sum(1).mean(0)).backward()
    result = step(transcoder, x, 0.3, y)
    assert abs(result.mse - mse) < 1e-10 and torch.equal(result.fired, (f > 0).sum(0))
    for name, parameter in named.items():
        got = result.gradients[name]
        assert got.shape == parameter.shape, name
        assert (got - parameter.grad).abs().max() < 1e-10, name


def test_the_sparse_step_equals_the_dense_one():
    transcoder = random_transcoder(d_in=200, d_sae=2048, d_out=150, bias=-2.5)
    x, y = random_pair(512, d_in=200, d_out=150)
    dense, sparse = S.dense_step(transcoder, x, 0.3, y), P.sparse_step(transcoder, x, 0.3, y)
    assert 1 < dense.fired.sum() / len(x) < 200
    torch.testing.assert_close(sparse.mse, dense.mse, rtol=1e-5, atol=0)
    for name, expected in dense.gradients.items():
        assert (sparse.gradients[name] - expected).norm() < 1e-5 * expected.norm(), name


def test_active_entries_are_those_of_encode():
    transcoder = random_transcoder()
    x = random_pair(30)[0].unflatten(0, (5, 6))
    found = torch.zeros(5, 6, D_SAE)
    entries = P.encode_sparse(transcoder, x)
    found[entries.row, entries.q, entries.feature] = entries.f
    torch.testing.assert_close(found, transcoder.encode(x), atol=1e-5, rtol=1e-5)


def test_an_sae_whose_target_is_its_input_is_a_special_case():
    """With b_dec taken into b_enc, an SAE is a transcoder from z to z."""
    g = torch.Generator().manual_seed(3)
    sae = S.SAE(D_IN, D_SAE, g).double().requires_grad_(False)
    sae.b_dec += torch.randn(D_IN, generator=g)
    z = random_pair(dtype=torch.float64)[0]
    same = S.Transcoder(D_IN, D_SAE, D_IN).double().requires_grad_(False)
    same.W_enc.copy_(sae.W_enc)
    same.W_dec.copy_(sae.W_dec)
    same.b_dec.copy_(sae.b_dec)
    same.b_enc.copy_(sae.b_enc - sae.b_dec @ sae.W_enc)
    torch.testing.assert_close(same(z), sae(z))
    ours, theirs = S.dense_step(sae, z, 0.2), S.dense_step(same, z, 0.2, z)
    torch.testing.assert_close(ours.mse, theirs.mse)
    torch.testing.assert_close(ours.gradients["W_dec"], theirs.gradients["W_dec"])


# ---- how it starts, starts again, and is scaled ----


def test_rescaled_it_does_the_same_in_the_models_units():
    transcoder = random_transcoder(threshold=0.4, dtype=torch.float64).requires_grad_(False)
    x, _ = random_pair(dtype=torch.float64)
    before = 5.0 * transcoder(x / 3.0)
    f = transcoder.encode(x / 3.0)
    transcoder.rescale(3.0, 5.0)
    torch.testing.assert_close(transcoder(x), before)
    torch.testing.assert_close(transcoder.encode(x), 5.0 * f)
    torch.testing.assert_close(transcoder.W_dec.norm(dim=1), torch.ones(D_SAE).double())


def linear_site(n=20_000, seed=0):
    """Inputs far from 0, and outputs that are a matrix times them."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(D_IN, D_OUT, generator=g) / D_IN**0.5
    x = torch.randn(n, D_IN, generator=g) + 4 * torch.randn(D_IN, generator=g)
    return x, 7 * x @ A + 2, A


def test_it_starts_with_directions_that_belong_together():
    x, y, A = linear_site()
    learner = T.make_learner((D_IN, D_OUT), D_SAE, 0.1, 1e-3)
    T.initialise(learner, (x, y), True, torch.Generator().manual_seed(0))
    transcoder = learner.sae
    torch.testing.assert_close(transcoder.W_enc.norm(dim=0), torch.full((D_SAE,), 0.5))
    torch.testing.assert_close(transcoder.W_dec.norm(dim=1), torch.ones(D_SAE))
    moves = F.normalize(transcoder.W_enc.T @ A, dim=1)      # x's covariance is I
    assert (moves * transcoder.W_dec).sum(1).min() > 0.95
    torch.testing.assert_close(transcoder.b_dec * learner.scale_out, y.mean(0))
    z, target = learner.in_its_units((x, y))
    torch.testing.assert_close((z - z.mean(0)).norm(dim=1).mean(), torch.tensor(1.0), rtol=0.02,
                               atol=0)
    torch.testing.assert_close((target - target.mean(0)).norm(dim=1).mean(), torch.tensor(1.0),
                               rtol=0.02, atol=0)
    rate = (transcoder.encode(z) > 0).float().mean(0)
    assert abs(rate.mean() - 0.01) < 0.002 and rate.max() < 0.03, \
        "one input in a hundred, though the mean of x is far from 0"


def test_a_dead_feature_comes_back_in_both_spaces():
    x, y, _ = linear_site(400)
    transcoder = random_transcoder().requires_grad_(False)
    optimizer = torch.optim.Adam(transcoder.parameters())
    for parameter in transcoder.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::7] = True
    norm = transcoder.W_enc[:, ~dead].norm(dim=0).mean()
    S.resample(transcoder, optimizer, dead, x, torch.Generator().manual_seed(0), y, x.mean(0))
    torch.testing.assert_close(transcoder.W_enc[:, dead].norm(dim=0),
                               (0.2 * norm).expand(int(dead.sum())))
    read = F.normalize(x - x.mean(0), dim=1) @ F.normalize(transcoder.W_enc[:, dead], dim=0)
    written = F.normalize(y - transcoder.b_dec, dim=1) @ transcoder.W_dec[dead].T
    drawn = read.argmax(0)
    assert read.max(0).values.min() > 0.9999 and torch.equal(drawn, written.argmax(0)), \
        "each is one place's input and the same place's target"
    pre_at_mean = transcoder.pre_activations(x.mean(0))[dead]
    torch.testing.assert_close(pre_at_mean, torch.zeros_like(pre_at_mean), atol=1e-4, rtol=0)


def test_training_finds_the_features_of_a_known_map():
    """y has, for each of 12 directions, what goes beyond a half of x along it: a ReLU's work."""
    g = torch.Generator().manual_seed(0)
    read = torch.linalg.qr(torch.randn(D_IN, 12, generator=g)).Q                # (d_in,12)
    write = F.normalize(torch.randn(12, D_OUT, generator=g), dim=1)
    x = torch.where(torch.rand(40_000, 12, generator=g) < 0.1,
                    1 + torch.rand(40_000, 12, generator=g), 0) @ read.T
    x = x + 1.5
    y = ((x - 1.5) @ read - 0.5).clamp_min(0) @ write
    config = T.TrainConfig(batch_size=512, lr=3e-3, n_tokens=512 * 1200, warmup=50, decay=0.3)
    learner = T.make_learner((D_IN, D_OUT), 48, 0.03, config.lr)
    T.initialise(learner, (x, y), True, T.generator(0, "start"))
    for step in range(1200):
        batch = torch.randperm(len(x), generator=g)[:512]
        T.train_step(learner, (x[batch], y[batch]), step, config)
        T.read_back({0: learner}, step, config.batch_size)
    transcoder = learner.sae.rescale(learner.scale_in, learner.scale_out).requires_grad_(False)
    cosines = write @ transcoder.W_dec.T
    assert cosines.max(1).values.min() > 0.9, "every direction is one feature's"
    found = cosines.argmax(1)
    reads = F.normalize(transcoder.W_enc[:, found], dim=0)
    assert (reads * read).sum(0).min() > 0.75, "which reads what belongs to it"
    error = (transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert error < 0.1


# ---- files, the model's seam, the program ----


def test_it_is_saved_and_read_as_what_it_is(tmp_path):
    transcoder = random_transcoder().requires_grad_(False)
    transcoder.save(tmp_path / "sae.safetensors")
    read = S.SAE.load(tmp_path / "sae.safetensors")
    assert type(read) is S.Transcoder and read.reads == "mlp"
    x, _ = random_pair()
    assert torch.equal(read(x), transcoder(x))


def test_the_seam_after_mlps(pair):
    """An edit sees what the MLP reads and writes; what it returns goes on."""
    model, _ = pair
    tokens = torch.randint(model.config.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    clean, cache = model(tokens, keep=(1,))
    seen = {}

    def look(mlp_in, mlp_out):
        seen.update(mlp_in=mlp_in, mlp_out=mlp_out)
        return torch.zeros_like(mlp_out)

    edited, after = model(tokens, keep=(1,), edit_mlp={1: look})
    assert torch.equal(seen["mlp_in"], cache[1].mlp_in)
    assert torch.equal(seen["mlp_out"], cache[1].mlp_out)
    assert (after[1].mlp_out == 0).all() and not torch.allclose(edited, clean)
    x = cache[1].resid_pre + cache[1].attn_out
    rest, _ = model.run_layers(x, layers=range(2, model.config.n_layers))
    torch.testing.assert_close(edited, model.unembed(rest))
    at = model.mlp_at(tokens, [1])[1]
    torch.testing.assert_close(at.mlp_in, cache[1].mlp_in)
    torch.testing.assert_close(at.mlp_out, cache[1].mlp_out)


def test_the_program_trains_measures_and_resumes_them(tmp_path):
    flags = ["--reads", "mlp", "--layers", "1,2", "--d-sae", 128, "--n-tokens", 8192,
             "--batch-size", 1024, "--n-eval-rows", 4, "--out", tmp_path]
    done = program("train", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 x transcoder 256 -> 128" in done.stdout and "the MLP's output" in done.stdout
    folder = tmp_path / "tiny" / "mlp"
    metrics = json.loads((folder / "L2" / "metrics.json").read_text())
    assert metrics["ce_zero"] > metrics["ce_sae"] > metrics["ce_clean"]
    read = S.SAE.load(folder / "L2")
    assert type(read) is S.Transcoder and read.about["layer"] == 2
    measured = program("train", "--saes", tmp_path / "tiny", "--reads", "mlp", "--n-eval-rows", 4,
                       "--out", tmp_path)
    assert measured.returncode == 0, measured.stderr
    table = [line.split()[:4] for line in done.stdout.splitlines() if line.startswith("    2")]
    again = [line.split()[:4] for line in measured.stdout.splitlines() if line.startswith("    2")]
    assert table == again


def test_an_sae_is_no_transcoder(tmp_path, tiny):
    for layer, kind in ((0, S.Transcoder(256, 32, 256)), (1, S.SAE(256, 32)),
                        (2, S.Transcoder(256, 32, 100))):
        kind.save(tmp_path / "mlp" / f"L{layer}" / "sae.safetensors")
        kind.save(tmp_path / f"L{layer}" / "sae.safetensors")
    assert list(S.load_transcoders(tmp_path, tiny, [0])) == [0]
    with pytest.raises(UserError, match="layer 1 reads z_cat, and mlp is what"):
        S.load_transcoders(tmp_path, tiny)
    with pytest.raises(UserError, match="layer 2 writes 100 numbers"):
        S.load_transcoders(tmp_path, tiny, [2])
    with pytest.raises(UserError, match="layer 0 reads mlp, and z_cat is what"):
        S.load_saes(tmp_path, tiny)


def test_what_goes_in_and_what_comes_out_stay_together(tiny):
    """Shuffled or sampled, both tensors of a site are of the same place."""
    config = T.TrainConfig(reads="mlp", batch_size=127, n_tokens=127 * 64, block_mib=1000)
    buffer = T.ActivationBuffer(tiny, data.load_tokenizer("tiny"), config, (1,),
                                torch.device("cpu"))
    sites = [site for _, (site,) in ((step, batch.values()) for step, batch in buffer.batches(0))]
    for x, y in (*sites, buffer.sample(1)):
        error = (tiny.blocks[1].mlp(x) - y).norm(dim=-1) / y.norm(dim=-1)
        assert error.max() < 0.03, "what bfloat16 rounds; of another place it would be above 1"
