"""Speed and memory, side by side in one run, against sae-lens, transformer-lens and transformers.

    pip install torch==2.13.0 && pip install -r tests/requirements-peers.txt
    python tests/measured/benchmark.py [steps, 50 if not given]

Every line is measured in a process of its own. Steps start from the same weights and see the same
batches: a planted dictionary, of which each input is a sum of 25 rows, and a bias at which about 25
features are active, as late in training. "peak" is the most memory that the work had above what
there was before (Linux only).
"""

import multiprocessing
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def mebibytes(what):
    """Of this process: VmRSS, what it has now, or VmHWM, the most it has had since
    `forget_peak`."""
    if not Path("/proc/self/status").exists():
        return 0.0
    line = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(what))
    return int(line.split()[1]) / 1024


def forget_peak():
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def in_a_process(work, *args):
    """What work(*args) returns: (seconds, something, peak in MiB)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


# ---- one step of SAE training ----

L1, LR = 0.05, 3e-4


def planted(d_in, d_sae, batch_size, n_batches=4):
    """W_dec (d_sae,d_in), b_enc, and batches for which about 25 features are active."""
    import torch
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    batches = []
    for _ in range(n_batches):
        which = torch.randint(d_sae, (batch_size, 25), generator=generator)
        size = 0.5 + torch.rand(batch_size, 25, generator=generator)
        batches.append(
            torch.nn.functional.embedding_bag(which, W, per_sample_weights=size, mode="sum"))
    pre = batches[0] @ W.T
    return W, -pre.flatten()[:2**24].kthvalue(int(
        (1 - 25 / d_sae) * min(pre.numel(), 2**24))).values, batches


def ours(d_in, d_sae, batch_size, steps):
    import train
    W, bias, batches = planted(d_in, d_sae, batch_size)
    learner = train.make_learner((d_in,), d_sae, L1, LR)
    begin_with(learner.sae, W, bias)
    learner.l0 = 25.0
    config = train.TrainConfig(batch_size=batch_size, lr=LR, warmup=1, decay=0.0, n_tokens=10**9)
    with train.keep_freed_memory():
        # step 0 of a warmup would have a tenth of the learning rate
        def step(i):
            train.train_step(learner, (batches[i % len(batches)],), i + 1, config)
            train.read_back({0: learner}, i + 1, batch_size)

        return timed(step, steps, lambda: learner.mse + L1 * learner.sparsity)


def saelens(d_in, d_sae, batch_size, steps, autocast, constrained=False):
    """constrained: with what our step does and theirs does not (decoder rows of unit norm, their
    gradient projected), and without what theirs does and ours does not (clipping the gradient): the
    same algorithm."""
    import torch
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sae import normalise_decoder, project_decoder_gradient
    W, bias, batches = planted(d_in, d_sae, batch_size)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1))
    begin_with(sae, W, bias)
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=batch_size,
                              lr=LR, lr_end=LR, adam_beta1=0.0, adam_beta2=0.9999,
                              autocast=autocast)
    trainer, last = SAETrainer(config, sae, iter(())), []
    if constrained:
        torch.nn.utils.clip_grad_norm_ = lambda parameters, most: None
        sae.W_dec.register_post_accumulate_grad_hook(
            lambda W_dec: project_decoder_gradient(sae, W_dec.grad))

    def step(i):
        last[:] = [trainer.step(batches[i % len(batches)])]
        trainer.n_training_steps += 1
        if constrained:
            normalise_decoder(sae)

    return timed(step, steps, lambda: last[0].loss.item())


def begin_with(sae, W, bias):
    """The weights that all begin with."""
    sae.requires_grad_(False)
    sae.W_dec.copy_(W)
    sae.W_enc.copy_(W.T)
    sae.b_enc.fill_(bias)
    sae.b_dec.zero_()
    sae.requires_grad_(True)


def timed(step, steps, loss):
    """Seconds per step after two steps to warm up, the last loss, peak memory above what there was
    before."""
    forget_peak()
    begun_with = mebibytes("VmRSS")
    for i in range(2):
        step(i)
    begun = time.perf_counter()
    for i in range(2, 2 + steps):
        step(i)
    return (time.perf_counter() - begun) / steps, loss(), mebibytes("VmHWM") - begun_with


def encoder_product(d_in, d_sae, batch_size, steps):
    """The one product that a step cannot do without, in bfloat16 where the processor has it."""
    import torch

    from data.machine import fast_bfloat16
    kind = torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32
    x, W = torch.randn(batch_size, d_in, dtype=kind), torch.randn(d_in, d_sae, dtype=kind)
    return timed(lambda i: x @ W, steps, lambda: 0.0)


def compare_steps(d_in, d_sae, batch_size, steps):
    """-> seconds of a step: ours, sae-lens float32, sae-lens bfloat16."""
    print(
        f"\n{f'step {d_in} -> {d_sae}, batch {batch_size}, {steps} steps':44} {'s/step':>9} {'ratio':>7}   "
        f"{'loss':>9} {'peak':>9}")
    size = (d_in, d_sae, batch_size, steps)
    same = "sae-lens, float32, the same algorithm"
    rows = {"ours": in_a_process(ours, *size),
            "sae-lens, float32 (its default)": in_a_process(saelens, *size, False),
            "sae-lens, bfloat16 autocast": in_a_process(saelens, *size, True),
            same: in_a_process(saelens, *size, False, True),
            "the encoder's product alone": in_a_process(encoder_product, *size)}
    first, loss_of_first = rows["ours"][:2]
    for name, (seconds, loss, memory) in rows.items():
        shown = f"{loss:9.4f}" if loss else "         "
        print(f"{name:44} {seconds:9.4f} {seconds / first:7.2f} x {shown} {memory:9,.0f} MiB",
              flush=True)
    print("the same algorithm: decoder rows of unit norm, gradient not clipped; its loss differs "
          f"from ours by {abs(rows[same][1] / loss_of_first - 1):.3%}")
    return [seconds for seconds, _, _ in rows.values()][:3]


# ---- training curves of the sparse and the dense step ----


def curve(dense):
    """The loss of every step of a training on tiny's layer 2, by the one step throughout."""
    import torch

    import data
    import model as models
    import train
    config = train.TrainConfig(layers=(2,), batch_size=1024, lr=2.4e-3, warmup=200,
                               n_tokens=400 * 1024, block_mib=128, resample_every=100)
    buffer = train.ActivationBuffer(models.load_model("tiny"), data.load_tokenizer("tiny"), config,
                                    (2,), torch.device("cpu"))
    one_step = train.dense_step if dense else train.sparse_step
    train.Learner.step_function = lambda learner: one_step
    learners = train.make_learners(config, (2,), buffer.widths, torch.device("cpu"))
    train.initialise_all(learners, config, buffer)
    losses = []
    for step, batches in buffer.batches(0):
        train.train_step(learners[2], batches[2], step, config)
        train.read_back(learners, step, config.batch_size)
        losses.append(learners[2].mse + learners[2].l1 * learners[2].sparsity)
    return losses


def compare_curves():
    sparse, dense = in_a_process(curve, False), in_a_process(curve, True)
    apart = [abs(a / b - 1) for a, b in zip(sparse, dense)]
    print(
        f"\ntraining curves, sparse against dense float32 step, tiny's layer 2, {len(sparse)} steps: the "
        f"loss falls from {dense[0]:.3f} to {dense[-1]:.3f}, the two differ by {max(apart):.3%} at most",
        flush=True)


# ---- z_cat of a model of GPT-2 Small's size, layer 5 ----

ROWS, LAYER, TIMES = 16, 5, 6


def z_cat_ours(bfloat16):
    import torch

    import model as models
    from data.machine import keep_freed_memory
    model = models.GPT2(models.GPT2Config(12, 12, 768, 3072, 50257, 1024)).requires_grad_(False)
    tokens = torch.randint(50257, (ROWS, 128), generator=torch.Generator().manual_seed(0))

    def work(i):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return model.z_cat_at(tokens, [LAYER])

    with keep_freed_memory():           # as in train.py
        return timed(work, TIMES, lambda: 0.0)


def z_cat_transformers(bfloat16):
    """The whole model, with a hook on the layer's output projection that keeps its input."""
    import torch
    import transformers
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False)
    model = model.to(torch.bfloat16) if bfloat16 else model
    kept = []
    model.transformer.h[LAYER].attn.c_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0]))
    tokens = torch.randint(50257, (ROWS, 128), generator=torch.Generator().manual_seed(0))
    return timed(lambda i: (kept.clear(), model(tokens)), TIMES, lambda: 0.0)


def z_cat_transformer_lens(stop, bfloat16=False):
    """Its cache of hook_z; stop: after the layer, which is faster."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    model = HookedTransformer(HookedTransformerConfig(
        n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024,
        act_fn="gelu_new", normalization_type="LN", device="cpu",
        dtype=torch.bfloat16 if bfloat16 else torch.float32)).requires_grad_(False)
    tokens = torch.randint(50257, (ROWS, 128), generator=torch.Generator().manual_seed(0))
    name = f"blocks.{LAYER}.attn.hook_z"
    return timed(lambda i: model.run_with_cache(tokens, names_filter=name,
                                                stop_at_layer=LAYER + 1 if stop else None), TIMES,
                 lambda: 0.0)


def compare_z_cat():
    """-> tokens/s of ours in bfloat16, and of transformer-lens at its default, stopped, and stopped
    in bfloat16."""
    what = f"z_cat of layer {LAYER}, GPT-2 Small's size, {ROWS} rows"
    print(f"\n{what:48} {'tokens/s':>10} {'ratio':>7}   {'peak':>9}")
    rows = {"ours, float32": in_a_process(z_cat_ours, False),
            "ours, bfloat16": in_a_process(z_cat_ours, True),
            "transformers, float32": in_a_process(z_cat_transformers, False),
            "transformers, bfloat16": in_a_process(z_cat_transformers, True),
            "transformer-lens (its default)": in_a_process(z_cat_transformer_lens, False),
            "transformer-lens, stopped at the layer": in_a_process(z_cat_transformer_lens, True),
            "transformer-lens, bfloat16, stopped": in_a_process(z_cat_transformer_lens, True, True)}
    speeds = {name: ROWS * 128 / seconds for name, (seconds, _, _) in rows.items()}
    for name, speed in speeds.items():
        against = speeds["ours, float32" if "bfloat16" not in name else "ours, bfloat16"]
        print(f"{name:48} {speed:10,.0f} {against / speed:7.2f} x {rows[name][2]:9,.0f} MiB",
              flush=True)
    return speeds["ours, bfloat16"], *list(speeds.values())[4:]


# ---- attribution ----


def dfa_ours():
    import direct
    pattern, v, w = attention()
    return timed(lambda i: direct.dfa(pattern, v, w), 1, lambda: 0.0)


def dfa_through_the_large_tensor():
    """As in implementations that multiply pattern and values first, and sum over d_head last."""
    pattern, v, w = attention()

    def work(i):
        # (B,H,q,k,d_head)
        moved = pattern[..., None] * v.permute(0, 2, 1, 3)[:, :, None]
        return (moved * w.unflatten(0, (12, 64))[:, None, None]).sum(-1)

    return timed(work, 1, lambda: 0.0)


def attention(B=8, T=128, H=12, d_head=64):
    import torch
    return torch.rand(B, H, T, T), torch.randn(B, T, H, d_head), torch.randn(H * d_head)


def compare_dfa():
    rows = {"ours": in_a_process(dfa_ours),
            "through (B,H,q,k,d_head)": in_a_process(dfa_through_the_large_tensor)}
    print(f"{'DFA, 8 rows of 128 tokens, 12 heads of 64':44} {'s':>9} {'ratio':>7}   {'peak':>9}")
    for name, (seconds, _, memory) in rows.items():
        print(f"{name:44} {seconds:9.4f} {seconds / rows['ours'][0]:7.0f} x {memory:9,.0f} MiB")


def main():
    warnings.filterwarnings("ignore")
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    compare_dfa()
    compare_curves()
    try:
        import sae_lens  # noqa: F401
        import transformer_lens  # noqa: F401
    except ImportError:
        print("\nthe other rows take: pip install -r tests/requirements-peers.txt")
        return
    speeds = compare_z_cat()
    compare_steps(256, 4096, 4096, steps)
    seconds = compare_steps(768, 24576, 4096, steps)
    ours, default, autocast = seconds
    whole = {"ours, bfloat16 products": (speeds[0], ours),
             "both at their defaults (float32)": (speeds[1], default),
             "stopped at the layer; bfloat16 autocast": (speeds[2], autocast),
             "the same, and the model's weights in bfloat16": (speeds[3], autocast)}
    print(
        f"\n{'GPT-2-sized model to layer 5 + SAE 24576':48} {'s/batch':>9} {'ratio':>7}   (sums of the "
        f"above)")
    whole = {name: 4096 / speed + step for name, (speed, step) in whole.items()}
    for name, total in whole.items():
        print(f"{name:48} {total:9.2f} {total / whole['ours, bfloat16 products']:7.2f} x")


if __name__ == "__main__":
    main()
