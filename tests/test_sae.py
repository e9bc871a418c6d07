"""sae.py: the hand-worked gradient against autograd, the sparse step against the dense one, a
dictionary that is known."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sae as S
import sparse as P
from data.errors import UserError


def random_sae(d_in=24, d_sae=96, seed=0, dtype=torch.float32, bias=-0.6, threshold=0.0):
    g = torch.Generator().manual_seed(seed)
    sae = S.SAE(d_in, d_sae, g)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(d_in, d_sae, generator=g)
        sae.b_enc += bias + 0.3 * torch.randn(d_sae, generator=g)
        sae.b_dec += 0.2 * torch.randn(d_in, generator=g)
        sae.threshold += threshold * torch.rand(d_sae, generator=g)
    return sae.to(dtype)


def random_z(B=64, d_in=24, seed=1, dtype=torch.float32):
    return torch.randn(B, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def autograd_step(sae, z, l1):
    """The loss as the paper states it, differentiated by torch; nothing is taken from the code
    under test."""
    named = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    pre = (z - named["b_dec"]) @ named["W_enc"] + named["b_enc"]
    f = torch.where(pre > sae.threshold, pre, torch.zeros_like(pre))
    mse = ((f @ named["W_dec"] + named["b_dec"] - z) ** 2).sum(1).mean(0)
    loss = mse + l1 * f.sum(1).mean(0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in named.items()}, (f > 0).sum(0)


@pytest.mark.parametrize("step", [S.dense_step, P.sparse_step], ids=["dense", "sparse"])
@pytest.mark.parametrize("threshold", [0.0, 0.5], ids=["ReLU", "JumpReLU"])
def test_gradients_equal_autograd_in_float64(step, threshold):
    sae, z, l1 = random_sae(dtype=torch.float64,
                            threshold=threshold), random_z(dtype=torch.float64), 0.3
    loss, gradients, fired = autograd_step(sae, z, l1)
    result = step(sae, z, l1)
    assert abs(result.mse + l1 * result.sparsity
               - loss) < 1e-10, "the loss: sum over d_in and d_sae, mean over the batch"
    assert torch.equal(result.fired, fired)
    for name, expected in gradients.items():
        got = result.gradients[name]
        hint = {"b_dec": "b_dec enters twice", "W_dec": "f^T g", "W_enc": "the ReLU's gate?",
                "b_enc": "the ReLU's gate?"}[name]
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-10, \
            f"gradient of {name} is wrong: {hint}"


def test_loss_does_not_change_when_the_batch_is_duplicated():
    sae, z = random_sae(), random_z()
    once, twice = S.dense_step(sae, z, 0.3), S.dense_step(sae, torch.cat([z, z]), 0.3)
    assert torch.allclose(once.mse, twice.mse) and torch.allclose(once.sparsity, twice.sparsity), \
        "the batch is to be averaged, not summed"
    assert torch.allclose(once.gradients["W_dec"], twice.gradients["W_dec"], atol=1e-6)


def test_decoder_gradient_has_no_part_along_the_row_and_rows_stay_unit():
    sae = random_sae()
    with torch.no_grad():
        sae.W_dec *= 3
    S.normalise_decoder(sae)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-6)
    gradient = random_z(96, 24)
    along = (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    projected = gradient.clone()
    S.project_decoder_gradient(sae, projected)
    assert torch.allclose(projected, gradient - along, atol=1e-6)
    assert (projected * sae.W_dec).sum(1).abs().max() < 1e-5, \
        "project on the row's tangent space: subtract (g . w) w"


def test_fused_adam_moves_parameters_as_plain_adam_does():
    """The fused optimiser walks through memory in order: a parameter and its gradient must be laid
    out alike.
    """
    moved = []
    for fused in (False, True):
        z = random_z()
        sae = S.SAE(24, 96, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, betas=(0.0, 0.9999), fused=fused)
        for _ in range(3):
            for name, gradient in P.sparse_step(sae, z, 0.3).gradients.items():
                getattr(sae, name).grad = gradient
            optimizer.step()
        moved.append({name: p.detach() for name, p in sae.named_parameters()})
    for name in moved[0]:
        assert torch.allclose(moved[0][name], moved[1][name],
                              atol=1e-5), f"{name} is not contiguous, or its gradient is not"


def planted(n, d_in=32, n_features=64, seed=0):
    """Activations from a known dictionary: 3 of 64 features at a time, of sizes 1 to 2."""
    g = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(
        torch.randn(n_features, d_in, generator=torch.Generator().manual_seed(99)), dim=1)
    which = torch.rand(n, n_features, generator=g).argsort(1)[:, :3]
    f = torch.zeros(n, n_features).scatter_(1, which, 1 + torch.rand(n, 3, generator=g))
    return f @ dictionary, dictionary


def test_a_planted_dictionary_is_recovered():
    """64 directions in 32 dimensions, found from their sums alone: mean over the directions of the
    best cosine >= 0.95."""
    sae = S.SAE(32, 96, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc *= 0.5
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3, betas=(0.0, 0.9999))
    for step in range(2000):
        z, dictionary = planted(512, seed=step)
        result = S.dense_step(sae, z, l1=0.3)
        S.project_decoder_gradient(sae, result.gradients["W_dec"])
        for name, gradient in result.gradients.items():
            getattr(sae, name).grad = gradient
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (2000 - step) / 1000)
        optimizer.step()
        S.normalise_decoder(sae)
    cosine = (dictionary @ sae.W_dec.detach().T).max(1).values
    assert cosine.mean() >= 0.95, f"mean best cosine {cosine.mean():.3f}"


# ---- resampling ----


def trained(steps=300):
    """An SAE and its Adam some steps into training, with the last eight of its features dead."""
    sae = S.SAE(32, 96, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[-8:] = -100.0
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, betas=(0.0, 0.9999))
    for step in range(steps):
        gradient_step(sae, optimizer, step)
    dead = torch.zeros(96, dtype=torch.bool)
    dead[-8:] = True
    return sae, optimizer, dead


def gradient_step(sae, optimizer, seed, mute=None):
    result = S.dense_step(sae, planted(256, seed=seed)[0], 0.2)
    S.project_decoder_gradient(sae, result.gradients["W_dec"])
    for name, gradient in result.gradients.items():
        if mute is not None and name != "b_dec":
            # as if these features did not fire
            (gradient.T if name == "W_enc" else gradient)[mute] = 0
        getattr(sae, name).grad = gradient
    optimizer.step()
    S.normalise_decoder(sae)


def test_resampled_rows_are_what_bricken_et_al_ask_for():
    sae, optimizer, dead = trained()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    z = planted(500, seed=7)[0]
    S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(0))
    directions = F.normalize(z - sae.b_dec, dim=1).detach()
    assert (sae.W_dec[dead] @ directions.T).max(1).values.min() > 1 - 1e-5, \
        "a new decoder row is a centred, normalised input"
    wanted = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
    assert torch.allclose(sae.W_enc[:, dead].norm(dim=0), wanted.expand(8), rtol=1e-5)
    assert torch.allclose(F.normalize(sae.W_enc[:, dead].T, dim=1), sae.W_dec[dead], atol=1e-5)
    assert (sae.b_enc[dead] == 0).all()
    for name, live in (("W_enc", (slice(None), ~dead)), ("W_dec", ~dead), ("b_enc", ~dead),
                       ("b_dec", slice(None))):
        assert torch.equal(getattr(sae, name)[live],
                           before[name][live]), f"{name} of a live feature was touched"


def test_resampling_prefers_inputs_that_are_badly_reconstructed():
    """With squared errors in the ratio 1 : 3, inputs are drawn in the ratio 1 : 9."""
    sae = S.SAE(2, 2001, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # z_hat = 0, so the error is |z|^2
        sae.b_enc.fill_(-100.0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    for p in sae.parameters():
        optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
    z = torch.tensor([[1.0, 0.0], [0.0, 3**0.5]])
    dead = torch.arange(2001) < 2000
    S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(0))
    share = (sae.W_dec[dead][:, 1] > 0.5).float().mean()
    assert abs(share - 0.9) < 0.03, \
        f"drawn with probability {share:.2f}, not 0.9: is it the square of the squared error?"


@pytest.mark.parametrize("silent_steps", [0, 1000])
def test_a_resampled_row_never_jumps(silent_steps):
    """Its first update is at most 10 lr per element, right away or when it first fires a thousand
    steps later."""
    sae, optimizer, dead = trained()
    S.resample(sae, optimizer, dead, planted(500, seed=7)[0], torch.Generator().manual_seed(0))
    for step in range(silent_steps):
        gradient_step(sae, optimizer, 1000 + step, mute=dead)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    gradient_step(sae, optimizer, 5000)
    for name, index in (("W_enc", (slice(None), dead)), ("W_dec", dead), ("b_enc", dead)):
        moved = (getattr(sae, name)[index] - before[name][index]).abs().max()
        assert 0 < moved < 10 * 1e-3, \
            (f"{name} moved by {moved / 1e-3:.0f} x lr: "
             "is Adam's second moment 0 while its step count is not?")


# ---- edits, files ----


def test_splice_keeps_position_0_and_ablate_removes_one_feature_where_asked():
    sae = random_sae()
    z = random_z(30).reshape(3, 10, 24)
    spliced = S.splice(sae)(z)
    assert torch.equal(spliced[:, 0], z[:, 0]) and torch.equal(spliced[:, 1:], sae(z[:, 1:]))
    f = sae.encode(z)
    feature = int((f > 0).sum((0, 1)).argmax())
    where = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    ablated = S.ablate(sae, feature, where)(z)
    for b in range(3):
        for t in range(10):
            expected = z[b, t] - f[b, t, feature] * sae.W_dec[feature] if where[b, t] else z[b, t]
            assert torch.allclose(ablated[b, t], expected, atol=1e-6)
            assert where[b, t] or torch.equal(ablated[b, t],
                                              z[b, t]), "a position that was not asked for changed"


def test_a_clamped_feature_has_the_value_that_was_asked_for():
    """The SAE reads a feature where its encoder's column is its decoder's row, and other columns
    do not see that row: there, what comes out is read as the value."""
    sae = S.SAE(12, 5).requires_grad_(False)
    sae.W_dec.copy_(torch.eye(12)[:5])
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    z = random_z(30, 12).reshape(3, 10, 12)
    f = sae.encode(z)
    assert (f[..., 2] > 0).any() and (f[..., 2] == 0).any()
    found = sae.encode(S.clamp(sae, 2, 1.5)(z))
    assert torch.equal(found[:, 0], f[:, 0]), "position 0 is BOS"
    active = f[:, 1:, 2] > 0
    assert torch.allclose(found[:, 1:, 2][active], torch.tensor(1.5), atol=1e-6)
    others = [0, 1, 3, 4]
    assert torch.allclose(found[..., others], f[..., others], atol=1e-6)
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[1, 4] = where[2, 0] = True
    each = S.clamp(sae, torch.tensor([0, 1, 2]), 1.5, where)(z)
    assert torch.equal(each[~where], z[~where])
    for row, position, i in ((1, 4, 1), (2, 0, 2)):
        expected = z[row, position] + (1.5 - f[row, position, i]) * sae.W_dec[i]
        assert torch.allclose(each[row, position], expected, atol=1e-6)


def test_a_clamped_transcoder_feature_is_read_in_one_place_and_written_in_another():
    sae = S.Transcoder(6, 9, 4).requires_grad_(False)
    x, y = random_z(20, 6).reshape(2, 10, 6), random_z(20, 4, seed=3).reshape(2, 10, 4)
    f = sae.encode(x)
    found = S.clamp_mlp(sae, 3, 2.0)(x, y)
    expected = y + (2.0 - f[..., 3:4]) * sae.W_dec[3]
    assert torch.equal(found[:, 0], y[:, 0]) and torch.allclose(found[:, 1:], expected[:, 1:])
    where = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(S.ablate_mlp(sae, 3, where)(x, y), S.clamp_mlp(sae, 3, 0.0, where)(x, y))


def test_save_and_load_give_the_same_sae(tmp_path):
    sae = random_sae(threshold=0.4)
    sae.save(tmp_path / "sae.safetensors")
    loaded = S.SAE.load(tmp_path / "sae.safetensors")
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    z = random_z()
    assert torch.equal(loaded(z), sae(z))


def test_half_precision_files_get_unit_rows_back(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "sae.safetensors", torch.float16)
    loaded = S.SAE.load(tmp_path / "sae.safetensors")
    assert (loaded.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.allclose(loaded.W_enc, sae.W_enc, rtol=1e-3, atol=1e-5)


def test_shift_makes_an_sae_of_folded_activations_read_plain_ones():
    sae, z, c = random_sae(), random_z(), random_z(1, seed=5)[0]
    f = sae.encode(z)
    z_hat = sae(z)
    sae.shift(c)
    assert torch.allclose(sae.encode(z + c), f,
                          atol=1e-5) and torch.allclose(sae(z + c), z_hat + c, atol=1e-5)


def test_rescale_makes_an_sae_of_scaled_activations_read_plain_ones():
    sae, z = random_sae(), random_z()
    f, z_hat = sae.encode(z), sae(z)
    sae.rescale(5.0)
    assert torch.allclose(sae.encode(5 * z), 5 * f,
                          atol=1e-4) and torch.allclose(sae(5 * z), 5 * z_hat, atol=1e-4)


@pytest.mark.parametrize("damage", [
    lambda t: t.pop("b_enc"), lambda t: t.update(extra=torch.zeros(1)),
    lambda t: t.update(W_enc=t["W_enc"].T.contiguous()), lambda t: t["W_dec"].__setitem__(
        (0, 0), float("nan")), lambda t: t.update(W_dec=t["W_dec"][0])
], ids=["missing", "unknown", "transposed", "NaN", "one-dimensional"])
def test_files_that_are_not_an_sae_are_refused(tmp_path, damage):
    path = tmp_path / "sae.safetensors"
    random_sae().save(path)
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match="sae.safetensors"):
        S.SAE.load(path)


def test_missing_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "sae.safetensors"
    with pytest.raises(UserError, match="no SAE at"):
        S.SAE.load(path)
    random_sae().save(path)
    whole = path.read_bytes()
    for size in (0, 7, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="sae.safetensors"):
            S.SAE.load(path)
