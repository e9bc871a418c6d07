"""The fourteen exercises of tests/course/make_copy.py, graded in order; in the project itself they
are tests like others.

References are loops over single numbers, autograd, or numbers worked out on paper: nothing is
compared with the code under test. A message says what kind of mistake an answer looks like.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attribution
import direct
import induction
import ioi
import model as models
import sae as S
import train


def near(got, expected, atol=1e-9, what="what is returned"):
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape, \
        f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    return torch.allclose(got.to(expected.dtype), expected, atol=atol, rtol=1e-6)


def fitting(message, function, *arguments):
    """What a function returns; where shapes or types do not fit in it, the message."""
    try:
        return function(*arguments)
    except NotImplementedError:                             # it is to be written
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        raise AssertionError(f"{message} ({first_line})") from None


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_sae(d_in=6, d_sae=10, threshold=0.0, top_k=0):
    """Encoder and decoder are not each other's transposes, and thresholds differ: an answer that
    takes one for another is wrong here."""
    sae = S.SAE(d_in, d_sae, torch.Generator().manual_seed(0), top_k).double()
    sae.requires_grad_(False)
    sae.W_enc += 0.3 * random(d_in, d_sae, seed=9)
    sae.b_enc += 0.3 * random(d_sae, seed=1)
    sae.b_dec += 0.3 * random(d_in, seed=2)
    sae.threshold += threshold * torch.linspace(0.5, 1.5, d_sae)
    return sae


def random_transcoder(d_in=5, d_sae=8, d_out=3):
    sae = S.Transcoder(d_in, d_sae, d_out, torch.Generator().manual_seed(0)).double()
    sae.requires_grad_(False)
    sae.b_enc += 0.3 * random(d_sae, seed=1)
    sae.b_dec += 0.3 * random(d_out, seed=2)
    return sae


# ---- 1: an attention layer up to z_cat ----


def slow_attention(q, k, v, scale, window=None, cap=None):
    """Patterns and z_cat, one number at a time."""
    B, T, H, d_head = q.shape
    pattern, z_cat = torch.zeros(B, H, T, T).double(), torch.zeros(B, T, H * d_head).double()
    for b in range(B):
        for h in range(H):
            for at in range(T):
                keys = [key for key in range(at + 1) if window is None or at - key < window]
                scores = [scale * float(q[b, at, h] @ k[b, key, h]) for key in keys]
                scores = [cap * math.tanh(s / cap) for s in scores] if cap else scores
                for key, s in zip(keys, scores):
                    pattern[b, h, at, key] = math.exp(s) / sum(map(math.exp, scores))
                    z_cat[b, at,
                          h * d_head:(h + 1) * d_head] += pattern[b, h, at, key] * v[b, key, h]
    return pattern, z_cat


def test_01_attention():
    q, k, v = (random(2, 5, 3, 4, seed=i) for i in range(3))
    before = [t.clone() for t in (q, k, v)]
    models.attend(q, k, v, 0.7)
    assert all(map(torch.equal, before, (q, k, v))), \
        "q, k and v are changed in place; make new tensors"
    for window, cap in ((None, None), (2, None), (None, 1.5), (9, 1.5)):
        heads = models.attend(q, k, v, 0.7, window, cap)
        pattern, z_cat = slow_attention(q, k, v, 0.7, window, cap)
        assert heads.pattern.shape == pattern.shape, "the pattern is (B,H,q,k)"
        assert heads.pattern.isfinite().all(), \
            "NaN: put -inf where a key is not seen, before the softmax; and every query sees itself"
        ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert not cap or (heads.pattern[..., ahead] == 0).all(), \
            "a query sees keys that stand after it, with a cap: the mask comes after the cap"
        assert (heads.pattern[..., ahead] == 0).all(), \
            "a query sees keys that stand after it: causal mask?"
        assert near(heads.pattern.sum(-1), torch.ones(2, 3, 5).double()), \
            "a query's weights should sum to 1: softmax over the keys, the last dimension, after " \
            "the mask?"
        seen = "" if window is None or near(heads.pattern > 0, pattern > 0) else \
            f"; with window {window} a query sees {window} keys, its own position among them"
        assert near(heads.pattern, pattern), \
            f"wrong pattern (window {window}, cap {cap}): " \
            "scale times q . k, then cap * tanh(score / cap), " \
            f"then the mask{seen}"
        assert heads.z_cat.shape == z_cat.shape, "z_cat is (B,q,D): heads side by side"
        assert near(heads.z_cat, z_cat), \
            "wrong z_cat: z_h = sum_k pattern[q,k] v[k], then [z_0 | z_1 | ...]"
        for name, given in (("q", q), ("k", k), ("v", v)):
            assert getattr(heads, name) is given or near(getattr(heads, name), given), \
                f"{name} goes along as it came: it is read by attribution"
        same = "without the pattern z_cat is the same: scaled_dot_product_attention takes " \
            "(B,H,q,d_head), scale=, and a mask; it knows no cap"
        fused = fitting(same, models.attend, q, k, v, 0.7, window, cap, False)
        assert near(fused.z_cat, z_cat), same
        for name, given in (("q", q), ("k", k), ("v", v)):
            kept = getattr(fused, name)
            assert kept.shape == given.shape and near(kept, given), \
                f"{name} goes along as it came, without the pattern too: (B,T,H,d_head)"
        low = fitting("the pattern is in v's type, and so is z_cat", models.attend, q.bfloat16(),
                      k.bfloat16(), v.bfloat16(), 0.7, window, cap)
        assert low.z_cat.dtype == torch.bfloat16, "the pattern is in v's type, and so is z_cat"
        assert cap or fused.pattern is None, \
            "with_pattern=False returns None for the pattern: what nobody asked for costs nothing"
        # two queries of each row, at places of their own among the five keys
        at = torch.tensor([[1, 3], [4, 0]])
        row = torch.arange(2)[:, None]
        stands = "with positions, query i of row b stands at positions[b,i] among the keys: " \
            "causal_mask takes them"
        for with_pattern in (True, False):
            few = fitting(stands, models.attend, q[row, at], k, v, 0.7, window, cap, with_pattern,
                          at)
            assert near(few.z_cat, z_cat[row, at]), stands


# ---- 2: the SAE ----


def test_02_encode_and_decode():
    """On paper: x = z - b_dec = (2, 0), pre = (2, -1, 2.5)."""
    sae = S.SAE(2, 3).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0, 1], [0, 1, -1]]))
    sae.b_enc.copy_(torch.tensor([0, -1, 0.5]))
    sae.W_dec.copy_(torch.tensor([[1, 0], [0, 1], [0.6, 0.8]]))
    sae.b_dec.copy_(torch.tensor([1.0, 2]))
    z = torch.tensor([[3.0, 2.0]])
    pre = fitting("z is (...,d_in), W_enc (d_in,d_sae)", sae.pre_activations, z)
    assert pre.shape == (1, 3), \
        f"pre_activations: (...,d_in) -> (...,d_sae), and not {tuple(pre.shape)}"
    assert torch.equal(z, torch.tensor([[3.0, 2.0]])), "z is changed in place; make a new tensor"
    assert not near(pre, torch.tensor([[4, 3, 0.5]])), "b_dec is subtracted from z, not added"
    assert not near(pre, torch.tensor([[2, 0, 2.5]])), \
        "the ReLU belongs in activate (or b_enc is missing): a pre-activation may be negative"
    assert not near(pre, torch.tensor([[2, -1, 1.7]]), 1e-6), "W_enc, not the decoder's transpose"
    assert not near(pre, torch.tensor([[3, 1, 1.5]])), "b_dec is subtracted from z before W_enc"
    assert near(pre, torch.tensor([[2, -1, 2.5]])), \
        f"the pre-activations are {pre.tolist()}, and should be [[2, -1, 2.5]]: b_enc?"
    f = sae.encode(z)
    assert not near(f, torch.tensor([[2, -1, 2.5]])), \
        "features are never negative: did you forget the ReLU?"
    assert near(f, torch.tensor([[2, 0, 2.5]])), f"f is {f.tolist()}, and should be [[2, 0, 2.5]]"
    sae.threshold.copy_(torch.tensor([2.2, 0, 2.2]))
    assert near(sae.encode(z), torch.tensor([[0, 0, 2.5]])), \
        "f is pre where pre > threshold, else 0; the threshold is not subtracted"
    sae.threshold.copy_(torch.tensor([1.9, 0, 2.6]))
    assert near(sae.encode(z), torch.tensor([[2.0, 0, 0]])), \
        "each feature has a threshold of its own: threshold is (d_sae,)"
    sae.threshold.copy_(torch.tensor([2.0, 0, 0]))
    assert near(sae.encode(z), torch.tensor([[0, 0, 2.5]])), \
        "at its threshold a feature is not active: pre > threshold, not >="
    sae.threshold.zero_()
    sae.about["top_k"] = 1
    assert near(sae.encode(z), torch.tensor([[0, 0, 2.5]])), \
        "with top_k, of the active features the top_k largest alone: keep_largest"
    assert near(sae.encode(torch.tensor([[-9.0, 2.0]])), torch.zeros(1, 3)), \
        "with top_k too, what is not above the threshold is 0: fewer may be left than top_k"
    sae.threshold.copy_(torch.tensor([0, 0, 3.0]))
    assert near(sae.encode(z), torch.tensor([[2.0, 0, 0]])), \
        "the threshold comes first: an entry that is not above it takes no place among the top_k"
    sae.threshold.zero_()
    assert near(sae.encode(torch.cat([z, z])), torch.tensor([[0, 0, 2.5], [0, 0, 2.5]])), \
        "top_k of each row, not of the batch"
    pre, before = sae.pre_activations(z), sae.pre_activations(z)
    sae.activate(pre)
    assert torch.equal(pre, before), "pre is changed in place; make a new tensor"
    del sae.about["top_k"]
    assert sae.activate(torch.tensor([[float("nan"), 1.0, -1.0]])).isnan().any(), \
        "a NaN stays one, or training would go on with it unseen: pre times the mask, not where"
    many = sae.encode(z.expand(4, 3, 2))
    assert many.shape == (4, 3, 3), "leading dimensions stay as they are: (...,d_in) -> (...,d_sae)"
    z_hat = sae.decode(torch.tensor([[2, 0, 2.5]]))
    assert near(z_hat, torch.tensor([[4.5, 4.0]]), 1e-6), \
        f"f @ W_dec + b_dec is [[4.5, 4.0]], and z_hat is {z_hat.tolist()}: b_dec?"
    sae.threshold.zero_()
    sae.requires_grad_(True)
    z_hat = sae(z)
    assert z_hat.requires_grad, "no gradient reaches a parameter: do not detach"
    z_hat.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in sae.parameters()), \
        "no gradient reaches a parameter: do not detach, and do not take .data"
    transcoder = random_transcoder()
    x = random(4, 5, seed=3)
    once = "in a transcoder subtracts_b_dec is False: b_dec is of what it writes, not of what it " \
        "reads"
    pre = fitting(once, transcoder.pre_activations, x)
    assert near(pre, x @ transcoder.W_enc + transcoder.b_enc), once


# ---- 3: loss and gradient ----


def by_autograd(sae, z, l1, target=None):
    target = z if target is None else target
    named = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    x = z - named["b_dec"] if sae.subtracts_b_dec else z
    pre = x @ named["W_enc"] + named["b_enc"]
    f = pre * (pre > sae.threshold)
    if sae.top_k:
        f = f * (f >= f.topk(sae.top_k).values[:, -1:])
    mse = ((f @ named["W_dec"] + named["b_dec"] - target) ** 2).sum(1).mean()
    sparsity = f.sum(1).mean()
    (mse + l1 * sparsity).backward()
    return mse.item(), sparsity.item(), (f > 0).sum(0), {name: p.grad for name, p in named.items()}


def test_03_loss():
    sae, z = small_sae(), random(32, 6, seed=3)
    mse, sparsity, fired, _ = by_autograd(sae, z, 0.5)
    step = S.dense_step(sae, z, 0.5)
    assert abs(float(step.mse) - mse / 6) > 1e-9, \
        "mse is a sum over d_in, and a mean over the batch only"
    assert abs(float(step.mse) - mse * 32) > 1e-9, "mse is a mean over the batch"
    assert torch.equal(z, random(32, 6, seed=3)), "z is changed in place"
    assert float(step.mse) == pytest.approx(mse), "mse: sum_d (z_hat - z)^2, mean over the batch"
    assert abs(float(step.sparsity) - 0.5 * sparsity) > 1e-9, \
        "sparsity without l1: the loss is mse + l1 * sparsity"
    assert float(step.sparsity) == pytest.approx(sparsity), \
        "sparsity: sum_i f_i, mean over the batch"
    assert step.fired.tolist() == fired.tolist(), "fired: on how many inputs each feature is active"
    assert not step.fired.is_floating_point(), \
        "fired is a count: whole numbers, as train.py adds it up"


def test_03_gradient():
    sae, z = small_sae(threshold=0.3), random(32, 6, seed=3)
    _, _, fired, expected = by_autograd(sae, z, 0.5)
    assert S.dense_step(sae, z, 0.5).fired.tolist() == fired.tolist(), \
        "a feature is active where pre > sae.threshold, which is not always 0"
    sae = small_sae()
    _, _, _, expected = by_autograd(sae, z, 0.5)
    got = S.dense_step(sae, z, 0.5).gradients
    assert set(got) == set(expected), f"gradients of {sorted(expected)} are needed"
    for name, gradient in got.items():
        assert gradient.shape == expected[name].shape, \
            f"dL/d{name} has the shape of {name}, {tuple(expected[name].shape)}, not " \
            f"{tuple(gradient.shape)}"
    assert near(got["W_dec"], expected["W_dec"]), \
        "dL/dW_dec is made of the features and the error: is a factor missing, the 2 of the " \
        "square or the 1/B of the mean, or the sign turned?"
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    through_encoder = ((2 * (sae.decode(f) - z) / 32) @ sae.W_enc + 0.5 / 32) * (f > 0)
    assert not near(got["b_enc"], through_encoder.sum(0)), \
        "dL/df goes back through the decoder: W_dec^T, not W_enc"
    assert near(got["b_enc"], expected["b_enc"]), \
        "dL/db_enc: the gradient at a pre-activation is 0 where the feature is not active; " \
        "l1 / B counts"
    assert near(got["W_enc"], expected["W_enc"]), \
        "dL/dW_enc: W_enc is multiplied with z less b_dec, and not with z"
    assert near(got["b_dec"], expected["b_dec"]), \
        "b_dec enters twice. Added to z_hat: sum over the batch of g, not a mean. Subtracted " \
        "from z before W_enc: minus W_enc @ dL/db_enc"
    for other, target, message in (
            (small_sae(threshold=0.3), None,
             "no gradient below the threshold, which is not always 0"),
            (sae, random(32, 6, seed=8), "the error is against target, where one is given"),
            (small_sae(top_k=3), None, "in a TopK SAE only what sae.encode keeps is active")):
        check_step(other, z, target, message)
    check_step(random_transcoder(), random(32, 5, seed=3), random(32, 3, seed=4),
               "in a transcoder b_dec enters once: nothing is subtracted from what it reads")


def check_step(sae, z, target, message):
    mse, _, fired, expected = by_autograd(sae, z, 0.5, target)
    step = fitting(message, S.dense_step, sae, z, 0.5, target)
    assert float(step.mse) == pytest.approx(mse), message
    assert step.fired.tolist() == fired.tolist(), message
    for name in expected:
        assert near(step.gradients[name], expected[name]), f"{message} ({name})"


# ---- 4: unit norm ----


def test_04_decoder_rows():
    """On paper: the gradient (1, 0) along the row (0.6, 0.8) is 0.6 of it."""
    sae = S.SAE(2, 2).requires_grad_(False)
    sae.W_dec.copy_(torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    gradient = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    S.project_decoder_gradient(sae, gradient)
    assert not torch.equal(gradient, torch.tensor([[1.0, 0.0], [3.0, 4.0]])), \
        "the tensor `gradient` itself is to change: gradient -= ...; what is returned is not seen"
    assert near(gradient, torch.tensor([[0.64, -0.48], [0.0, 4.0]]), 1e-6), \
        "take from each row of the gradient its part along W_dec's row: g - (g . w) w, row by row"
    sae.W_dec.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    parameter = sae.W_dec
    encoder = sae.W_enc.clone()
    sae.b_enc.fill_(1.0)
    sae.b_dec.fill_(2.0)
    S.normalise_decoder(sae)
    assert torch.equal(sae.W_enc, encoder), "only W_dec is normalised; W_enc stays"
    assert (sae.b_enc == 1).all() and (sae.b_dec == 2).all(), \
        "only W_dec is normalised; biases stay"
    assert sae.W_dec is parameter, "W_dec is changed in place: the optimiser knows this parameter"
    assert near(sae.W_dec.data, torch.tensor([[0.6, 0.8], [0.0, 1.0]]), 1e-6), \
        "each row of W_dec itself is divided by its norm, in place"


# ---- 5, 6, 7: resampling ----


def test_05_which_inputs_are_drawn():
    """An SAE that reconstructs one direction: squared errors are 0, 4 and 8."""
    sae = S.SAE(3, 2).requires_grad_(False)
    sae.W_dec.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.fill_(0.5)
    sae.b_enc[1] = -100.0               # its second feature is never active
    # from b_dec; the 9 and the 3 are no errors
    away = torch.tensor([[9.0, 0, 0], [3, 1.2, -1.6], [0, 8 ** 0.5, 0]])
    z = sae.b_dec + away
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    drawn = fitting("n places are drawn with replacement: n may be larger than the batch",
                    S.draw_badly_reconstructed, sae, z, z, 6000, generator)
    assert not torch.equal(generator.get_state(), before), "draw with the generator that is given"
    assert drawn.shape == (6000,), "n places, with replacement: n may be larger than the batch"
    shares = torch.bincount(drawn, minlength=3) / 6000
    by_distance = away.square().sum(1).square()
    assert not near(shares, by_distance / by_distance.sum(), 0.03), \
        "the error is that of the reconstruction, sae(z) - target, not the distance from b_dec"
    assert shares[0] == 0, "an input without error is never drawn: its probability is 0"
    missing = away[:, 1:].abs().sum(1).square()
    assert not near(shares, missing / missing.sum(), 0.015), \
        "squared error, not a sum of absolute errors"
    assert abs(float(shares[2]) - 2 / 3) > 0.03, \
        "the probability goes with the square of the squared error"
    assert near(shares, torch.tensor([0, 0.2, 0.8]), 0.02), \
        "an input with twice the squared error is drawn 4 times as often"
    drawn = S.draw_badly_reconstructed(sae, z, z - away, 6000, generator)
    assert (drawn == 0).float().mean() > 0.5, \
        "the error is against the target, which may be another"


def resampled():
    """An SAE of which features 2 to 9 are dead, before and after."""
    g = torch.Generator().manual_seed(0)
    sae = S.SAE(6, 10, g)
    with torch.no_grad():
        sae.b_dec += torch.randn(6, generator=g)
        sae.W_enc += 0.3 * torch.randn(6, 10, generator=g)
        sae.b_enc += 0.1 * torch.randn(10, generator=g)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, betas=(0.9, 0.9999))
    for _ in range(3):
        for parameter in sae.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=g)
        optimizer.step()
    sae.requires_grad_(False)
    z = sae.b_dec + torch.randn(7, 6, generator=g)
    before = {name: p.clone() for name, p in sae.named_parameters()}
    moments = {name: {key: value.clone() for key, value in optimizer.state[p].items()}
               for name, p in sae.named_parameters()}
    return sae, optimizer, z, before, moments


def test_06_adam_after_resampling():
    sae, optimizer, _, _, moments = resampled()
    dead = torch.arange(10) >= 2
    for name, feature_dim in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        state = optimizer.state[getattr(sae, name)]
        fitting("features lie along feature_dim: 1 in W_enc, 0 in the others; the mean is over "
                "live features along it, keepdim", S.reset_adam, state, dead, feature_dim)
        first = state["exp_avg"].movedim(feature_dim, 0)
        second = state["exp_avg_sq"].movedim(feature_dim, 0)
        before = {key: moments[name][key].movedim(feature_dim, 0)
                  for key in ("exp_avg", "exp_avg_sq")}
        assert state["step"] == moments[name]["step"], \
            f"Adam's step of {name} stays: it is one number for all features"
        assert torch.equal(first[:2], before["exp_avg"][:2]), \
            f"Adam's first moment of live features stays ({name})"
        assert torch.equal(second[:2], before["exp_avg_sq"][:2]), \
            f"Adam's second moment of live features stays ({name})"
        assert (first[2:] == 0).all(), f"Adam's first moment of {name} is 0 for new features"
        assert not (second[2:] == 0).any(), \
            (f"Adam's second moment of {name}: 0 would make the first update huge; "
             "take the mean of live ones")
        mean = before["exp_avg_sq"][:2].mean(0)
        assert torch.allclose(second[2:], mean.expand_as(second[2:]), rtol=1e-4), \
            f"Adam's second moment of {name}: element by element, the mean over live features, " \
            "along feature_dim alone"


def test_07_new_directions():
    sae, optimizer, z, before, moments = resampled()
    for nobody in (torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)):
        nothing = "nothing is done if no feature is dead, or all are"
        fitting(nothing, S.resample, sae, optimizer, nobody, z, torch.Generator().manual_seed(0))
        assert torch.equal(sae.W_dec, before["W_dec"]), nothing
    dead = torch.arange(10) >= 2
    residuals = F.normalize(z - sae(z), dim=1)
    S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(0))
    assert torch.equal(sae.b_dec, before["b_dec"]), "b_dec stays as it is"
    for name, live in (("W_dec", slice(2)), ("W_enc", (slice(None), slice(2))),
                       ("b_enc", slice(2))):
        assert torch.equal(getattr(sae, name)[live], before[name][live]), \
            f"live features stay as they are: {name}"
    rows = sae.W_dec[2:]
    assert near(rows.norm(dim=1), torch.ones(8), 1e-5), \
        "a new row of W_dec has norm 1: centre, then normalise"
    assert (rows @ residuals.T).max(1).values.min() < 0.999, \
        "the direction is that of the input less b_dec, not that of what is missing of it"
    inputs = F.normalize(z - sae.b_dec, dim=1)
    assert near((rows @ inputs.T).max(1).values, torch.ones(8), 1e-5), \
        "a new row of W_dec is an input less b_dec, normalised"
    size = 0.2 * before["W_enc"][:, :2].norm(dim=0).mean()
    assert near(sae.W_enc[:, 2:].norm(dim=0), size.expand(8), 1e-5), \
        "W_enc's column has 0.2 times the mean norm of live columns: of those alone"
    assert near(sae.W_enc[:, 2:], size * rows.T, 1e-5), \
        "W_enc's column: the direction of the same input as W_dec's row; draw once for both"
    assert (sae.b_enc[2:] == 0).all(), "b_enc of a new feature is 0"
    for name, feature_dim in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        first = optimizer.state[getattr(sae, name)]["exp_avg"].movedim(feature_dim, 0)
        assert (first[2:] == 0).all() and (first[:2] != 0).any(), \
            f"Adam forgets what it knew of dead features: reset_adam of {name}"
    check_where_directions_come_from(dead)
    check_other_targets_and_means(dead)
    check_resampled_transcoder()


def check_where_directions_come_from(dead):
    """400 inputs of which the first are the worst: rows say which were drawn."""
    sae, optimizer, _, _, _ = resampled()
    z = random(400, 6, seed=4).float() * torch.linspace(0.01, 2, 400)[:, None] + sae.b_dec
    target = random(400, 6, seed=6).float() * torch.linspace(2, 0.01, 400)[:, None] + sae.b_dec
    error = (sae(z) - target).square().sum(1)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    S.resample(sae, optimizer, dead, z, generator, target)
    assert not torch.equal(state, generator.get_state()), "draw with the generator that is given"
    towards_targets = F.normalize(target - sae.b_dec, dim=1)
    match = sae.W_dec[2:] @ towards_targets.T
    assert (match.max(1).values > 0.9999).all(), "W_dec's rows are those of the target less b_dec"
    drawn = match.argmax(1)
    assert len(drawn.unique()) > 3, "an input is drawn for each dead feature, with probability"
    match = F.normalize(sae.W_enc[:, 2:].T, dim=1) @ F.normalize(z - sae.b_dec, dim=1).T
    assert (match.argmax(1) == drawn).all(), "W_enc's columns are those of the same input, z"
    assert error[drawn].mean() > 1.3 * error.mean(), \
        "inputs are drawn by how badly they are reconstructed: draw_badly_reconstructed, with " \
        "the target"
    picked = set()
    for seed in range(3):
        sae, optimizer, _, _, _ = resampled()
        S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(seed), target)
        picked.add(tuple((sae.W_dec[2:] @ towards_targets.T).argmax(1).tolist()))
    assert len(picked) == 3, "draw with the generator that is given"


def check_other_targets_and_means(dead):
    sae, optimizer, z, _, _ = resampled()
    target = z.clone()
    target[3] += 1000                                       # badly reconstructed: this one alone
    S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(5), target)
    worst = F.normalize(target[3] - sae.b_dec, dim=0)
    assert near(sae.W_dec[2:], worst.expand(8, 6), 1e-5), \
        "the error is against the target, where one is given"
    columns = []
    for away in (0, 1):
        sae, optimizer, z, _, _ = resampled()
        S.resample(sae, optimizer, dead, z, torch.Generator().manual_seed(0),
                   mean_in=sae.b_dec + away)
        columns.append(sae.W_enc)
    assert torch.equal(*columns), \
        "train.py gives mean_in for an SAE too, whose centre is b_dec all the same"


def check_resampled_transcoder():
    sae = random_transcoder()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for parameter in sae.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    x, y, mean_in = random(7, 5, seed=3), random(7, 3, seed=4), random(5, seed=5)
    dead = torch.arange(8) >= 2
    fitting("in a transcoder inputs and targets are of different spaces", S.resample, sae,
            optimizer, dead, x, torch.Generator().manual_seed(0), y, mean_in)
    rows, columns = sae.W_dec[2:], F.normalize(sae.W_enc[:, 2:], dim=0)
    wanted = F.normalize(y - sae.b_dec, dim=1)
    assert near((rows @ wanted.T).max(1).values, torch.ones(6), 1e-9), \
        "in a transcoder a new row of W_dec is a target less b_dec, normalised"
    wanted = F.normalize(x - mean_in, dim=1)
    assert near((columns.T @ wanted.T).max(1).values, torch.ones(6), 1e-9), \
        "in a transcoder a new column of W_enc is an input less mean_in: b_dec is of another space"
    assert near(sae.pre_activations(mean_in)[2:], torch.zeros(6)), \
        "in a transcoder b_enc makes the pre-activation of mean_in 0"


# ---- 8: cross-entropy recovered ----


def test_08_cross_entropy_recovered():
    logits, tokens = random(3, 6, 9), torch.randint(9, (3, 6),
                                                    generator=torch.Generator().manual_seed(0))
    q = torch.tensor([[1, 2, 3, 4], [1, 3, 4, 4], [0, 1, 2, 3]])
    at_q = logits[torch.arange(3)[:, None], q]

    def mean(shift):
        """By hand, with the token at q + shift taken as what is predicted at q."""
        losses = [[torch.logsumexp(logits[b, t], 0) - logits[b, t, tokens[b, t + shift]]
                   for t in q[b].tolist()] for b in range(3)]
        return torch.tensor(losses).mean(1)

    got = fitting("F.cross_entropy takes (n, classes) and (n,): flatten, and back",
                  train.row_ce, at_q, tokens, q)
    assert got.shape == (3,), f"a number for each row: (R,), not {tuple(got.shape)}"
    assert not near(got, mean(0), 1e-5), "the prediction at position t is of the token at t + 1"
    assert not near(got, mean(1) * q.shape[1], 1e-5), "a mean over the positions, not a sum"
    assert not near(got, -mean(1), 1e-5), "the loss is minus the log-probability: check the sign"
    assert not near(got, mean(1) / math.log(2), 1e-5), "nats: the natural logarithm, not bits"
    assert near(got, mean(1), 1e-5), \
        "at each position q the logsumexp of all logits less the logit of the token at q + 1"
    low, logits = at_q.bfloat16(), logits.bfloat16().double()
    assert near(train.row_ce(low, tokens, q), mean(1), 1e-4), \
        "logits may be bfloat16: take them to float32 first"
    ablated, sae, clean = np.array([2.0, 5, 5]), np.array([1.0, 4, 4]), np.array([0.0, 1, 2])
    got = train.ce_recovered(ablated, sae, clean)
    assert got != pytest.approx((1 / 2 + 1 / 4 + 1 / 3) / 3), \
        "a ratio of means over rows, not a mean of ratios"
    assert got != pytest.approx(2 / 3), "what is recovered, not what is lost"
    assert got not in (pytest.approx(1), pytest.approx(1 / 9)), \
        "the same above and below the line: two means, or two sums"
    assert got == pytest.approx(1 / 3), "(CE_ablated - CE_sae) / (CE_ablated - CE_clean)"
    skewed = np.array([2.0, 2, 8]), np.array([1.0, 1, 1]), np.zeros(3)
    assert train.ce_recovered(*skewed) == pytest.approx(9 / 12), "means, not medians"
    for sae, right in ((np.array([3.0, 6, 6]), -1 / 3), (np.zeros(3), 4 / 3)):
        assert train.ce_recovered(ablated, sae, clean) == pytest.approx(right), \
            "below 0 or above 1 it stays what it is: nothing is clipped"


# ---- 9, 10, 11: attribution ----


def test_09_head_weights():
    """On paper: norms 5, 0 and 15."""
    rows = [[3.0, 4, 0, 0, 0, 15], [0.0, 0, 0, 0, 0, 0], [0.01, 0, 0.01, 0, 0, 0]]
    got = direct.head_weights(torch.tensor(rows), 3)
    assert got.isfinite().all(), "a row of zeros gives NaN: keep the denominator above 0"
    assert not near(got[0], torch.tensor([0.1, 0, 0.9]), 1e-4), "norms, not their squares"
    assert near(got[0], torch.tensor([0.25, 0, 0.75]), 1e-6), \
        "the norm of the row's slice at each head, over the sum of these norms"
    assert (got[1] == 0).all(), "a row of zeros stays 0"
    assert near(got[2], torch.tensor([0.5, 0.5, 0]), 1e-5), \
        "each row over its own sum, small rows too"
    single = "(...,D) -> (...,H): a single row is taken too"
    row = fitting(single, direct.head_weights, torch.tensor([3.0, 4, 0, 0, 0, 15]), 3)
    assert near(row, got[0], 1e-6), single


def test_10_direct_feature_attribution():
    pattern, v = random(2, 3, 4, 4).softmax(-1), random(2, 4, 3, 2, seed=1)
    sae = small_sae(threshold=0.3)
    before = pattern.clone(), v.clone()
    got = fitting("v is (B,k,H,d_head), w_enc (H*d_head,); v . w^h is (B,H,k), and gets a query "
                  "dimension before the pattern, (B,H,q,k), is multiplied with it",
                  direct.dfa, pattern, v, sae.W_enc[:, 7])
    assert torch.equal(pattern, before[0]) and torch.equal(v, before[1]), \
        "pattern or v is changed in place; make a new tensor"
    assert got.min() < 0, "contributions may be negative: no ReLU, no absolute value"
    assert got.shape == (2, 3, 4, 4), "(B,H,q,k): one number for each head, query and key"
    for b, h, q, k in ((0, 0, 1, 0), (1, 2, 3, 2), (0, 1, 2, 2)):
        w = sae.W_enc[2 * h:2 * h + 2, 7]
        by_hand = float(pattern[b, h, q, k] * (v[b, k, h] @ w))
        assert float(got[b, h, q, k]) == pytest.approx(by_hand), \
            "pattern[h,q,k] * (v[h,k] . w^h), with w^h the slice of w_enc at head h: is v taken " \
            "at the key?"
    z_cat = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2)
    pre = (z_cat - sae.b_dec) @ sae.W_enc + sae.b_enc
    b_enc = sae.b_enc.clone()
    bias = direct.feature_bias(sae)
    assert torch.equal(sae.b_enc, b_enc), "the SAE's b_enc is changed in place; make a new tensor"
    assert bias.shape == (10,), "a number for each feature"
    assert not near(bias, sae.b_enc - (sae.b_dec @ sae.W_enc).sum()), \
        "b_dec . W_enc[:,i] for each feature, and not one sum over all of them"
    assert not near(bias, sae.b_enc), "z has b_dec subtracted before W_enc: - b_dec . W_enc[:,i]"
    assert not near(bias, sae.b_enc - sae.b_dec @ sae.W_dec.T), \
        "b_dec . W_enc[:,i]: the encoder's column"
    assert not near(bias, sae.b_enc - sae.b_dec @ sae.W_enc - sae.threshold), \
        "the pre-activation is before the threshold: it is not subtracted"
    assert bias.min() < 0, "a bias may be negative: it is no activation"
    assert not near(bias, sae.b_enc + sae.b_dec @ sae.W_enc), \
        "the sign of b_dec . W_enc[:,i]: b_dec is subtracted from z"
    for i in range(10):
        total = direct.dfa(pattern, v, sae.W_enc[:, i]).sum((1, 3)) + bias[i]
        assert near(total, pre[..., i]), \
            "all of it together is the pre-activation, for every feature"


def test_11_one_step_of_recursive_attribution():
    torch.manual_seed(0)
    gpt2 = models.GPT2(models.GPT2Config(2, 2, 8, 16, 20, 12)).double().requires_grad_(False)
    for parameter in gpt2.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    saes = {layer: small_sae(8, 12, threshold=0.2) for layer in (0, 1)}
    run = attribution.trace_prompt(gpt2, saes, torch.tensor([0, 5, 7, 5, 3, 9]))
    layer, q = 1, 4
    pre = saes[1].pre_activations(run.cache[1].z_cat[0, q])
    above, below = int(pre.argmax()), int(pre.argmin())
    assert pre[below] < 0 < pre[above], "one root of either sign"
    for i in (above, below):
        check_decomposition(run, layer, q, i)


def check_decomposition(run, layer, q, i):
    saes = run.saes
    kept, m, sae = run.cache[layer], run.matrices[layer], saes[layer]
    found = attribution.read_terms(run, attribution.Place("feature", layer, q, i))
    got = {(int(h), int(p)): float(value)
           for h, p, value in zip(found.head, found.component, found.value)}
    assert isinstance(found.pre, float), "pre is a float"
    assert len(got) == len(found.value), \
        "a (head, component) stands in the list twice: has each constant its head?"
    parts, before = run.components, run.n_before[layer]
    assert max(p for _, p in got) < before, \
        "only what is in the stream before the layer: traced.n_before[layer] components"
    seen = {p for p in range(before) if parts.position[p] <= q}
    assert seen <= {p for _, p in got}, \
        "one term for each component written at or before the query: `component` is its row of " \
        "traced.components"
    late = [p for _, p in got if p >= 0 and parts.position[p] > q and got.get((0, p), 0) != 0]
    assert not late, "a query reads nothing that stands after it"
    for h in range(2):
        w = sae.W_enc[4 * h:4 * h + 4, i]
        for p in range(before):
            if (k := int(parts.position[p])) <= q:
                v = (parts.vector[p] / kept.scales["attn_in"][0, k]) @ m.W_V[h]
                expected = float(kept.pattern[0, h, q, k] * (v @ w))
                assert got.get((h, p), 0.0) == pytest.approx(expected, abs=1e-9), \
                    "pattern[h,q,k] / scale[k] * (component @ W_V[h] . w^h): both at the " \
                    "component's position? is `component` a row of traced.components, and do " \
                    "head, component and value stand in one order?"
        assert got.get((h, -1)) == pytest.approx(float(m.b_V[h] @ w)), \
            "one constant for each head, b_V[h] . w_i^h, with component -1"
    assert got.get((-1, -1)) == pytest.approx(float(sae.b_enc[i] - sae.b_dec @ sae.W_enc[:, i])), \
        "the feature's own bias, head -1 and component -1: b_enc[i] - b_dec . w_i"
    pre = float((kept.z_cat[0, q] - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i])
    assert found.pre == pytest.approx(pre), \
        "pre is the sum of all values, negative ones too: it is no activation"


# ---- 12: prefixes ----


def test_12_prefix_lengths():
    #                       BOS  a  b  c BOS a  b  c  b
    classes = torch.tensor([[-1, 1, 2, 3, -1, 1, 2, 3, 2]])
    got = induction.prefix_lengths(classes)
    assert got.shape == (1, 9, 9), "L[q,k] for every query and key"
    assert got[0, 7, 4] != 1, \
        "a run grows: L[q,k] is 1 + L[q-1,k-1] where the tokens match, and not 1"
    assert got[0, 7, 4] in (3, 4), \
        "compare the query's token with the one before key k, not with k's"
    assert (got[0, :, 1] == 0).all(), "BOS matches nothing: class -1 is no class"
    assert got[0, 7, 4] == 3, \
        "a b c stands before key 4, and up to the second c: 3. BOS before both of them ends the run"
    assert got[0, 6, 3] == 2 and got[0, 5, 2] == 1
    assert got[0, 7, 7] == 0, "the token before k is not the query's: 0"
    assert got[0, 8, 7] == 1 and got[0, 8, 3] == 1, "only b matches: 1"
    assert (got[0].triu(1) == 0).all(), "0 for k > q"
    assert (got[0, :, 0] == 0).all(), "0 for k = 0: nothing stands before it"
    # a second row; class 0 is a class like any other; "a a": the key may be the query itself
    classes = torch.tensor([[-1, 1, 2, 3, -1, 1, 2, 3, 2], [-1, 7, 7, 4, 0, 5, 0, 5, 9]])
    before = classes.clone()
    both = induction.prefix_lengths(classes)
    assert torch.equal(classes, before), "the classes are changed in place"
    assert torch.equal(both[0], got[0]), "each row on its own"
    assert not torch.equal(both[1], both[0]), "every row of the batch, not the first alone"
    assert both[1, 2, 2] == 1, "k = q counts: the query's token may equal the one before it"
    assert both[1, 7, 6] == 2, "class 0 is a class like any other; only -1 matches nothing"
    same = induction.prefix_lengths(torch.tensor([[-1, 5, 5, 5, 5, 5, 5]]))
    assert same[0, 6, 6] == 5, "the two runs may overlap, and be of any length: a a a a a a"
    assert induction.prefix_lengths(torch.tensor([[5, 6, 5, 6]]))[0, 3, 2] == 2, \
        "a run may begin at position 0, where no BOS stands there"
    for q in range(9):
        for k in range(1, q + 1):
            n = 0
            while k - 1 - n >= 0 and classes[0, q - n] == classes[0, k - 1 - n] != -1:
                n += 1
            assert got[0, q, k] == n, f"L[{q},{k}] is {int(got[0, q, k])}, and {n} tokens match"


# ---- 13: ablation and steering ----


def test_13_a_feature_removed_or_set():
    sae, z = small_sae(), random(2, 4, 6, seed=5)
    before = z.clone()
    S.ablate(sae, 2, torch.ones(2, 4, dtype=torch.bool))(z)
    assert torch.equal(z, before), "an edit returns another tensor and leaves z as it is"
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    assert S.ablate(sae, 2, everywhere)(z).dtype == z.dtype, "z_cat keeps its type"
    for other in (False, True):         # every position may be edited, the first too
        all_ = torch.full((2, 4), other)
        changed = (S.ablate(sae, 2, all_)(z) != z).any(-1)
        assert not changed.any() or other, "`where` holds nowhere, and z changed"
    sae.b_enc[2] += 5                   # active everywhere
    assert (S.ablate(sae, 2, all_)(z) != z).any(), \
        "removing a feature that is active changes nothing: is f_i, which it has already, " \
        "subtracted?"
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[:, 0] = True
    assert (S.ablate(sae, 2, first)(z)[:, 0] != z[:, 0]).any(-1).all(), \
        "position 0 is edited like any other, if `where` says so"
    sae.b_enc[2] -= 5
    where = torch.tensor([[False, True, False, False], [False, False, False, True]])
    pre = (z - sae.b_dec) @ sae.W_enc
    sae.b_enc.copy_(1 - torch.minimum(pre[0, 1], pre[1, 3]))            # active at both places
    f = torch.relu(pre + sae.b_enc)
    got = S.ablate(sae, 2, where)(z)
    assert torch.equal(got[~where], z[~where]), \
        "z changes only where `where` holds: each row at its own positions"
    expected = z[where] - f[where][:, 2:3] * sae.W_dec[2]
    assert not near(got[where], sae.decode(f * (torch.arange(10) != 2))[where]), \
        "the SAE's error stays: take f_i W_dec[i] out of z, do not put a reconstruction in its " \
        "place"
    assert not near(got[where], z[where] - f[where][:, 2:3] * sae.W_enc[:, 2]), \
        "it is the decoder's row that was written, W_dec[i], not the encoder's column"
    assert near(got[where], expected), "f_i * W_dec[i] is taken out of z_cat"
    steered = S.clamp(sae, 2, 3.0, where)(z)
    assert not near(steered[where], z[where] + 3.0 * sae.W_dec[2]), \
        "f_i becomes the value: what it has already is not added again"
    assert near(steered[where], expected + 3.0 * sae.W_dec[2]), \
        "(value - f_i) * W_dec[i] is added to z_cat"
    everywhere = S.clamp(sae, 2, 3.0)(z)
    assert torch.equal(everywhere[:, 0], z[:, 0]) and near(everywhere[where], steered[where]), \
        "without `where`, clamp calls put_in with every position but 0"
    low = z.bfloat16()
    single = small_sae().float()
    single.b_enc.copy_(sae.b_enc)
    assert S.ablate(single, 2, where)(low).dtype == torch.bfloat16, "z_cat keeps its type"
    sae.b_enc[2] = -(pre[0, 1, 2] + pre[1, 3, 2]) / 2                   # now at one of the two
    changed = (S.ablate(sae, 2, where)(z) != z).any(-1)
    assert int(changed.sum()) == 1, \
        "where the feature is not active, f is 0 and z stays: did you forget the ReLU?"
    sae.threshold[2] = 100.0
    assert torch.equal(S.ablate(sae, 2, where)(z), z), \
        "f is 0 up to the threshold, which is not always 0"
    sae.threshold[2] = 0.0
    sae.b_enc[2] = float(1 - torch.minimum(pre[0, 1, 2], pre[1, 3, 2]))     # as before
    each = fitting("feature may be one number, or one for each row of the batch",
                   S.ablate(sae, torch.tensor([2, 7]), where), z)
    both = f[1, 3, 7] * sae.W_dec[7] + f[1, 3, 2] * sae.W_dec[2]
    assert not near(each[1, 3], z[1, 3] - both), \
        "each row loses its own feature, not those of all rows"
    assert near(each[1, 3], z[1, 3] - f[1, 3, 7] * sae.W_dec[7]), \
        "with a feature for each row, each loses its own"
    sae.b_enc += 5
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    uneven = torch.tensor([[False, True, True, True], [False, False, False, True]])
    of_row = "a feature for each row of the batch, however many positions of it are edited"
    each = fitting(of_row, S.ablate(sae, torch.tensor([2, 7]), uneven), z)
    assert near(each[0, 1:], z[0, 1:] - f[0, 1:, 2:3] * sae.W_dec[2]) and \
        near(each[1, 3], z[1, 3] - f[1, 3, 7] * sae.W_dec[7]), of_row
    sae.b_enc[2] = -100.0
    assert near(S.clamp(sae, 2, 3.0, where)(z)[where], z[where] + 3.0 * sae.W_dec[2]), \
        "where the feature is not active, f_i is 0, and becomes the value all the same"
    transcoder = random_transcoder()
    x, y = random(2, 4, 5, seed=6), random(2, 4, 3, seed=7)
    f = torch.relu(x @ transcoder.W_enc + transcoder.b_enc)[..., 3:4]
    written = fitting("what is written is changed, and returned: what is read stays out of it",
                      S.clamp_mlp(transcoder, 3, 2.0, where), x, y)
    assert written.shape == y.shape and torch.equal(written[~where], y[~where]), \
        "what is written is changed, and returned: what is read stays out of it"
    assert near(written[where], (y + (2.0 - f) * transcoder.W_dec[3])[where]), \
        "f_i is what the feature makes of what is read, and goes into what is written"
    low = fitting("what is read may be bfloat16: take it to the SAE's type before encoding",
                  S.clamp_mlp(transcoder, 3, 2.0, where), x.bfloat16(), y.bfloat16())
    assert low.dtype == torch.bfloat16, "what is written keeps its type"


# ---- 14: recovered ----


def test_14_recovered_share():
    clean, zero = torch.tensor([4.0, 6.0] * 20), torch.tensor([2.0, 0.0] * 20)
    patched = torch.tensor([3.0, 6.0] * 20)
    value, interval = ioi.recovered(patched, clean, zero)
    assert isinstance(value, float), "the value is a float, and no tensor: it is written to JSON"
    assert value != pytest.approx(0.75), "a ratio of means over prompts, not a mean of ratios"
    assert value != pytest.approx(0.9), "LD_zero is subtracted above and below the line"
    assert value == pytest.approx(7 / 8), "(LD_patched - LD_zero) / (LD_clean - LD_zero)"
    assert interval[0] < interval[1], "an interval is [low, high]"
    assert interval[0] < value < interval[1] <= 1.0 and interval[1] - interval[0] < 0.2, \
        "prompts are drawn with replacement, and the same prompts above and below the line"
    # the interval on continuous numbers: in steps, an interval is a step off for one seed in twenty
    zero, gain = random(40, seed=1), 3 + random(40, seed=2)
    clean, patched = zero + gain, zero + 0.8 * gain + 0.3 * random(40, seed=4)
    value, interval = ioi.recovered(patched, clean, zero)
    rng = np.random.default_rng(0)
    draws = rng.integers(40, size=(20000, 40))
    p, z, c = patched.numpy(), zero.numpy(), clean.numpy()
    ratios = (p - z)[draws].mean(1) / (c - z)[draws].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    width, sd = interval[1] - interval[0], ratios.std()
    assert abs(width - 2 * 1.645 * sd) > 0.25 * sd, "a 95% interval: this looks like one of 90%"
    assert abs(width - 2 * 2.576 * sd) > 0.5 * sd, "a 95% interval: this looks like one of 99%"
    assert list(interval) == pytest.approx([low, high], abs=0.4 * sd), \
        "a 95% interval: the 2.5% and 97.5% quantiles of the ratios of prompts drawn anew"
    clean, zero = torch.tensor([4.0, 6.0] * 20), torch.tensor([2.0, 0.0] * 20)
    patched = torch.tensor([3.0, 6.0] * 20)
    some = torch.linspace(-1, 3, 40)                        # a quarter of them below 0
    assert ioi.recovered(zero + some, zero + some, zero)[0] == pytest.approx(1), \
        "the interval of the mean of LD_clean - LD_zero: single prompts may be below 0"
    far = clean + 10
    assert min(ioi.recovered(far, clean, zero)[1]) > 2, "nor is the interval clipped"
    assert ioi.recovered(far, clean, zero)[0] > 2, "above 1 it stays what it is: nothing is clipped"
    assert ioi.recovered(zero - 1, clean, zero)[0] < 0, "below 0 it stays what it is"
    assert ioi.recovered(patched, zero, clean) == (None, None), \
        "(None, None) where LD_clean - LD_zero is not above 0"
    noise = random(40, seed=3)
    noise += 0.1 - noise.mean()         # above 0 on average, and its interval reaches below
    assert ioi.recovered(patched, zero + noise, zero) == (None, None), \
        "(None, None) where LD_clean - LD_zero is not clearly above 0: its interval reaches 0"
