"""The twelve exercises of tests/course/make_copy.py, graded in order; in the project itself they
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


def near(got, expected, atol=1e-9):
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape, \
        f"the shape is {tuple(got.shape)}, not {tuple(expected.shape)}"
    return torch.allclose(got.to(expected.dtype), expected, atol=atol, rtol=1e-6)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_sae(d_in=6, d_sae=10, threshold=0.0):
    """Encoder and decoder are not each other's transposes, and thresholds differ: an answer that
    takes one for another is wrong here."""
    sae = S.SAE(d_in, d_sae, torch.Generator().manual_seed(0)).double().requires_grad_(False)
    sae.W_enc += 0.3 * random(d_in, d_sae, seed=9)
    sae.b_enc += 0.3 * random(d_sae, seed=1)
    sae.b_dec += 0.3 * random(d_in, seed=2)
    sae.threshold += threshold * torch.linspace(0.5, 1.5, d_sae)
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
    for window, cap in ((None, None), (2, None), (None, 1.5), (9, 1.5)):
        heads = models.attend(q, k, v, 0.7, window, cap)
        pattern, z_cat = slow_attention(q, k, v, 0.7, window, cap)
        assert heads.pattern.shape == pattern.shape, "the pattern is (B,H,q,k)"
        assert heads.pattern.isfinite().all(), \
            "NaN: put -inf where a key is not seen, before the softmax; and every query sees itself"
        ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert (heads.pattern[..., ahead] == 0).all(), \
            "a query sees keys that stand after it: causal mask?"
        assert near(heads.pattern.sum(-1), torch.ones(2, 3, 5).double()), \
            "a query's weights should sum to 1: softmax over the keys, the last dimension, after the mask?"
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
        assert near(models.attend(q, k, v, 0.7, window, cap, with_pattern=False).z_cat, z_cat), \
            "without the pattern z_cat is the same"


# ---- 2: the SAE ----


def test_02_encode_and_decode():
    """On paper: x = z - b_dec = (2, 0), pre = (2, -1, 2.5)."""
    sae = S.SAE(2, 3).requires_grad_(False)
    sae.W_enc.copy_(torch.tensor([[1.0, 0, 1], [0, 1, -1]]))
    sae.b_enc.copy_(torch.tensor([0, -1, 0.5]))
    sae.W_dec.copy_(torch.tensor([[1, 0], [0, 1], [0.6, 0.8]]))
    sae.b_dec.copy_(torch.tensor([1.0, 2]))
    z = torch.tensor([[3.0, 2.0]])
    pre = sae.pre_activations(z)
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
    z_hat = sae.decode(torch.tensor([[2, 0, 2.5]]))
    assert near(z_hat, torch.tensor([[4.5, 4.0]]), 1e-6), \
        f"f @ W_dec + b_dec is [[4.5, 4.0]], and z_hat is {z_hat.tolist()}: b_dec?"


# ---- 3: loss and gradient ----


def by_autograd(sae, z, l1):
    named = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    pre = (z - named["b_dec"]) @ named["W_enc"] + named["b_enc"]
    f = pre * (pre > sae.threshold)
    mse, sparsity = ((f @ named["W_dec"] + named["b_dec"] - z) ** 2).sum(1).mean(), f.sum(1).mean()
    (mse + l1 * sparsity).backward()
    return mse.item(), sparsity.item(), (f > 0).sum(0), {name: p.grad for name, p in named.items()}


def test_03_loss():
    sae, z = small_sae(), random(32, 6, seed=3)
    mse, sparsity, fired, _ = by_autograd(sae, z, 0.5)
    step = S.dense_step(sae, z, 0.5)
    assert abs(float(step.mse) - mse / 6) > 1e-9, \
        "mse is a sum over d_in, and a mean over the batch only"
    assert abs(float(step.mse) - mse * 32) > 1e-9, "mse is a mean over the batch"
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
    assert near(got["W_dec"], expected["W_dec"]), "dL/dW_dec = f^T (2 (z_hat - z) / B)"
    assert near(got["b_enc"], expected["b_enc"]), \
        "dL/db_enc: the gradient at a pre-activation is 0 where the feature is not active; l1 / B counts"
    assert near(got["W_enc"], expected["W_enc"]), \
        "dL/dW_enc = (z - b_dec)^T dL/dpre: b_dec is in there too"
    assert near(got["b_dec"], expected["b_dec"]), \
        "b_dec enters twice: it is added to z_hat, and subtracted from z before W_enc"


# ---- 4: unit norm ----


def test_04_decoder_rows():
    """On paper: the gradient (1, 0) along the row (0.6, 0.8) is 0.6 of it."""
    sae = S.SAE(2, 2).requires_grad_(False)
    sae.W_dec.copy_(torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    gradient = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    S.project_decoder_gradient(sae, gradient)
    assert not torch.equal(gradient, torch.tensor([[1.0, 0.0], [3.0, 4.0]])), \
        "it is changed in place"
    assert near(gradient, torch.tensor([[0.64, -0.48], [0.0, 4.0]]), 1e-6), \
        "take from each row of the gradient its part along W_dec's row: g - (g . w) w, row by row"
    sae.W_dec.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    parameter = sae.W_dec
    S.normalise_decoder(sae)
    assert sae.W_dec is parameter, "W_dec is changed in place: the optimiser knows this parameter"
    assert near(sae.W_dec.data, torch.tensor([[0.6, 0.8], [0.0, 1.0]]), 1e-6), \
        "each row is divided by its norm"


# ---- 5: resampling ----


def test_05_resampling():
    d_in, d_sae = 6, 4000
    sae = S.SAE(d_in, d_sae, torch.Generator().manual_seed(0)).requires_grad_(False)
    sae.b_dec += 0.5
    sae.b_enc -= 100.0                  # nothing is active: z_hat = b_dec
    sae.b_enc[:4] = 0.0
    sae.W_enc[:, :4] = 0
    sae.requires_grad_(True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.0, 0.9999))
    for parameter in sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    sae.requires_grad_(False)
    sae.W_enc[:, :4] = torch.eye(d_in)[:, :4] * torch.tensor([1.0, 2, 3, 4])
    sae.b_enc[:4] = -50.0
    dead = torch.arange(d_sae) >= 4
    # squared errors 0, 1 and 2
    z = sae.b_dec + torch.tensor([[0.0] * 6, [1.0, 0, 0, 0, 0, 0], [0, math.sqrt(2), 0, 0, 0, 0]])
    live = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in sae.named_parameters()}
    for nobody in (torch.zeros_like(dead), torch.ones_like(dead)):
        S.resample(sae, optimizer, nobody, z, torch.Generator().manual_seed(0))
        assert torch.equal(sae.W_dec, live["W_dec"]), \
            "nothing is done if no feature is dead, or all are"
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    S.resample(sae, optimizer, dead, z, generator)
    assert not torch.equal(generator.get_state(), before), "draw with the generator that is given"
    assert torch.equal(sae.W_dec[:4], live["W_dec"][:4]), "live features stay as they are"
    assert torch.equal(sae.W_enc[:, :4], live["W_enc"][:, :4]), "live features stay as they are"
    rows = sae.W_dec[4:]
    assert rows.norm(dim=1).min() > 0, "an input without error was drawn: its probability is 0"
    assert near(rows.norm(dim=1), torch.ones(d_sae - 4), 1e-5), \
        "a new row of W_dec has norm 1: centre, then normalise"
    share = float((rows[:, 1] > 0.9).float().mean())
    assert ((rows[:, 0] > 0.99) | (rows[:, 1] > 0.99)).all(), \
        "a new row is an input less b_dec, normalised; an input without error is never drawn"
    assert abs(share - 2 / 3) > 0.04, "the probability goes with the square of the squared error"
    assert abs(share - 4 / 5) < 0.04, \
        "an input with twice the squared error is drawn 4 times as often"
    assert near(sae.W_enc[:, 4:], 0.2 * 2.5 * rows.T, 1e-5), \
        "W_enc's column: the same direction at 0.2 times the mean norm of live columns, which is 2.5"
    assert (sae.b_enc[4:] == 0).all(), "b_enc of a new feature is 0"
    for name, feature_dim in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        state = optimizer.state[getattr(sae, name)]
        first, second = state["exp_avg"].movedim(feature_dim,
                                                 0), state["exp_avg_sq"].movedim(feature_dim, 0)
        assert (first[4:] == 0).all(), f"Adam's first moment of {name} is 0 for new features"
        assert not (second[4:] == 0).any(), \
            (f"Adam's second moment of {name}: 0 would make the first update huge; "
             "take the mean of live ones")
        mean = moments[name].movedim(feature_dim, 0)[:4].mean(0)
        assert torch.allclose(second[4:], mean.expand_as(second[4:]), rtol=1e-4), \
            f"Adam's second moment of {name}: element by element, the mean over live features"


# ---- 6: cross-entropy recovered ----


def test_06_cross_entropy_recovered():
    logits, tokens = random(3, 6, 9), torch.randint(9, (3, 6),
                                                    generator=torch.Generator().manual_seed(0))
    q = torch.tensor([[1, 2, 3, 4], [1, 3, 4, 4], [0, 1, 2, 3]])
    at_q = logits[torch.arange(3)[:, None], q]

    def mean(shift):
        """By hand, with the token at q + shift taken as what is predicted at q."""
        losses = [[torch.logsumexp(logits[b, t], 0) - logits[b, t, tokens[b, t + shift]]
                   for t in q[b].tolist()] for b in range(3)]
        return torch.tensor(losses).mean(1)

    got = train.row_ce(at_q, tokens, q)
    assert not near(got, mean(0), 1e-5), "the prediction at position t is of the token at t + 1"
    assert near(got, mean(1), 1e-5), \
        "at each position q the logsumexp of all logits less the logit of the token at q + 1"
    ablated, sae, clean = np.array([2.0, 5.0]), np.array([1.0, 4.0]), np.array([0.0, 1.0])
    got = train.ce_recovered(ablated, sae, clean)
    assert got != pytest.approx(0.375), "a ratio of means over rows, not a mean of ratios"
    assert got != pytest.approx(2 / 3), "what is recovered, not what is lost"
    assert got == pytest.approx(1 / 3), "(CE_ablated - CE_sae) / (CE_ablated - CE_clean)"


# ---- 7, 8, 9: attribution ----


def test_07_head_weights():
    """On paper: norms 5, 0 and 15."""
    got = direct.head_weights(torch.tensor([[3.0, 4, 0, 0, 0, 15], [0.0, 0, 0, 0, 0, 0]]), 3)
    assert got.isfinite().all(), "a row of zeros gives NaN: keep the denominator above 0"
    assert not near(got[0], torch.tensor([0.1, 0, 0.9]), 1e-4), "norms, not their squares"
    assert near(got[0], torch.tensor([0.25, 0, 0.75]), 1e-6), \
        "the norm of the row's slice at each head, over the sum of these norms"
    assert (got[1] == 0).all(), "a row of zeros stays 0"
    assert near(direct.head_weights(torch.tensor([3.0, 4, 0, 0, 0, 15]), 3), got[0], 1e-6), \
        "(...,D) -> (...,H): a single row is taken too"


def test_08_direct_feature_attribution():
    pattern, v, sae = random(2, 3, 4, 4).softmax(-1), random(2, 4, 3, 2, seed=1), small_sae()
    got = direct.dfa(pattern, v, sae.W_enc[:, 7])
    assert got.shape == (2, 3, 4, 4), "(B,H,q,k): one number for each head, query and key"
    for b, h, q, k in ((0, 0, 1, 0), (1, 2, 3, 2), (0, 1, 2, 2)):
        w = sae.W_enc[2 * h:2 * h + 2, 7]
        assert float(got[b, h, q, k]) == pytest.approx(float(pattern[b, h, q, k] * (v[b, k, h] @ w))), \
            "pattern[h,q,k] * (v[h,k] . w^h), with w^h the slice of w_enc at head h: is v taken at the key?"
    z_cat = torch.einsum("bhqk,bkhd->bqhd", pattern, v).flatten(-2)
    pre = (z_cat - sae.b_dec) @ sae.W_enc + sae.b_enc
    bias = direct.feature_bias(sae)
    assert bias.shape == (10,), "a number for each feature"
    assert not near(bias, sae.b_enc), "z has b_dec subtracted before W_enc: - b_dec . W_enc[:,i]"
    assert near(got.sum((1, 3)) + bias[7], pre[..., 7]), "all of it together is the pre-activation"


def test_09_one_step_of_recursive_attribution():
    torch.manual_seed(0)
    gpt2 = models.GPT2(models.GPT2Config(2, 2, 8, 16, 20, 12)).double().requires_grad_(False)
    for parameter in gpt2.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    saes = {layer: small_sae(8, 12) for layer in (0, 1)}
    run = attribution.trace_prompt(gpt2, saes, torch.tensor([0, 5, 7, 5, 3, 9]))
    layer, q, i = 1, 4, 3
    kept, m, sae = run.cache[layer], run.matrices[layer], saes[layer]
    found = attribution.decompose(run, layer, q, i)
    got = {(int(h), int(p)): float(value)
           for h, p, value in zip(found.head, found.component, found.value)}
    assert len(got) == len(found.value), "a (head, component) stands in the list twice"
    parts, before = run.components, run.n_before[layer]
    assert max(p for _, p in got) < before, \
        "only what is in the stream before the layer: traced.n_before[layer] components"
    late = [p for _, p in got if p >= 0 and parts.position[p] > q and got.get((0, p), 0) != 0]
    assert not late, "a query reads nothing that stands after it"
    for h in range(2):
        w = sae.W_enc[4 * h:4 * h + 4, i]
        for p in range(before):
            if (k := int(parts.position[p])) <= q:
                v = (parts.vector[p] / kept.scales["attn_in"][0, k]) @ m.W_V[h]
                expected = float(kept.pattern[0, h, q, k] * (v @ w))
                assert got.get((h, p), 0.0) == pytest.approx(expected, abs=1e-9), \
                    "pattern[h,q,k] / scale[k] * (component @ W_V[h] . w^h): both at the component's position? " \
                    "is `component` a row of traced.components?"
        assert got.get((h, -1)) == pytest.approx(float(m.b_V[h] @ w)), \
            "one constant for each head, b_V[h] . w_i^h, with component -1"
    assert got.get((-1, -1)) == pytest.approx(float(sae.b_enc[i] - sae.b_dec @ sae.W_enc[:, i])), \
        "the feature's own bias, head -1 and component -1: b_enc[i] - b_dec . w_i"
    pre = float((kept.z_cat[0, q] - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i])
    assert found.pre == pytest.approx(pre), "pre is the sum of all values"


# ---- 10: prefixes ----


def test_10_prefix_lengths():
    #                       BOS  a  b  c BOS a  b  c  b
    classes = torch.tensor([[-1, 1, 2, 3, -1, 1, 2, 3, 2]])
    got = induction.prefix_lengths(classes)
    assert got.shape == (1, 9, 9), "L[q,k] for every query and key"
    assert got[0, 7, 4] in (3, 4), \
        "compare the query's token with the one before key k, not with k's"
    assert (got[0, :, 1] == 0).all(), "BOS matches nothing: class -1 is no class"
    assert got[0, 7, 4] == 3, "a b c stands before key 4, and up to the second c: 3"
    assert got[0, 6, 3] == 2 and got[0, 5, 2] == 1
    assert got[0, 7, 7] == 0, "the token before k is not the query's: 0"
    assert got[0, 8, 7] == 1 and got[0, 8, 3] == 1, "only b matches: 1"
    assert (got[0].triu(1) == 0).all(), "0 for k > q"
    assert (got[0, :, 0] == 0).all(), "0 for k = 0: nothing stands before it"
    for q in range(9):
        for k in range(1, q + 1):
            n = 0
            while k - 1 - n >= 0 and classes[0, q - n] == classes[0, k - 1 - n] != -1:
                n += 1
            assert got[0, q, k] == n, f"L[{q},{k}] is {int(got[0, q, k])}, and {n} tokens match"


# ---- 11: ablation ----


def test_11_ablation_at_own_positions():
    sae, z = small_sae(), random(2, 4, 6, seed=5)
    where = torch.tensor([[False, True, False, False], [False, False, False, True]])
    pre = (z - sae.b_dec) @ sae.W_enc
    sae.b_enc.copy_(1 - torch.minimum(pre[0, 1], pre[1, 3]))            # active at both places
    f = torch.relu(pre + sae.b_enc)
    before = z.clone()
    got = S.ablate(sae, 2, where)(z)
    assert torch.equal(z, before), "an edit returns another tensor and leaves z as it is"
    assert torch.equal(got[~where], z[~where]), \
        "z changes only where `where` holds: each row at its own positions"
    expected = z[where] - f[where][:, 2:3] * sae.W_dec[2]
    assert not near(got[where], sae.decode(f * (torch.arange(10) != 2))[where]), \
        "the SAE's error stays: take f_i W_dec[i] out of z, do not put a reconstruction in its place"
    assert near(got[where], expected), "f_i * W_dec[i] is taken out of z_cat"
    sae.b_enc[2] = -(pre[0, 1, 2] + pre[1, 3, 2]) / 2                   # now at one of the two
    changed = (S.ablate(sae, 2, where)(z) != z).any(-1)
    assert int(changed.sum()) == 1, \
        "where the feature is not active, f is 0 and z stays: did you forget the ReLU?"
    sae.threshold[2] = 100.0
    assert torch.equal(S.ablate(sae, 2, where)(z), z), \
        "f is 0 up to the threshold, which is not always 0"
    each = S.ablate(sae, torch.tensor([2, 7]), where)(z)
    assert near(each[1, 3], z[1, 3] - f[1, 3, 7] * sae.W_dec[7]), \
        "with a feature for each row, each loses its own"


# ---- 12: recovered ----


def test_12_recovered_share():
    clean, zero = torch.tensor([4.0, 6.0] * 20), torch.tensor([2.0, 0.0] * 20)
    patched = torch.tensor([3.0, 6.0] * 20)
    value, interval = ioi.recovered(patched, clean, zero)
    assert value != pytest.approx(0.75), "a ratio of means over prompts, not a mean of ratios"
    assert value != pytest.approx(0.9), "LD_zero is subtracted above and below the line"
    assert value == pytest.approx(7 / 8), "(LD_patched - LD_zero) / (LD_clean - LD_zero)"
    assert interval[0] < value < interval[1] <= 1.0 and interval[1] - interval[0] < 0.2, \
        "prompts are drawn with replacement, and the same prompts above and below the line"
    assert ioi.recovered(patched, zero, clean) == (None, None), \
        "(None, None) where LD_clean - LD_zero is not above 0"
    noise = F.normalize(random(40), dim=0)
    assert ioi.recovered(patched, zero + noise, zero) == (None, None), \
        "(None, None) where LD_clean - LD_zero is not clearly above 0: its interval reaches 0"
