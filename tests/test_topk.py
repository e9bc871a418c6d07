"""A reader's edit of `SAE.activate`, here to TopK: training, evaluation, features.py and ablation all agree
with a loop over single numbers, and no other line of the project is touched."""

import contextlib
import io
import json

import pytest
import torch

import data
import features
import sae as S
import train
from sparse import active_entries

K = 12


def topk(self, pre):
    """The K largest pre-activations, of those above 0."""
    kth_largest = pre.topk(K, dim=-1).values[..., -1:]
    return pre * (pre >= kth_largest) * (pre > self.threshold)


@pytest.fixture(scope="module", autouse=True)
def edited():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S.SAE, "activate", topk)
        yield


@pytest.fixture(scope="module")
def trained(edited, tmp_path_factory):
    """A short training -> its folder, what it printed."""
    folder = tmp_path_factory.mktemp("topk")
    config = train.TrainConfig(layers=(1, 2), d_sae=128, n_tokens=20_000, batch_size=256, lr=2.4e-3,
                               warmup=10, n_eval_rows=8, block_mib=8, device="cpu",
                               out=str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.train(config)
    return folder / "tiny", printed.getvalue(), config


def by_loop(sae, z):                                        # (d_in,) -> {feature: activation}
    """The features of one input, one number at a time."""
    pre = {i: float((z - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]) for i in range(sae.d_sae)}
    largest = sorted(pre, key=pre.get, reverse=True)[:K]
    return {i: pre[i] for i in largest if pre[i] > 0}


def test_training_says_that_it_took_the_dense_step(trained):
    _, printed, _ = trained
    for layer in (1, 2):
        assert f"layer {layer}: the sparse step does not give what dense_step gives" in printed
    assert printed.count("Taking the dense step") == 2


def test_it_trains_topk_and_not_relu(trained, tiny):
    """The last step's gradient is that of a TopK SAE: autograd through a mask made by the loop."""
    folder, _, config = trained
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line["L1"]["l0"] <= K and line["L2"]["l0"] <= K for line in log)
    assert log[-1]["L1"]["mse"] < 0.9 * log[0]["L1"]["mse"]
    sae = S.SAE.load(folder / "L1").double()
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 1))
    z = tiny.z_cat_at(rows, [1])[1][0, 1:20].double()
    mask = torch.zeros(len(z), sae.d_sae, dtype=torch.float64)
    for n, one in enumerate(z):
        mask[n, list(by_loop(sae, one))] = 1
    named = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    f = ((z - named["b_dec"]) @ named["W_enc"] + named["b_enc"]) * mask
    mse = ((f @ named["W_dec"] + named["b_dec"] - z) ** 2).sum(1).mean()
    (mse + 0.2 * f.sum(1).mean()).backward()
    step = S.dense_step(sae, z, 0.2)
    assert float(step.mse) == pytest.approx(mse.item())
    assert torch.equal(step.fired, mask.sum(0).long())
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(gradient, named[name].grad, atol=1e-9, rtol=1e-9)


def test_evaluation_counts_and_reconstructs_as_the_loop_does(trained, tiny):
    folder, _, config = trained
    sae = S.SAE.load(folder / "L2")
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 8))[:2, :30]
    found = train.evaluate(tiny, {2: sae}, rows, {2: torch.zeros(256)})[2]
    z = tiny.z_cat_at(rows, [2])[2]
    n_active, z_hat = [], z.clone()
    for b in range(2):
        for t in range(1, 30):
            f = by_loop(sae, z[b, t])
            n_active.append(len(f))
            z_hat[b, t] = sae.b_dec + sum(value * sae.W_dec[i] for i, value in f.items())
    assert found["l0"] == pytest.approx(sum(n_active) / len(n_active))
    logits, _ = tiny(rows, edit_z={2: lambda _: z_hat})
    losses = -logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])[:, 1:, 0]
    assert found["ce_sae"] == pytest.approx(float(losses.mean()), abs=1e-4)


def test_features_finds_the_places_that_the_loop_finds(trained, tiny):
    folder, _, config = trained
    saes = {2: S.SAE.load(folder / "L2")}
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 8))[:3, :25]
    z = tiny.z_cat_at(rows, [2])[2]
    expected = {(b, t, i): value for b in range(3) for t in range(1, 25)
                for i, value in by_loop(saes[2], z[b, t]).items()}
    found = {}
    for _, entries in active_entries(tiny, saes, rows):
        for row, q, i, f in zip(*(column.tolist() for column in entries)):
            found[row, q, i] = f
    assert found.keys() == expected.keys()
    assert all(found[place] == pytest.approx(expected[place], abs=1e-4) for place in found)
    tokens, collected = features.collect_places(tiny, saes, [rows], 3)
    assert int(collected[2].n.sum()) == len(expected)
    top = features.read_places(tiny, saes, tokens, collected)[2].top
    for n, (row, q, i) in enumerate(zip(*(c.tolist() for c in collected[2].top[:3]))):
        for t in range(max(1, q - features.BEFORE), min(25, q + features.AFTER + 1)):
            shown = float(top.window[n, t - q + features.BEFORE])
            assert shown == pytest.approx(expected.get((row, t, i), 0.0), abs=2e-3), \
                "half precision"


def test_ablation_takes_out_what_the_loop_finds(trained, tiny):
    folder, _, config = trained
    sae = S.SAE.load(folder / "L1")
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 8))[:2, :20]
    z = tiny.z_cat_at(rows, [1])[1]
    f = {(b, t): by_loop(sae, z[b, t]) for b in range(2) for t in range(20)}
    strongest = max(f[1, 7], key=f[1, 7].get)
    pre = (z[1, 9] - sae.b_dec) @ sae.W_enc + sae.b_enc
    runner_up = int(pre.argsort(descending=True)[K])        # a ReLU would have it active
    where = torch.zeros(2, 20, dtype=torch.bool)
    where[1, 7] = where[0, 9] = where[1, 9] = True
    for feature in (strongest, runner_up):
        ablated = S.ablate(sae, feature, where)(z)
        for b in range(2):
            for t in range(20):
                removed = f[b, t].get(feature, 0.0) * sae.W_dec[feature] if where[b, t] else 0.0
                torch.testing.assert_close(ablated[b, t], z[b, t] - removed, atol=1e-5, rtol=1e-5)
    assert runner_up not in f[1, 9] and float(pre[runner_up]) > 0, \
        "this test should tell the two apart"
