"""Do SAEs on z_cat and on z_cat @ W_O find the same features? (The paper takes z_cat, so that heads
can be told apart, and assumes that they do.)

    python tests/measured/spaces.py

For every layer four SAEs see the same batches: one on z_cat, one on z_cat @ W_O, and another of
each from other initial weights, since two SAEs of the same activations differ too. On held-out text
a feature's match in another SAE is the feature whose activation correlates most with its own. The
settings are the same for all; L0 and the number of features that are alive are what comes of them,
and stand beside the result.

Shapes: B batch, N held-out activations, D = H*d_head, d_sae.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from data.errors import UserError, run  # noqa: E402
from data.files import check_writable, run_folder, write_json  # noqa: E402
from data.flags import field, parse_flags  # noqa: E402
from data.machine import keep_freed_memory, pick_device  # noqa: E402
from data.progress import Progress  # noqa: E402
from data.stats import format_ci, mean_with_ci  # noqa: E402
from data.tokens import set_n_tokens  # noqa: E402
from model import load_model  # noqa: E402

# least correlation of a match, least places of a feature compared
MATCHED, MIN_PLACES = 0.7, 20
Z, OUT, Z2, OUT2 = SPACES = "z_cat", "z_cat @ W_O", "z_cat, other start", "z_cat @ W_O, other start"
PAIRS = (Z, OUT), (Z, Z2), (OUT, Z), (OUT, OUT2)


@dataclass(frozen=True)
class SpacesConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., or a directory in Hugging Face layout")
    corpus: str = field("python", "text: see train.py")
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all of them if not given")
    d_sae: int = field(2048, "features per SAE")
    l1: float = field(0.2, "weight of the sparsity term, in units of the activations' size")
    n_tokens: int = field(1_000_000, "training activations")
    n_eval_rows: int = field(256, "held-out rows on which features are compared")
    seed: int = field(0, "as in train.py")
    device: str = field("auto", "cpu, cuda, mps or auto")
    out: str = field("out", "folder for results")


def started(z, config, key):                            # (N,d_in) -> train.Learner
    """An SAE fitted to the first activations; the key draws its directions."""
    learner = train.make_learner((z.shape[1],), config.d_sae[0], config.l1[0], config.lr, z.device)
    train.initialise(learner, (z,), config.normalise, train.generator(config.seed, "start", key))
    train.choose_step(learner, key, (z,))
    return learner


def read_by(name, z, W_O):                              # (N,D), (D,d_model) -> (N,d_in)
    """What the SAE of this name reads."""
    return z @ W_O if name in (OUT, OUT2) else z


def best_matches(f, g, chunk=512):                      # (N,m), (N,n) -> (m,), (m,)
    """For every column of f the column of g that correlates most with it, and the correlation."""
    unit = lambda x: torch.nn.functional.normalize(x - x.mean(0), dim=0)
    g = unit(g)
    found = [(unit(part).T @ g).max(1) for part in f.split(chunk, 1)]
    return torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])


@torch.no_grad()
# {name: SAE}, (N,D), (D,d_model) -> {pair: {...}}
def compare(saes, z, W_O):
    """Every SAE's features against their matches in another's: mean correlation, share of matches,
    mean cosine of the directions written to the residual stream; with 95% intervals over
    features."""
    f = {name: sae.encode(read_by(name, z, W_O)) for name, sae in saes.items()}
    usual = {name: ((one > 0).sum(0) >= MIN_PLACES).nonzero()[:, 0] for name, one in f.items()}
    written = {
        name: sae.W_dec if name in (OUT, OUT2) else sae.W_dec @ W_O
        for name, sae in saes.items()
    }
    results = {}
    for a, b in PAIRS:
        match, correlation = best_matches(f[a][:, usual[a]], f[b][:, usual[b]])
        cosine = torch.cosine_similarity(written[a][usual[a]], written[b][usual[b]][match])
        values = torch.stack([correlation, (correlation >= MATCHED).float(), cosine],
                             1).cpu().numpy()
        mean, interval = mean_with_ci(values)
        names = ("correlation", "matched", "cosine")
        results[f"{a} in {b}"] = {
            "n_features": len(values), "l0": float(
                (f[a] > 0).sum(1).float().mean()), **dict(zip(names, mean)),
            **{f"{name}_ci": list(pair)
               for name, pair in zip(names, zip(*interval))}
        }
    return results


def main():
    own = parse_flags(SpacesConfig, __doc__)
    device = pick_device(own.device)
    model, tokenizer = load_model(own.model, device), data.load_tokenizer(own.model)
    set_n_tokens(model, tokenizer, own.model)
    layers = own.layers or tuple(range(model.config.n_layers))
    model.check_layers(layers)
    config = replace(train.TrainConfig(), batch_size=1024, lr=2.4e-3, warmup=200, decay=0.2,
                     seed=own.seed,
                     n_tokens=own.n_tokens, d_sae=(own.d_sae,), l1=(own.l1,), corpus=own.corpus,
                     resample_times=0, n_ctx=min(128, model.config.n_ctx))
    if own.n_tokens < config.batch_size or own.d_sae < 1 or own.n_eval_rows < 2:
        raise UserError(f"--n-tokens must be {config.batch_size} or more, --d-sae 1 and "
                        "--n-eval-rows 2 or more.")
    folder = run_folder(own.out, own.model)
    check_writable(folder)
    held_out = next(data.rows(own.corpus, tokenizer, "held-out", config.n_ctx, own.n_eval_rows))
    W_O = {layer: model.head_matrices(layer).W_O.flatten(0, 1) for layer in layers}
    learners = train_all(model, tokenizer, config, layers, device, W_O)
    results = {}
    for layer in layers:
        saes = {}
        for name in SPACES:
            learner = learners[layer, name]
            saes[name] = learner.sae.rescale(learner.scale_out).requires_grad_(False)
        z = torch.cat([model.z_cat_at(part, [layer])[layer][:, 1:].flatten(0, 1)
                       for part in held_out.to(device).split(32)])
        results[f"L{layer}"] = compare(saes, z, W_O[layer])
    report(results)
    write_json(folder / "spaces.json",
               {"matched": MATCHED, "n_tokens": own.n_tokens, "layers": results})
    print(f"\nwritten to {folder}/spaces.json")


def train_all(model, tokenizer, config, layers, device, W_O):   # -> {(layer, name): Learner}
    """Four SAEs for each layer on the same batches."""
    buffer = train.ActivationBuffer(model, tokenizer, config, layers, device)
    buffer.fill(next(buffer.blocks(0)), 0)
    learners = {}
    for layer in layers:
        z = buffer.sites[layer][0][:buffer.n_filled]
        for name in SPACES:
            learners[layer, name] = started(read_by(name, z, W_O[layer]), config, f"{layer} {name}")
    progress = Progress(config.n_tokens, "tokens")
    with keep_freed_memory():
        for step, batches in buffer.batches(0):
            for (layer, name), learner in learners.items():
                z = read_by(name, batches[layer][0], W_O[layer])
                train.train_step(learner, (z,), step, config)
            train.read_back(learners, step, config.batch_size)
            progress((step + 1) * config.batch_size)
    progress(config.n_steps * config.batch_size, last=True)
    return learners


def report(results):
    """The table."""
    print(f"\na match correlates by {MATCHED} or more; [95% interval over features]\n"
          f"{'layer  features of ... in ...':46}{'number':>7} {'L0':>5}   {'mean correlation':22}  "
          f"{'matched':20}  cosine")
    for layer, by_pair in results.items():
        for pair, r in by_pair.items():
            correlation = format_ci(r["correlation"], r["correlation_ci"], ".3f")
            matched = format_ci(r["matched"], r["matched_ci"], ".1%")
            cosine = format_ci(r["cosine"], r["cosine_ci"], ".3f")
            print(f"{layer[1:]:>5}  {pair:39}{r['n_features']:7d} {r['l0']:5.1f}   "
                  f"{correlation:22}  {matched:20}  {cosine}")


if __name__ == "__main__":
    run(main)
