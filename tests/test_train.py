"""train.py: a short run from start to end, its evaluation against a loop, its exact resumption, and
what it says to bad input."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import sae as S
import train as T
from conftest import GEMMA_SHAPES, GPT2_SHAPES, ROOT, program, random_gemma, random_gpt2
from data.flags import parse_flags
from data.errors import UserError
from data.team import Team
from data.weights import TINY

SHORT = T.TrainConfig(layers=(0, 2), d_sae=128, n_tokens=12_000, batch_size=256, lr=2.4e-3,
                      warmup=10, resample_every=10, n_eval_rows=8, block_mib=8)


def run_short(folder, **changes):
    return T.train(dataclasses.replace(SHORT, out=str(folder), **changes))


# ---- a run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder / "tiny", run_short(folder)


def test_a_run_writes_what_the_design_promises(finished):
    folder, metrics = finished
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "L0/config.json", "L0/metrics.json", "L0/sae.safetensors", "L2/config.json", "L2/metrics.json",
        "L2/sae.safetensors",
        "log.jsonl", "model.json", "training.png"], \
        "a file is missing, or a temporary one was left behind"
    for layer in (0, 2):
        written = json.loads((folder / f"L{layer}" / "metrics.json").read_text())
        assert written == metrics[layer]
        for key in ("l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "explained_variance"):
            low, high = written[key + "_ci"]
            assert low <= written[key] <= high, f"{key} is outside its own interval"
        assert 0 <= written["dead_fraction"] <= 1
        assert written["n_dead_tokens"] == written["n_train_tokens"] == 11_776
        assert written["n_eval_tokens"] == 8 * 127
        assert written["tokens_per_second"] > 0
        assert written["seed"] == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["L0"]["mse"] < log[0]["L0"]["mse"], "training did not lower the error"


def test_saved_decoders_have_unit_norm(finished):
    for layer in (0, 2):
        assert (S.SAE.load(finished[0] / f"L{layer}" / "sae.safetensors").W_dec.norm(dim=1)
                - 1).abs().max() < 1e-5


def test_same_seed_same_bytes_and_another_seed_others(finished, tmp_path):
    run_short(tmp_path / "again")
    run_short(tmp_path / "other", seed=1)
    for layer in (0, 2):
        for name in ("sae.safetensors", "config.json"):
            assert (finished[0] / f"L{layer}"
                    / name).read_bytes() == (tmp_path / "again" / "tiny" / f"L{layer}"
                                             / name).read_bytes(), name
        assert (finished[0] / f"L{layer}"
                / "sae.safetensors").read_bytes() != (tmp_path / "other" / "tiny" / f"L{layer}"
                                                      / "sae.safetensors").read_bytes()


def test_a_topk_run_keeps_k_features_and_every_program_reads_it(tmp_path, tiny):
    """l1 has no part in it, k goes with the file, and the sparse step is taken."""
    metrics = run_short(tmp_path, top_k=9, l1=5.0)
    folder = tmp_path / "tiny"
    log = T.read_log(folder / "log.jsonl")
    assert all(line[layer]["l0"] <= 9 for line in log for layer in ("L0", "L2"))
    assert log[-1]["L0"]["mse"] < 0.9 * log[0]["L0"]["mse"]
    assert 8 < metrics[0]["l0"] <= 9
    config = json.loads((folder / "L0" / "config.json").read_text())
    assert config["top_k"] == 9 and config["l1_of_layer"] == 0.0
    saes = S.load_saes(folder, tiny)
    assert saes[0].top_k == saes[2].top_k == 9
    tokens = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 2))
    f = saes[2].encode(tiny.z_cat_at(tokens, [2])[2])
    assert int((f != 0).sum(-1).max()) == 9
    for name, more in (("explorer", []), ("features", ["--n-tokens", 2032])):
        done = program(name, "--saes", folder, "--out", tmp_path, *more)
        assert done.returncode == 0, done.stderr


def test_topk_by_the_sparse_and_the_dense_step_is_the_same_run(tmp_path, monkeypatch):
    curves = []
    for step in (T.sparse_step, T.dense_step):
        monkeypatch.setattr(T.Learner, "step_function", lambda learner: step)
        run_short(tmp_path / step.__name__, resample_times=0, top_k=9)
        log = T.read_log(tmp_path / step.__name__ / "tiny" / "log.jsonl")
        curves.append([line[layer]["mse"] for line in log for layer in ("L0", "L2")])
    # which of two features is among the k can hang on the last bit: then the runs part, a little
    assert curves[0][:20] == pytest.approx(curves[1][:20], rel=1e-4)
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)


def test_each_layer_may_have_a_k_of_its_own(tmp_path, tiny):
    """One without a k is trained by l1."""
    run_short(tmp_path, top_k=(5, 0), l1=0.3)
    saes = S.load_saes(tmp_path / "tiny", tiny)
    assert saes[0].top_k == 5 and saes[2].top_k == 0
    config = json.loads((tmp_path / "tiny" / "L2" / "config.json").read_text())
    assert config["l1_of_layer"] == 0.3
    with pytest.raises(UserError, match="--top-k has 3 values for 2 layers"):
        run_short(tmp_path / "other", top_k=(5, 0, 7))


@pytest.mark.parametrize("k", [-1, 129])
def test_a_k_that_cannot_be_is_refused(tmp_path, k):
    with pytest.raises(UserError, match="--top-k must be between 0 and the number of features"):
        run_short(tmp_path, top_k=k)


def test_a_batch_is_a_copy_that_no_refill_overwrites(tiny):
    config = dataclasses.replace(SHORT, n_tokens=60_000)
    tokenizer = data.load_tokenizer("tiny")
    buffer = T.ActivationBuffer(tiny, tokenizer, config, (0,), torch.device("cpu"))
    batches = [(sites[0][0], sites[0][0].clone()) for _, sites in buffer.batches(0)]
    assert len(batches) > 2 * buffer.steps_per_block, "this test needs several blocks"
    for kept, copy in batches:
        assert torch.equal(kept, copy), \
            "the block was refilled under a batch that had been handed out"


def test_every_activation_of_a_block_is_used_once_and_bos_never(tiny):
    config = dataclasses.replace(SHORT, batch_size=127, n_tokens=127 * 64, block_mib=1000)
    buffer = T.ActivationBuffer(tiny, data.load_tokenizer("tiny"), config, (0,),
                                torch.device("cpu"))
    got = torch.cat([sites[0][0] for _, sites in buffer.batches(0)])
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "train", 128, buffer.n_rows, 0))
    expected = torch.cat(
        [tiny.z_cat_bfloat16(part, [0])[0][:, 1:].flatten(0, 1) for part in rows.split(64)])
    assert len(got) == len(expected)
    direction = torch.randn(256, generator=torch.Generator().manual_seed(0)).double()
    order = lambda z: z[(z.double() @ direction).argsort()]
    assert torch.equal(order(got), order(expected))
    assert not torch.allclose(got, expected), "the block was not shuffled"


def test_every_process_of_a_team_has_part_of_a_batch_that_fits_one_row(tiny):
    config = dataclasses.replace(SHORT, batch_size=64, n_tokens=64)
    shares = []
    for rank in range(2):
        buffer = T.ActivationBuffer(tiny, data.load_tokenizer("tiny"), config, (0,),
                                    torch.device("cpu"), Team(rank, 2))
        [(_, sites)] = buffer.batches(0)
        shares.append(len(sites[0][0]))
    assert min(shares) > 0 and sum(shares) == 64


def test_learning_rate_rises_again_after_each_resampling_and_falls_at_the_end():
    config = dataclasses.replace(SHORT, n_tokens=256 * 1000, warmup=50, resample_every=200,
                                 resample_times=4, lr=1.0, decay=0.2)
    assert T.resampling_steps(config) == [200, 400], "none in the last half of the run"
    rates = [T.learning_rate(step, config) for step in range(1000)]
    for start in (0, 200, 400):
        assert rates[start] == pytest.approx(0.1)
        assert rates[start + 25] == pytest.approx(0.55)
        assert rates[start + 50] == pytest.approx(1.0)
    assert rates[799] == 1.0
    assert rates[900] == pytest.approx(0.5)
    assert rates[999] == pytest.approx(0.005)


# ---- evaluation ----


def test_evaluation_equals_a_loop_over_positions(tmp_path):
    import model as models
    theirs = random_gpt2(tmp_path, **GPT2_SHAPES["small"])
    ours, layer = models.load_model(tmp_path), 1
    rows = torch.randint(101, (12, 20), generator=torch.Generator().manual_seed(0))
    sae = S.SAE(32, 64, torch.Generator().manual_seed(0)).requires_grad_(False)
    mean = torch.linspace(-1, 1, 32)
    got = T.evaluate(ours, {layer: sae}, rows, {layer: mean})[layer]

    def cross_entropy(replace):
        """transformers, with z_cat of one layer replaced at positions 1 and up by a pre-hook on its
        output projection."""
        def hook(module, args):
            z = args[0].clone()
            for b in range(z.shape[0]):
                for t in range(1, z.shape[1]):
                    z[b, t] = replace(z[b, t])
            return (z,)
        handle = theirs.transformer.h[layer].attn.c_proj.register_forward_pre_hook(hook)
        log_p = theirs(rows).logits.detach().log_softmax(-1)
        handle.remove()
        total = [-log_p[b, t, rows[b, t + 1]] for b in range(12) for t in range(1, 19)]
        return float(sum(total) / len(total))

    expected = {"ce_clean": cross_entropy(lambda z: z), "ce_zero": cross_entropy(lambda z: z * 0),
                "ce_mean": cross_entropy(lambda z: mean),
                "ce_sae": cross_entropy(lambda z: sae(z[None])[0])}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-4), name
    for kind in ("zero", "mean"):
        gap = expected[f"ce_{kind}"] - expected["ce_clean"]
        if got[f"ce_recovered_{kind}"] is not None:
            recovered = (expected[f"ce_{kind}"] - expected["ce_sae"]) / gap
            assert got[f"ce_recovered_{kind}"] == pytest.approx(recovered, rel=1e-2)
        else:
            assert gap < 0.05 or got[f"ce_{kind}_minus_clean_ci"][0] <= 0
    z = ours.z_cat_at(rows, [layer])[layer][:, 1:].flatten(0, 1)
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert got["l0"] == pytest.approx(float((f > 0).sum(1).float().mean()))
    error = (f @ sae.W_dec + sae.b_dec - z).square().sum()
    explained = float(1 - error / (z - z.mean(0)).square().sum())
    assert got["explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_cross_entropy_of_a_large_vocabulary_is_measured_at_some_positions(tmp_path, monkeypatch):
    """One in 5 of each row's, in turn another; the mean over them equals that over all."""
    import model as models
    random_gpt2(tmp_path, **GPT2_SHAPES["small"])
    ours = models.load_model(tmp_path)
    at = T.ce_positions(10, 40, 5)
    assert at.shape == (10, 7) and at.min() == 1 and at.max() <= 38, "1 to T-2"
    assert at[0].tolist() == [1, 6, 11, 16, 21, 26, 31] and at[4, 0] == 5 and at[5, 0] == 1
    assert T.ce_positions(3, 20, 1).tolist() == [list(range(1, 19))] * 3
    assert [T.ce_stride(SimpleNamespace(config=SimpleNamespace(d_vocab=n)))
            for n in (101, 50_257, 256_000, 262_144)] == [1, 1, 5, 5]
    rows = torch.randint(101, (400, 20), generator=torch.Generator().manual_seed(0))
    sae = S.SAE(32, 64, torch.Generator().manual_seed(0)).requires_grad_(False)
    everywhere = T.evaluate(ours, {1: sae}, rows, {1: torch.zeros(32)})[1]
    monkeypatch.setattr("train.ce_stride", lambda model: 5)
    some = T.evaluate(ours, {1: sae}, rows, {1: torch.zeros(32)})[1]
    assert (everywhere["n_ce_tokens"], some["n_ce_tokens"]) == (400 * 18, 400 * 3)
    assert some["l0"] == everywhere["l0"]
    for name in ("ce_clean", "ce_sae", "ce_zero"):
        low, high = some[f"{name}_ci"]
        assert low <= everywhere[name] <= high and some[name] != everywhere[name], name


def test_a_perfect_sae_recovers_everything_and_the_mean_nothing(tiny):
    """An SAE whose features are +-identity, and one that always says the mean."""
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 16))
    perfect, lazy = S.SAE(256, 512).requires_grad_(False), S.SAE(256, 4).requires_grad_(False)
    eye = torch.cat([torch.eye(256), -torch.eye(256)])
    perfect.W_dec.copy_(eye)
    perfect.W_enc.copy_(eye.T)
    means = {0: tiny.z_cat_bfloat16(rows, [0])[0][:, 1:].mean((0, 1))}
    lazy.b_enc.fill_(-1e6)
    lazy.b_dec.copy_(means[0])
    result = T.evaluate(tiny, {0: perfect}, rows, means)[0]
    assert result["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)
    assert result["explained_variance"] == pytest.approx(1, abs=1e-4)
    result = T.evaluate(tiny, {0: lazy}, rows, means)[0]
    assert result["ce_recovered_mean"] == pytest.approx(0, abs=1e-4) and result["l0"] == 0
    assert result["explained_variance"] == pytest.approx(0, abs=1e-3)


def test_where_z_cat_does_not_matter_recovered_is_not_given():
    noise = np.random.default_rng(0).normal(size=50)

    def metrics(zero, mean):
        ones = np.ones(50)
        return T.summarise(
            {
                "l0": ones, "ce_clean": 3 * ones, "ce_sae": 3 * ones, "ce_zero": 3 + zero,
                "ce_mean": 3 + mean, "error": ones, "power": 9 * ones, "sum": np.ones((50, 2))
            }, 10)

    small = metrics(0.04 * np.ones(50), 0.2 * np.ones(50))
    assert small["ce_recovered_zero"] is None and small["ce_recovered_mean"] == pytest.approx(1)
    unsure = metrics(0.1 + 2 * noise, 0.2 * np.ones(50))
    assert unsure["ce_recovered_zero"] is None and unsure["ce_zero_minus_clean_ci"][0] < 0
    assert "n/a" in T.table({0: small | {"dead_fraction": 0.0}}, "z_cat")


# ---- stopping and going on ----


def test_a_run_that_was_stopped_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    """Stopped at step 15, between two resamplings, in the middle of a block."""
    original, pressed = T.learning_rate, []

    def interrupt_at_15(step, config):
        if step == 15 and not pressed:                                  # asked once per layer
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return original(step, config)

    monkeypatch.setattr(T, "learning_rate", interrupt_at_15)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run_short(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished run"):
        run_short(tmp_path)
    with pytest.raises(UserError, match="d_sae = 128, not 64"):
        run_short(tmp_path, resume=True, d_sae=64)
    run_short(tmp_path, resume=True)
    for layer in (0, 2):
        assert (finished[0] / f"L{layer}"
                / "sae.safetensors").read_bytes() == (tmp_path / "tiny" / f"L{layer}"
                                                      / "sae.safetensors").read_bytes()
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "tiny" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 46, \
        "log.jsonl has gaps or doubles after going on"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    original, calls = T.sparse_step, []

    def poisoned(sae, z, l1, target):
        calls.append(1)
        return original(sae, z * math.nan if len(calls) > 30 else z, l1, target)

    monkeypatch.setattr(T, "sparse_step", poisoned)
    monkeypatch.setattr(T, "dense_step", poisoned)
    monkeypatch.setattr(T, "CHECKPOINT_EVERY", 5)
    with pytest.raises(UserError, match="not finite"):
        run_short(tmp_path)
    monkeypatch.undo()
    run_short(tmp_path, resume=True)


def test_a_layer_that_runs_away_is_named_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    original, calls = T.train_step, []

    def kicked(learner, site, step, config, team):
        original(learner, site, step, config, team)
        calls.append(step)
        if step == 20 and learner.sae.d_sae == 96:
            with torch.no_grad():
                learner.sae.W_enc *= 100

    monkeypatch.setattr(T, "train_step", kicked)
    run_short(tmp_path, d_sae=(128, 96))
    said = [line for line in capsys.readouterr().out.splitlines() if "of no use" in line]
    assert len(said) == 1 and said[0].startswith("layer 2: at step 2") and "--layers 2" in said[0]
    assert (tmp_path / "tiny" / "L0" / "metrics.json").is_file() and max(calls) == 45


def test_the_default_learning_rate_moves_a_feature_by_as_much_for_all_widths(tmp_path):
    assert T.default_lr(256) == 3.4e-3 and T.default_lr(1024) == 1.7e-3
    run_short(tmp_path, lr=0.0, layers=(0,))
    config = json.loads((tmp_path / "tiny" / "L0" / "config.json").read_text())
    assert config["lr"] == 3.4e-3, "what was taken is written down"


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch, name):
    """On the default path, whose sparse step would take its feature to be inactive."""
    original = T.initialise_all

    def poisoned(learners, *rest):
        original(learners, *rest)
        with torch.no_grad():
            getattr(learners[2].sae, name).view(-1)[5] = math.nan

    monkeypatch.setattr(T, "initialise_all", poisoned)
    with pytest.raises(UserError, match="the loss of layer 2 is not finite at step 1"):
        run_short(tmp_path)


def test_train_runs_in_a_thread(finished, tmp_path):
    """Where Python takes no signal handlers."""
    metrics = []
    thread = threading.Thread(target=lambda: metrics.append(run_short(tmp_path)))
    thread.start()
    thread.join()
    assert metrics and metrics[0].keys() == {0, 2}
    for layer in (0, 2):
        file = f"L{layer}/sae.safetensors"
        assert (tmp_path / "tiny" / file).read_bytes() == (finished[0] / file).read_bytes()


def test_a_change_of_the_loss_in_dense_step_is_what_trains(tmp_path, monkeypatch, capsys):
    """sparse.py knows nothing of it, and is not asked."""
    calls = []

    def with_weight_decay(sae, z, l1, target):
        calls.append(len(z))
        result = S.dense_step(sae, z, l1, target)
        result.gradients["W_enc"] += 0.5 * sae.W_enc
        return result

    monkeypatch.setattr(T, "dense_step", with_weight_decay)
    run_short(tmp_path, layers=(0,), device="cpu")
    assert "layer 0: the sparse step does not give what dense_step gives" in capsys.readouterr().out
    assert calls.count(256) == 1 + 46, "once to compare, then at every step"


def test_on_a_gpu_products_are_in_tf32_where_that_agrees():
    """Also where there is none: a device that says it is one, and steps that are off by as much as
    they say."""
    z = SimpleNamespace(device=SimpleNamespace(type="cuda"))

    def chosen(error_in_tf32):
        def step(sae, z, l1, target):
            off = error_in_tf32 if torch.get_float32_matmul_precision() == "high" else 0.0
            one = torch.ones(())
            return S.LossAndGradients(one, one, None, {"W_enc": torch.full((3, 4), 2 + 2 * off)})

        learner = SimpleNamespace(sae=S.SAE(3, 4), l1=0.1, in_its_units=lambda site: (z, z))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(T, "dense_step", step)
            T.choose_step(learner, 0, ())
        assert torch.get_float32_matmul_precision() == "highest", "put back"
        return learner.matmul_precision

    assert chosen(0.001) == "high" and chosen(0.1) == "highest" and chosen(math.nan) == "highest"


def test_training_curves_of_the_sparse_and_the_dense_step_overlay(tmp_path, monkeypatch):
    """The same run by one step throughout; both count what resampling needs. Nothing is resampled:
    a draw turns the last bit of an error into another feature."""
    curves, dead = [], []
    for step in (T.sparse_step, T.dense_step):
        monkeypatch.setattr(T.Learner, "step_function", lambda learner: step)
        run_short(tmp_path / step.__name__, resample_times=0)
        log = T.read_log(tmp_path / step.__name__ / "tiny" / "log.jsonl")
        curves.append([line[layer]["mse"] + 0.2 * line[layer]["sparsity"] for line in log
                       for layer in ("L0", "L2")])
        dead.append([line[layer]["dead"] for line in log for layer in ("L0", "L2")])
    assert len(curves[0]) == 2 * 46 and curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert dead[0] == pytest.approx(dead[1], abs=0.02)


def test_a_checkpoint_of_a_step_after_the_end_is_damaged(tmp_path):
    learner = T.make_learner((4,), 8, 0.1, 1e-3)
    learner.l0 = 8.0
    config = dataclasses.replace(SHORT, batch_size=32)
    T.train_step(learner, (torch.randn(32, 4),), 0, config)
    T.save(tmp_path, config, 10**6, {0: learner})
    with pytest.raises(UserError, match="damaged"):
        T.resume({0: T.make_learner((4,), 8, 0.1, 1e-3)}, config, tmp_path)
    T.save(tmp_path, config, 1, {0: learner})
    assert T.resume({0: T.make_learner((4,), 8, 0.1, 1e-3)}, config, tmp_path) == 1
    with pytest.raises(UserError, match="damaged"):
        T.resume({0: T.make_learner((4,), 1, 0.1, 1e-3)}, config, tmp_path)    # would broadcast


def test_a_log_that_was_cut_short_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "x"\n\0\0\0\n[3]\n{"step": "4"}\n'
                                        '{"step": 5}')
    assert [line["step"] for line in T.read_log(tmp_path / "log.jsonl")] == [1, 5]
    assert T.read_log(tmp_path / "none.jsonl") == []


def test_a_truncated_checkpoint_is_named(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoint.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="checkpoint.safetensors"):
        run_short(tmp_path, resume=True)


@pytest.mark.parametrize("signal_sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(tmp_path, signal_sent, code):
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a book on {i % 17} owls.\n"
                                               for i in range(20_000)))
    flags = ["--out", tmp_path, "--corpus", tmp_path / "book.txt", "--passes", "100",
             "--d-sae", "256", "--layers", "0", "--n-tokens", "10e6"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "tokens" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal_sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in errors and "Traceback" not in errors, errors
    assert (tmp_path / "tiny" / "checkpoint.safetensors").is_file()


def test_a_run_stopped_while_it_is_measured_trains_nothing_again(finished, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "evaluate", stopped)
        run_short(tmp_path)
    monkeypatch.setattr(T, "train_step", stopped)
    run_short(tmp_path, resume=True)
    for layer in (0, 2):
        file = f"L{layer}/sae.safetensors"
        assert (tmp_path / "tiny" / file).read_bytes() == (finished[0] / file).read_bytes()


def test_training_goes_on_when_nobody_reads_what_it_prints(finished, tmp_path):
    """python train.py ... | head -1"""
    flags = ("--layers 0,2 --d-sae 128 --n-tokens 12000 --batch-size 256 --lr 2.4e-3 --warmup 10 "
             "--resample-every 10 --n-eval-rows 8 --block-mib 8").split()        # SHORT
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--out", tmp_path, *flags],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "x SAE" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(120) == 0
    for layer in (0, 2):
        file = f"L{layer}/sae.safetensors"
        assert (tmp_path / "tiny" / file).read_bytes() == (finished[0] / file).read_bytes()


def test_a_disk_that_is_full_is_one_sentence(tmp_path):
    pytest.importorskip("resource")
    code = ("import resource, signal, sys, sae\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "from data.errors import run\n"
            "run(lambda: sae.SAE(32, 64).save(sys.argv[1] + '/sae.safetensors'))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir()), "a part of a file was left behind"


# ---- bad input ----


def test_a_text_that_ends_stops_the_run_with_a_checkpoint(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"This is line {i} of a book about {i % 17} owls.\n"
                                               for i in range(1600)))
    with pytest.raises(UserError,
                       match="book.txt ended after [0-9,]+ of 999,936 activations") as e:
        run_short(tmp_path, corpus=str(tmp_path / "book.txt"), n_tokens=1_000_000)
    enough = int(str(e.value).split("--n-tokens ")[1].split()[0])
    assert 8_000 < enough < 40_000
    assert (tmp_path / "tiny" / "checkpoint.safetensors").is_file()
    with open(tmp_path / "book.txt", "a") as book:
        book.writelines(f"Later, line {i} tells of {i % 13} more owls and {i % 7} mice.\n"
                        for i in range(1600))
    with pytest.raises(UserError, match="ended after") as later:
        run_short(tmp_path, corpus=str(tmp_path / "book.txt"), n_tokens=1_000_000, resume=True)
    assert int(str(later.value).split("--n-tokens ")[1].split()[0]) > enough
    metrics = run_short(tmp_path / "again", corpus=str(tmp_path / "book.txt"), n_tokens=enough)
    assert metrics[0]["n_train_tokens"] == enough, \
        "the number that the message advises does not work"
    metrics = run_short(tmp_path / "twice", corpus=str(tmp_path / "book.txt"), passes=2,
                        n_tokens=2 * enough - 256)
    assert metrics[0]["n_train_tokens"] == 2 * enough - 256


def test_saes_of_a_folder_are_measured_without_training(finished, tmp_path):
    folder, metrics = finished
    measured = run_short(tmp_path, saes=str(folder))
    assert measured.keys() == {0, 2}
    for layer in measured:
        for key in ("l0", "ce_sae", "ce_zero", "explained_variance"):
            assert measured[layer][key] == pytest.approx(metrics[layer][key], rel=1e-6)
    assert {p.name for p in (tmp_path / "tiny").iterdir()} == {"measured.json", "model.json"}


def test_a_model_in_bfloat16_gives_nearly_the_same_metrics(finished, tmp_path):
    small = {"saes": str(finished[0]), "n_ctx": 40, "n_eval_rows": 4}
    metrics = run_short(tmp_path / "float32", **small)
    measured = run_short(tmp_path / "bfloat16", dtype="bfloat16", **small)
    for layer in measured:
        assert measured[layer]["ce_clean"] == pytest.approx(metrics[layer]["ce_clean"], rel=0.02)
        assert measured[layer]["l0"] == pytest.approx(metrics[layer]["l0"], rel=0.05)


def test_each_layer_may_have_its_own_size_and_l1(tmp_path):
    run_short(tmp_path, d_sae=(64, 96), l1=(0.1, 0.4), n_tokens=1000)
    saes = {layer: S.SAE.load(tmp_path / "tiny" / f"L{layer}") for layer in (0, 2)}
    assert (saes[0].d_sae, saes[2].d_sae) == (64, 96)
    assert json.loads((tmp_path / "tiny" / "L2" / "config.json").read_text())["l1_of_layer"] == 0.4


def test_the_papers_preset_goes_by_layer_and_flags_still_win():
    flags = lambda *argv: parse_flags(T.TrainConfig, "", ["--preset", "paper", *argv], T.preset)
    everything = flags("--model", "gpt2")
    assert everything.l1 == (1.8, 0.8, 1.0, 0.9, 1.1, 1.0, 1.1, 1.1, 1.3, 1.2, 1.3, 3.0)
    assert [everything.d_sae[layer] for layer in (0, 5, 6, 7)] == [24576, 49152, 24576, 49152]
    assert (everything.lr, everything.batch_size, everything.normalise) == (1.2e-3, 4096, False)
    one = flags("--layers", "5", "--n-tokens", "1e6", "--d-sae", "24576")
    assert (one.layers, one.l1, one.d_sae, one.n_tokens) == ((5,), (1.0,), (24576,), 1_000_000)
    assert dataclasses.asdict(parse_flags(T.TrainConfig, "", [], T.preset)) \
        == dataclasses.asdict(T.TrainConfig())
    with pytest.raises(UserError, match="layers 0 to 11"):
        flags("--layers", "12")
    with pytest.raises(UserError, match="--preset mine is unknown"):
        parse_flags(T.TrainConfig, "", ["--preset", "mine"], T.preset)


def test_gemma_trains_from_a_directory(tmp_path):
    """The whole job on a random Gemma 2: loading, tokenizer.json, activations, SAEs, evaluation."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{i}" for i in range(116))]
    numbered = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbered, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    random_gemma(tmp_path / "gemma", **GEMMA_SHAPES["2"])
    made.save(str(tmp_path / "gemma" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    (tmp_path / "text.jsonl").write_text("".join(
        json.dumps({"text": " ".join(rng.choice(words, 200))}) + "\n" for _ in range(300)))
    metrics = run_short(tmp_path, model=str(tmp_path / "gemma"),
                        corpus=str(tmp_path / "text.jsonl"), n_ctx=32, layers=(1, 3), d_sae=64)
    assert metrics.keys() == {1, 3} and metrics[3]["n_train_tokens"] == 12_000 // 256 * 256
    assert S.SAE.load(tmp_path / "gemma" / "L1").d_in == 64, "H*d_head, which is not d_model here"


def test_a_tokenizer_that_does_not_fit_the_model_is_named(tmp_path):
    random_gpt2(tmp_path / "model", **GPT2_SHAPES["small"])
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TINY / name, tmp_path / "model" / name)
    with pytest.raises(UserError, match="has 101 tokens and its tokenizer 4096"):
        run_short(tmp_path, model=str(tmp_path / "model"), n_ctx=32)


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere"], ["--model nowhere"]),
    (["--layers", "0,9"], ["layer 9", "out of range"]),
    (["--layers", "0,1", "--l1", "1,2,3"], ["--l1", "3 values for 2 layers"]),
    (["--n-ctx", "129"], ["--n-ctx 129"]), (["--n-ctx", "2"], ["takes 3 to 128 tokens"]),
    (["--n-tokens", "10"], ["--n-tokens 10"]),
    (["--n-tokens", "many"], ["--n-tokens", "'many'"]),
    (["--d-sae", "0"], ["--d-sae"]),
    (["--seed", "-1"], ["--seed"]),
    (["--lr", "-1"], ["--lr"]),
    (["--corpus", "nowhere.txt"], ["--corpus nowhere.txt"]),
    (["--device", "abacus"], ["--device abacus"]),
    (["--out", "/proc/nowhere"], ["/proc/nowhere", "--out"]),
], ids=lambda value: "_".join(value) if isinstance(value, list) and value[0].startswith("--")
and len(value) > 1 else "")
def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, arguments, words):
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    result = program("train", *arguments, *out)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))


def test_rows_without_a_prediction_that_is_measured_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "ce_stride", lambda model: 5)    # as with 262,144 tokens
    with pytest.raises(UserError, match="--n-ctx 6 does not fit this model, which takes 7 to 128"):
        run_short(tmp_path, n_ctx=6)
    assert T.ce_positions(5, 7, 5).shape == (5, 1)


# ---- several processes ----


def test_two_processes_give_the_result_of_one(tmp_path):
    """At the same number of threads: the model's bfloat16 products depend on it."""
    flags = (
        "--layers 0,2 --d-sae 128 --n-tokens 12000 --batch-size 256 --warmup 10 --resample-every 10 "
        "--n-eval-rows 8 --block-mib 8 --device cpu --out").split()
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for folder, start in (("one", []), ("two", torchrun)):
        done = subprocess.run([sys.executable, *start, "train.py", *flags, tmp_path / folder],
                              cwd=ROOT, capture_output=True, text=True, timeout=300,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1, "one process speaks"
    for layer in (0, 2):
        one, two = (S.SAE.load(tmp_path / folder / "tiny" / f"L{layer}" / "sae.safetensors")
                    for folder in ("one", "two"))
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_shares_of_a_batch_are_disjoint_and_whole():
    index = torch.randperm(7 * 5)[:20]
    teams = [Team(rank, 3) for rank in range(3)]
    shares = [team.share(index, 5) for team in teams]
    assert torch.cat([mine for mine, _ in shares]).sort().values.tolist() == list(range(20))
    for team, (mine, kept) in zip(teams, shares):
        rows = torch.arange(35).view(7, 5)[team.rank::3].flatten()      # what the process keeps
        assert torch.equal(rows[kept], index[mine])


def test_activations_of_low_rank_can_be_started_from(monkeypatch):
    """Where eigh does not converge in float32, as it may for one-hot activations, float64
    serves."""
    eigh = torch.linalg.eigh

    def stubborn(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    z = torch.eye(40)[torch.arange(4000) % 10]          # ten directions of forty
    learner = T.make_learner((40,), 64, 0.2, 1e-3)
    T.initialise(learner, (z,), True, torch.Generator().manual_seed(0))
    sae = learner.sae
    assert sae.W_dec[:, 10:].abs().max() < 1e-4, \
        "directions outside the space that activations fill"
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_the_papers_preset_says_that_it_is_of_another_model(tmp_path, capsys):
    run_short(tmp_path, preset="paper")
    assert "are those of a GPT2 of 12 layers" in capsys.readouterr().out
    small = SimpleNamespace(architecture=lambda: "GPT2 of 12 layers, 12 heads of 64, d_model 768")
    T.warn_of_preset(T.TrainConfig(preset="paper"), small)
    assert capsys.readouterr().out == ""
