"""sparse.py: against sae.py, which computes everything."""

import pytest
import torch

import sae as S
import sparse as P
from conftest import ROOT
from test_sae import random_sae, random_z


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def either_processor(request, monkeypatch):
    """Candidates as on a processor that multiplies bfloat16, and as on one that does not."""
    monkeypatch.setattr(P, "fast_bfloat16", lambda device: request.param)


def test_sparse_step_equals_dense_step_in_float32(either_processor):
    sae, z = random_sae(256, 2048, bias=-4.5), random_z(512, 256)
    dense, sparse = S.dense_step(sae, z, 0.3), P.sparse_step(sae, z, 0.3)
    assert 1 < dense.fired.sum() / len(z) < 200, "this test should be of a sparse batch"
    assert torch.allclose(sparse.mse, dense.mse,
                          rtol=1e-5) and torch.allclose(sparse.sparsity, dense.sparsity, rtol=1e-5)
    # a pre-activation of 1e-8 may round either way
    assert (sparse.fired - dense.fired).abs().sum() <= 2, "active entries were lost"
    for name, expected in dense.gradients.items():
        assert (sparse.gradients[name] - expected).norm() < 1e-5 * expected.norm(), \
            f"gradient of {name}"
        assert sparse.gradients[name].is_contiguous()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_no_active_entry_is_lost_among_a_million_near_zero(scale, either_processor):
    """Biases put every pre-activation within rounding distance of the threshold: candidates must
    still hold every active entry."""
    sae, z = random_sae(64, 1000), scale * random_z(1000, 64)
    with torch.no_grad():
        sae.b_dec *= scale
        x = (z - sae.b_dec).double()
        pre = x @ sae.W_enc.double()
        # one row of each column lands on 0
        sae.b_enc.copy_(-pre[torch.randint(1000, (1000,)), torch.arange(1000)])
    active = (x @ sae.W_enc.double() + sae.b_enc.double()) > 0
    found = torch.zeros_like(active)
    found[P.candidates(z - sae.b_dec, sae.W_enc.T, sae.b_enc)] = True
    assert not (active & ~found).any(), \
        "an active entry is missing from the candidates: the margin is too small"
    assert found.sum() < 1.1 * active.sum() + 1000, \
        "far more candidates than the rounding error needs"


def test_the_margin_covers_the_worst_rounding():
    """Numbers that bfloat16 rounds by half a step each, so that all errors go one way: by hand, the
    exact pre-activation is 2^-16."""
    u = 2.0**-8
    x, w = torch.tensor([[1 + u, 1 + 3 * u]]), torch.tensor([[1 + u, -1 - 3 * u]])
    bias = torch.tensor([2.0**-6 + 9 * 2.0**-16])
    assert (x.double() @ w.double().T + bias.double()).item() == 2.0**-16
    assert P.candidates(x, w, bias)[1].tolist() == [0], \
        "an active entry is lost: the margin is too small"
    rng = torch.Generator().manual_seed(0)
    # halfway between two bfloat16 numbers
    step = torch.randint(1, 64, (300, 16), generator=rng) * 2.0**-7
    sign = 1 - 2 * torch.randint(2, (300, 16), generator=rng)
    x, w = 1 + step[:, :16] + u, (1 + step.roll(1, 0) + u) * sign
    exact = x.double() @ w.double().T
    bias = (2.0**-20 - exact.diagonal()).float()                        # entry (i,i) is just active
    exact += bias.double()
    found = torch.zeros_like(exact, dtype=torch.bool)
    found[P.candidates(x, w, bias)] = True
    assert not ((exact > 0) & ~found).any()


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec"])
def test_a_weight_that_is_not_a_number_makes_the_loss_so(either_processor, name):
    """It compares as inactive, and would go unnoticed."""
    sae, z = random_sae(256, 2048, bias=-4.5).requires_grad_(False), random_z(64, 256)
    getattr(sae, name).view(-1)[7] = torch.nan
    assert S.dense_step(sae, z, 0.3).mse.isnan() and P.sparse_step(sae, z, 0.3).mse.isnan()


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_a_number_makes_the_loss_so(either_processor, bad):
    """Also where it is no target, as in a transcoder. A NaN may have either sign."""
    sae, z = random_sae(16, 64), random_z(40, 16)
    target = z.clone()
    z[7, 3] = bad
    assert not torch.isfinite(P.sparse_step(sae, z, 0.3, target).mse)


def test_active_entries_are_the_encoded_ones(tiny):
    saes = S.load_saes(ROOT / "data" / "tiny", tiny)
    tokens = torch.randint(4000, (3, 40), generator=torch.Generator().manual_seed(0))
    for layer, entries in P.active_entries(tiny, saes, tokens):
        f = saes[layer].encode(tiny.z_cat_at(tokens, [layer])[layer])
        f[:, 0] = 0
        found = torch.zeros_like(f)
        found[entries.row, entries.q, entries.feature] = entries.f
        torch.testing.assert_close(found, f, atol=2e-5, rtol=1e-4)
        assert (entries.f > 0).all()


class TopK(S.SAE):
    """The k largest pre-activations above 0."""
    k = 5

    def activate(self, pre):
        kth = pre.topk(self.k, dim=-1).values[..., -1:]
        return pre * (pre >= kth) * (pre > self.threshold)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_another_activation_function_is_noticed(k):
    sae = TopK(24, 96)
    sae.k = k
    assert not P.knows_activation(sae)
    assert P.knows_activation(random_sae(threshold=0.4))


def test_another_activation_function_is_encoded_as_it_says(either_processor):
    torch.manual_seed(0)
    sae = TopK(24, 96).requires_grad_(False)
    z = random_z(60).reshape(6, 10, 24)
    f = sae.encode(z)
    assert ((f > 0).sum(-1) <= 5).all()
    assert int((f > 0).sum()) < int((S.SAE.encode(sae, z) >= 0).sum())
    entries = P.encode_sparse(sae, z)
    found = torch.zeros_like(f)
    found[entries.row, entries.q, entries.feature] = entries.f
    torch.testing.assert_close(found, f, atol=1e-5, rtol=1e-4)


# ---- TopK ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("k, d_sae", [(1, 300), (20, 2048), (64, 100), (100, 100)])
def test_the_sparse_step_of_a_topk_sae_equals_the_dense_one(k, d_sae, dtype, either_processor):
    """Biases of either sign: some rows have more than k features above 0, some fewer."""
    sae, z = random_sae(48, d_sae).to(dtype), random_z(700, 48).to(dtype)
    sae.about["top_k"] = k
    with torch.no_grad():
        sae.b_enc += 2 * torch.randn(d_sae, generator=torch.Generator().manual_seed(1)) + 2
    z[0] = sae.b_dec                                        # an input of nothing
    z[1] *= 100
    dense, sparse = S.dense_step(sae, z, 0.0), P.sparse_step(sae, z, 0.0)
    n_active = (sae.encode(z) != 0).sum(1)
    assert (n_active == k).any() or k == d_sae
    assert (n_active < k).any() or k < 64, "some rows should have fewer"
    assert torch.equal(sparse.fired, dense.fired), "another k than the dense step's"
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(sparse.mse, dense.mse, rtol=rtol, atol=0)
    for name, expected in dense.gradients.items():
        assert (sparse.gradients[name] - expected).norm() <= rtol * expected.norm(), name


def test_topk_has_few_candidates(either_processor):
    """Half of the pre-activations are above 0, and about k of them are looked at."""
    sae, z = random_sae(256, 4096), random_z(512, 256)
    x, W = z - sae.b_dec, sae.W_enc.T.contiguous()
    all_positive = len(P.candidates(x, W, sae.b_enc)[0]) / 512
    few = len(P.candidates(x, W, sae.b_enc, 20)[0]) / 512
    assert all_positive > 1000 and 20 <= few < 100, few


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_topk_sae_is_encoded_as_it_says(either_processor, dtype):
    sae, z = random_sae(24, 300).to(dtype), random_z(60, 24).reshape(6, 10, 24).to(dtype)
    sae.about["top_k"] = 7
    f = sae.encode(z)
    assert ((f != 0).sum(-1) == 7).all()
    entries = P.encode_sparse(sae, z)
    found = torch.zeros_like(f)
    found[entries.row, entries.q, entries.feature] = entries.f
    torch.testing.assert_close(found, f, atol=1e-5, rtol=1e-4)
    assert P.knows_activation(sae)


def test_what_a_reader_makes_of_a_topk_sae_is_noticed():
    class All(S.SAE):
        def activate(self, pre):
            return pre * (pre > 0)

    sae = All(24, 96, top_k=5)
    assert not P.knows_activation(sae)
    z = random_z(30, 24)[None]
    n = int((sae.encode(z) != 0).sum())
    assert len(P.encode_sparse(sae, z).f) == n, "candidates are those of another activation"
