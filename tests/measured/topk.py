"""TopK SAEs against L1 SAEs: the same layers, the same batches, the same number of active features.

    python tests/measured/topk.py

For every layer an SAE is trained with an L1 term, on half again as many activations as train.py
takes by default; then a TopK SAE
whose k is the L0 that came of it. Both are measured on the same held-out rows, so that differences
are paired: TopK less L1, with intervals over rows. One training run of each: what another seed
would give is not in these intervals.

Dead features are brought back in the same way in both, by resampling (`sae.resample`).

Shapes: R rows, B batch, D = H*d_head.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from data.errors import UserError, run  # noqa: E402
from data.files import check_writable, run_folder, write_json  # noqa: E402
from data.flags import field, parse_flags  # noqa: E402
from data.machine import keep_freed_memory, pick_device  # noqa: E402
from data.stats import format_ci, mean_with_ci  # noqa: E402
from data.tokens import set_n_tokens  # noqa: E402
from model import load_model  # noqa: E402
from sae import load_saes  # noqa: E402

KINDS = ("l1", "topk")
BATCH, LR = 2048, 1e-4              # of the steps that are timed
N_WARMUP, N_TIMED = 2, 30


@dataclass(frozen=True)
class TopKConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., or a directory in Hugging Face layout")
    corpus: str = field("python", "text: see train.py")
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all of them if not given")
    d_sae: int = field(2048, "features per SAE")
    l1: tuple[float, ...] = field((0.2,), "as in train.py")
    n_tokens: int = field(2_500_000, "training activations of each SAE")
    n_eval_rows: int = field(512, "held-out rows on which both are measured")
    seed: int = field(0, "as in train.py")
    device: str = field("auto", "cpu, cuda, mps or auto")
    out: str = field("out", "folder for results")


def trained(config, folder, **more):                        # -> {layer: metrics}
    """Train SAEs of all layers, half again as long as train.py does by default, and on larger
    batches."""
    settings = {name: getattr(config, name) for name in (
        "model", "corpus", "layers", "d_sae", "l1", "n_tokens", "n_eval_rows", "seed", "device")}
    schedule = {"batch_size": 2048, "warmup": 100, "decay": 0.2, "resample_every": 250}
    return train.train(train.TrainConfig(**settings | schedule | more, out=str(folder)))


def steps_per_second(saes, z, l1):                          # two SAEs, (N,D) -> two numbers
    """Training steps of both SAEs in turn, on the same batches: a machine that slows down slows
    both."""
    learners = [learner_of(sae, weight) for sae, weight in zip(saes, (l1, 0.0))]
    batches = z.split(BATCH)[:-1]
    for learner in learners:
        train.choose_step(learner, 0, (batches[0],))
    config = train.TrainConfig(batch_size=BATCH, lr=LR, warmup=1, decay=0.0, n_tokens=10**9)
    seconds = [0.0, 0.0]
    with keep_freed_memory():
        for step in range(N_WARMUP + N_TIMED):
            site = (batches[step % len(batches)],)
            for i, learner in enumerate(learners):
                begun = time.perf_counter()
                train.train_step(learner, site, step + 1, config)
                train.read_back({0: learner}, step + 1, BATCH)
                if step >= N_WARMUP:
                    seconds[i] += time.perf_counter() - begun
    return [N_TIMED / spent for spent in seconds]


def learner_of(sae, l1):                                    # -> train.Learner
    """A learner that goes on from a trained SAE."""
    learner = train.make_learner((sae.d_in,), sae.d_sae, l1, LR, sae.b_dec.device, sae.top_k)
    learner.sae.load_state_dict(sae.state_dict())
    learner.l0 = 20.0                                       # few: the sparse step is taken
    return learner


def main():
    config = parse_flags(TopKConfig, __doc__)
    device = pick_device(config.device)
    model = load_model(config.model, device)
    tokenizer = data.load_tokenizer(config.model)
    set_n_tokens(model, tokenizer, config.model)
    folder = run_folder(config.out, config.model) / "topk"
    check_writable(folder)

    of_l1 = trained(config, folder / "by_l1")
    k = tuple(round(metrics["l0"]) for metrics in of_l1.values())
    if min(k) < 1:
        raise UserError("an SAE came out with less than one active feature per token; lower --l1.")
    of_topk = trained(config, folder / "by_topk", top_k=k)

    layers = tuple(of_l1)
    held_out = next(data.rows(config.corpus, tokenizer, "held-out", T=128, n=config.n_eval_rows))
    held_out = held_out.to(device)
    z_cat = model.z_cat_at(held_out, layers)
    means = {layer: z[:, 1:].flatten(0, 1).mean(0) for layer, z in z_cat.items()}
    saes, by_row = {}, {}
    for kind in KINDS:
        saes[kind] = load_saes(run_folder(folder / f"by_{kind}", config.model), model, layers)
        by_row[kind] = train.evaluate_rows(model, saes[kind], held_out, means)

    found = {}
    for i, layer in enumerate(layers):
        more = by_row["topk"][layer]["ce_sae"] - by_row["l1"][layer]["ce_sae"]      # (R,)
        speed = steps_per_second([saes[kind][layer] for kind in KINDS],
                                 z_cat[layer][:, 1:].flatten(0, 1),
                                 train.per_layer(config.l1, layers)[layer])
        found[layer] = {"l1": of_l1[layer], "topk": of_topk[layer], "k": k[i],
                        "cross_entropy": mean_with_ci(more), "steps_per_second": speed}
    print(table(found))
    write_json(folder / "topk.json", {f"L{layer}": one for layer, one in found.items()})
    print(f"\nwritten to {folder}/")


def table(found):
    """A line for each kind and layer; the difference stands with TopK."""
    lines = ["TopK against L1: as many active features, the same batches; [95% interval over rows]",
             f"layer          L0  {'recovered over zero':>23}   variance   dead   steps/s   "
             "cross-entropy, TopK less L1"]
    for layer, one in found.items():
        for kind, speed in zip(KINDS, one["steps_per_second"]):
            m = one[kind]
            name = "L1" if kind == "l1" else f"TopK {one['k']}"
            recovered = format_ci(m["ce_recovered_zero"], m["ce_recovered_zero_ci"], ".1%")
            less = "" if kind == "l1" else format_ci(*one["cross_entropy"], "+.4f")
            lines.append(f"{layer:5d} {name:8} {m['l0']:5.1f}  {recovered:>23}  "
                         f"{m['explained_variance']:9.1%} {m['dead_fraction']:6.1%} {speed:9.1f}   "
                         f"{less}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
