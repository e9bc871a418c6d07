"""Speed and memory, side by side in one run, against sae-lens, transformer-lens and transformers.

The newest versions of the first two exclude each other, so each has an environment of its own:

    python -m venv peers/sae-lens
    peers/sae-lens/bin/pip install -r tests/requirements-sae-lens.txt
    python -m venv peers/transformer-lens
    peers/transformer-lens/bin/pip install -r tests/requirements-transformer-lens.txt
    python tests/measured/benchmark.py [--device cuda] [--steps 50]

Every line is measured in a process of its own, and those of other libraries by the Python of their
environment. Steps start from the same weights and see the same batches: a planted dictionary, of
which each input is a sum of 25 rows, and a bias at which about 25 features are active, as late in
training. "peak" is the most memory that the work had above what there was before: of the process
(Linux only), or on the GPU.
"""

import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from data.flags import field, parse_flags  # noqa: E402
from data.machine import fast_bfloat16, keep_freed_memory  # noqa: E402


@dataclass(frozen=True)
class BenchmarkConfig:
    device: str = field("cpu", "cpu or cuda")
    steps: int = field(50, "training steps to time")


# ---- a process for each line ----

DEVICE = "cpu"                                  # of this process: `row` sets it


def python_of(library):
    """The Python that has sae-lens, or transformer-lens; None if there is none."""
    python = ROOT / "peers" / library / "bin" / "python"
    return python if python.exists() else None


def measured(device, work, *args, python=sys.executable):
    """What work(*args) returns when another process calls it; in most rows (seconds, loss, peak in
    MiB)."""
    call = json.dumps([device, work.__name__, args])
    done = subprocess.run([python, __file__, "row", call], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(call):
    """The other end: do the work, print what comes of it."""
    global DEVICE
    DEVICE, name, args = json.loads(call)
    print(json.dumps(globals()[name](*args)))


def timed(work, times, loss=lambda: 0.0):
    """Seconds of each work(i) after two to warm up, the last loss, peak memory above what there was
    before."""
    forget_peak()
    begun_with = memory_now()
    for i in range(2):
        work(i)
    wait_for_device()
    begun = time.perf_counter()
    for i in range(2, 2 + times):
        work(i)
    wait_for_device()
    seconds = (time.perf_counter() - begun) / times
    return seconds, loss(), memory_peak() - begun_with


def wait_for_device():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def forget_peak():
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def memory_now():
    return mebibytes("VmRSS") if DEVICE == "cpu" else torch.cuda.memory_allocated() / 2**20


def memory_peak():
    return mebibytes("VmHWM") if DEVICE == "cpu" else torch.cuda.max_memory_allocated() / 2**20


def mebibytes(what):
    """Of this process: VmRSS, what it has now, or VmHWM, the most it has had since
    `forget_peak`."""
    if not Path("/proc/self/status").exists():
        return 0.0
    line = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(what))
    return int(line.split()[1]) / 1024


# ---- one step of SAE training ----

L1, LR = 0.05, 3e-4


def planted(d_in, d_sae, batch_size, n_batches=4):
    """W_dec (d_sae,d_in), b_enc, and batches for which about 25 features are active."""
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    batches = []
    for _ in range(n_batches):
        which = torch.randint(d_sae, (batch_size, 25), generator=generator)
        size = 0.5 + torch.rand(batch_size, 25, generator=generator)
        batches.append(
            torch.nn.functional.embedding_bag(which, W, per_sample_weights=size, mode="sum"))
    some = batches[0][:max(1, 2**24 // d_sae)] @ W.T
    n_active = round(25 / d_sae * some.numel())
    bias = -some.flatten().topk(n_active).values[-1]
    return W.to(DEVICE), bias.item(), [batch.to(DEVICE) for batch in batches]


def begin_with(sae, W, bias):
    """The weights that all begin with."""
    sae.requires_grad_(False)
    sae.W_dec.copy_(W)
    sae.W_enc.copy_(W.T)
    sae.b_enc.fill_(bias)
    sae.b_dec.zero_()
    sae.requires_grad_(True)


def step_of_ours(d_in, d_sae, batch_size, steps):
    import train
    W, bias, batches = planted(d_in, d_sae, batch_size)
    learner = train.make_learner((d_in,), d_sae, L1, LR, DEVICE)
    begin_with(learner.sae, W, bias)
    train.choose_step(learner, 0, (batches[0],))
    learner.l0 = 25.0                           # so that the first step is sparse too, on the CPU
    config = train.TrainConfig(batch_size=batch_size, lr=LR, warmup=1, decay=0.0, n_tokens=10**9)

    def step(i):
        # step 0 of a warmup would have a tenth of the learning rate
        train.train_step(learner, (batches[i % len(batches)],), i + 1, config)
        train.read_back({0: learner}, i + 1, batch_size)

    with keep_freed_memory():
        return timed(step, steps, lambda: learner.mse + L1 * learner.sparsity)


def step_of_sae_lens(d_in, d_sae, batch_size, steps, products="highest", autocast=False,
                     same_algorithm=False):
    """products: "high" has TF32 for float32, which is not its default. same_algorithm: with what
    our step does and theirs does not (decoder rows of unit norm, their gradient projected), and
    without what theirs does and ours does not (clipping the gradient)."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sae import normalise_decoder, project_decoder_gradient
    torch.set_float32_matmul_precision(products)
    W, bias, batches = planted(d_in, d_sae, batch_size)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1,
                                                        device=DEVICE)).to(DEVICE)
    begin_with(sae, W, bias)
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=batch_size,
                              lr=LR, lr_end=LR, adam_beta1=0.0, adam_beta2=0.9999,
                              autocast=autocast, device=DEVICE)
    trainer = SAETrainer(config, sae, iter(()))
    last = []
    if same_algorithm:
        torch.nn.utils.clip_grad_norm_ = lambda parameters, most: None
        sae.W_dec.register_post_accumulate_grad_hook(
            lambda W_dec: project_decoder_gradient(sae, W_dec.grad))

    def step(i):
        last[:] = [trainer.step(batches[i % len(batches)])]
        trainer.n_training_steps += 1
        if same_algorithm:
            normalise_decoder(sae)

    return timed(step, steps, lambda: last[0].loss.item())


def encoder_product(d_in, d_sae, batch_size, steps):
    """The one product that a step cannot do without, in bfloat16 where the device has it."""
    kind = torch.bfloat16 if "bfloat16" in kinds(DEVICE) else torch.float32
    x = torch.randn(batch_size, d_in, dtype=kind, device=DEVICE)
    W = torch.randn(d_in, d_sae, dtype=kind, device=DEVICE)
    return timed(lambda i: x @ W, steps)


def compare_steps(config, d_in, d_sae, batch_size):
    """-> {name: seconds of a step}."""
    title = f"step {d_in} -> {d_sae}, batch {batch_size}, {config.steps} steps"
    print(f"\n{title:46} {'ms/step':>9} {'ratio':>7}   {'loss':>9} {'peak':>9}")
    size = (d_in, d_sae, batch_size, config.steps)
    theirs = {"sae-lens, float32 (its default)": ("highest", False, False)}
    if "TF32" in kinds(config.device):
        theirs["sae-lens, TF32"] = ("high", False, False)
    if "bfloat16" in kinds(config.device):
        theirs["sae-lens, bfloat16 autocast"] = ("high", True, False)
    same = "sae-lens, float32, the same algorithm"
    theirs[same] = ("highest", False, True)

    times, losses = {}, {}

    def show(name, result):
        times[name], losses[name], peak = result
        ratio = times[name] / times["ours"]
        loss = f"{losses[name]:9.4f}" if losses[name] else ""
        print(f"{name:46} {times[name] * 1000:9.2f} {ratio:7.2f} x {loss:9} {peak:9,.0f} MiB",
              flush=True)

    show("ours", measured(config.device, step_of_ours, *size))
    for name, how in theirs.items():
        show(name, measured(config.device, step_of_sae_lens, *size, *how,
                            python=python_of("sae-lens")))
    show("the encoder's product alone", measured(config.device, encoder_product, *size))
    print("the same algorithm: decoder rows of unit norm, gradient not clipped; its loss differs "
          f"from ours by {abs(losses[same] / losses['ours'] - 1):.3%}")
    return times


# ---- training curves of the sparse and the dense step ----


def curve(dense):
    """The loss of every step of a training on tiny's layer 2, by the one step throughout."""
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
    sparse = measured("cpu", curve, False)
    dense = measured("cpu", curve, True)
    apart = [abs(a / b - 1) for a, b in zip(sparse, dense)]
    print(f"\ntraining curves, sparse against dense float32 step, tiny's layer 2, {len(sparse)} "
          f"steps: the loss falls from {dense[0]:.3f} to {dense[-1]:.3f}, the two differ by "
          f"{max(apart):.3%} at most", flush=True)


# ---- z_cat of a model of GPT-2 Small's size, layer 5 ----

LAYER = 5
TIMES = {"cpu": 6, "cuda": 50}
ROWS = {"cpu": 16, "cuda": 64}                  # in one batch; ours has 64 in train.py


def random_tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50257, (ROWS[DEVICE], 128), generator=generator).to(DEVICE)


def kinds(device):
    """Of numbers in products, those that the device has instructions for."""
    found = ["float32"]
    if device == "cuda":
        found.append("TF32")
    if fast_bfloat16(torch.device(device)):
        found.append("bfloat16")
    return found


def in_kind(model, kind):
    """A model on the device, its weights in float32 or bfloat16; or in float32 with TF32 for its
    products ("TF32")."""
    if kind == "TF32":
        torch.set_float32_matmul_precision("high")
    return model.to(DEVICE, torch.bfloat16 if kind == "bfloat16" else torch.float32).eval()


def z_cat_of_ours(kind):
    """bfloat16 is as in train.py: the weights stay in float32, products are in bfloat16."""
    import model as models
    model = models.GPT2(models.GPT2Config(12, 12, 768, 3072, 50257, 1024)).requires_grad_(False)
    model = in_kind(model, "TF32" if kind == "TF32" else "float32")
    tokens = random_tokens()

    def work(i):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "bfloat16"):
            model.z_cat_at(tokens, [LAYER])

    with keep_freed_memory():           # as in train.py
        return timed(work, TIMES[DEVICE])


def z_cat_of_transformers(kind):
    """The whole model, with a hook on the layer's output projection that keeps its input."""
    import transformers
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).requires_grad_(False)
    model = in_kind(model, kind)
    kept = []
    model.transformer.h[LAYER].attn.c_proj.register_forward_pre_hook(
        lambda _, args: kept.append(args[0]))
    tokens = random_tokens()

    def work(i):
        kept.clear()
        model(tokens)

    return timed(work, TIMES[DEVICE])


def z_cat_of_transformer_lens(kind, stop):
    """Version 4: its bridge to the model of transformers, and its cache of hook_z. stop: after the
    layer, which is faster."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge
    inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="eager"))
    inner = in_kind(inner.requires_grad_(False), kind)
    with tempfile.TemporaryDirectory() as folder:
        model = TransformerBridge.boot_transformers(
            folder, hf_model=inner, device=DEVICE, dtype=inner.dtype,
            tokenizer=some_tokenizer(folder))
    return timed_cache(model, stop)


def some_tokenizer(folder):
    """The bridge asks for one, from a folder, though no text is read here."""
    import tokenizers
    import transformers
    end = "<|endoftext|>"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({end: 0}, end))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end,
                                         pad_token=end).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def z_cat_of_transformer_lens_3(kind, stop):
    """Version 3, which sae-lens installs: its own model."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    model = HookedTransformer(HookedTransformerConfig(
        n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072, d_vocab=50257, n_ctx=1024,
        act_fn="gelu_new", normalization_type="LN", device=DEVICE,
        dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)).requires_grad_(False)
    return timed_cache(in_kind(model, kind), stop)


def timed_cache(model, stop):
    tokens = random_tokens()
    name = f"blocks.{LAYER}.attn.hook_z"
    last = LAYER + 1 if stop else None

    def work(i):
        _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=last)
        assert cache[name].shape[:2] == tokens.shape

    return timed(work, TIMES[DEVICE])


def compare_z_cat(config):
    """-> {name: tokens/s}."""
    title = f"z_cat of layer {LAYER}, GPT-2 Small's size, {ROWS[config.device]} rows"
    print(f"\n{title:50} {'tokens/s':>10} {'ratio':>7}   {'peak':>9}")
    libraries = {"transformers": (z_cat_of_transformers, (), "transformer-lens"),
                 "transformer-lens 4": (z_cat_of_transformer_lens, (False,), "transformer-lens"),
                 "transformer-lens 4, stopped":
                     (z_cat_of_transformer_lens, (True,), "transformer-lens"),
                 "transformer-lens 3, stopped": (z_cat_of_transformer_lens_3, (True,), "sae-lens")}
    speeds = {}

    def show(name, kind, result):
        seconds, _, peak = result
        speeds[name, kind] = ROWS[config.device] * 128 / seconds
        ratio = speeds["ours", kind] / speeds[name, kind]
        print(f"{f'{name}, {kind}':50} {speeds[name, kind]:10,.0f} {ratio:7.2f} x {peak:9,.0f} MiB",
              flush=True)

    for kind in kinds(config.device):
        show("ours", kind, measured(config.device, z_cat_of_ours, kind))
        for name, (work, args, library) in libraries.items():
            show(name, kind, measured(config.device, work, kind, *args, python=python_of(library)))
    return speeds


# ---- attribution ----


def dfa_ours():
    import direct
    pattern, v, w = attention()
    return timed(lambda i: direct.dfa(pattern, v, w), 1)


def dfa_through_the_large_tensor():
    """As in implementations that multiply pattern and values first, and sum over d_head last."""
    pattern, v, w = attention()

    def work(i):
        # (B,H,q,k,d_head)
        moved = pattern[..., None] * v.permute(0, 2, 1, 3)[:, :, None]
        return (moved * w.unflatten(0, (12, 64))[:, None, None]).sum(-1)

    return timed(work, 1)


def attention(B=8, T=128, H=12, d_head=64):
    pattern, v, w = torch.rand(B, H, T, T), torch.randn(B, T, H, d_head), torch.randn(H * d_head)
    return pattern.to(DEVICE), v.to(DEVICE), w.to(DEVICE)


def compare_dfa(config):
    rows = {"ours": measured(config.device, dfa_ours),
            "through (B,H,q,k,d_head)": measured(config.device, dfa_through_the_large_tensor)}
    print(f"{'DFA, 8 rows of 128 tokens, 12 heads of 64':46} {'ms':>9} {'ratio':>7}   {'peak':>9}")
    first = rows["ours"][0]
    for name, (seconds, _, peak) in rows.items():
        print(f"{name:46} {seconds * 1000:9.2f} {seconds / first:7.0f} x {'':9} {peak:9,.0f} MiB",
              flush=True)


def compare_whole(speeds, steps):
    """Sums: a batch through the model to layer 5, and one step of a large SAE. Libraries at their
    defaults, and at their fastest."""
    ours = 4096 / max(speed for (name, _), speed in speeds.items() if name == "ours")
    lens = {key: speed for key, speed in speeds.items() if key[0].startswith("transformer-lens")}
    fastest = max(lens, key=lens.get)
    theirs = [name for name in steps
              if name.startswith("sae-lens") and not name.endswith("the same algorithm")]
    quickest = min(theirs, key=steps.get)
    default = ("transformer-lens 4", "float32")
    of_libraries = {f"{default[0]}, and sae-lens, as they come":
                    (lens[default], steps["sae-lens, float32 (its default)"]),
                    f"{', '.join(fastest)}; {quickest}": (lens[fastest], steps[quickest])}
    whole = {"ours": ours + steps["ours"]}
    for name, (speed, step) in of_libraries.items():
        whole[name] = 4096 / speed + step
    print(f"\n{'GPT-2-sized model to layer 5 + SAE 24576':76} {'ms/batch':>9} {'ratio':>7}   "
          f"(sums of the above)")
    for name, seconds in whole.items():
        print(f"{name:76} {seconds * 1000:9.1f} {seconds / whole['ours']:7.2f} x")


def main():
    config = parse_flags(BenchmarkConfig, __doc__)
    compare_dfa(config)
    if config.device == "cpu":                  # on a GPU every step is the dense one
        compare_curves()
    if not (python_of("sae-lens") and python_of("transformer-lens")):
        print("\nthe other rows take two environments of their own, by the commands at the top of "
              "this file")
        return
    speeds = compare_z_cat(config)
    compare_steps(config, 256, 4096, 4096)
    compare_whole(speeds, compare_steps(config, 768, 24576, 4096))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["row"]:
        row(sys.argv[2])
    else:
        main()
