"""Do SAEs on z_cat and on z_cat @ W_O find the same features? (The paper takes z_cat, so that heads can be
told apart, and assumes that they do.)

    python -m data.spaces

For every layer four SAEs see the same batches: one on z_cat, one on z_cat @ W_O, and another of each from
other initial weights, since two SAEs of the same activations differ too. On held-out text a feature's match
in another SAE is the feature whose activation correlates most with its own. The settings are the same for
all; L0 and the number of features that are alive are what comes of them, and stand beside the result.

Shapes: B batch, N held-out activations, D = H*d_head, d_sae.
"""

from dataclasses import dataclass, replace

import torch

import data
import model as models
import train
from data import common
from data.bpe import check_fits
from data.common import (Progress, UserError, check_writable, field, mean_of, parse_flags, pick_device,
                         run_folder, write_json)

MATCHED, MIN_PLACES = 0.7, 20       # least correlation of a match, least places of a feature compared
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
    learner = train.new_learner(z.shape[1], config.d_sae[0], config.l1[0], config.lr, z.device)
    train.initialise(learner, z, config, train.generator(config.seed, "start", key))
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
def compare(saes, z, W_O):                              # {name: SAE}, (N,D), (D,d_model) -> {pair: {...}}
    """Every SAE's features against their matches in another's: mean correlation, share of matches, mean
    cosine of the directions written to the residual stream; with 95% intervals over features."""
    f = {name: sae.encode(read_by(name, z, W_O)) for name, sae in saes.items()}
    usual = {name: ((one > 0).sum(0) >= MIN_PLACES).nonzero()[:, 0] for name, one in f.items()}
    written = {name: sae.W_dec if name in (OUT, OUT2) else sae.W_dec @ W_O for name, sae in saes.items()}
    results = {}
    for a, b in PAIRS:
        match, correlation = best_matches(f[a][:, usual[a]], f[b][:, usual[b]])
        cosine = torch.cosine_similarity(written[a][usual[a]], written[b][usual[b]][match])
        values = torch.stack([correlation, (correlation >= MATCHED).float(), cosine], 1).cpu().numpy()
        mean, interval = mean_of(values)
        names = ("correlation", "matched", "cosine")
        results[f"{a} in {b}"] = {"n_features": len(values), "l0": float((f[a] > 0).sum(1).float().mean()),
                                  **dict(zip(names, mean)),
                                  **{f"{name}_ci": list(pair) for name, pair in zip(names, zip(*interval))}}
    return results


def main():
    own = parse_flags(SpacesConfig, __doc__)
    device = pick_device(own.device)
    model, tokenizer = models.load(own.model, device), data.tokenizer(own.model)
    check_fits(tokenizer, model, own.model)
    layers = own.layers or tuple(range(model.config.n_layers))
    model.check_layers(layers)
    config = replace(train.TrainConfig(), batch_size=1024, lr=2.4e-3, warmup=200, n_tokens=own.n_tokens,
                     d_sae=(own.d_sae,), l1=(own.l1,), seed=own.seed, corpus=own.corpus, resample_times=0,
                     n_ctx=min(128, model.config.n_ctx))
    if own.n_tokens < config.batch_size or own.d_sae < 1 or own.n_eval_rows < 2:
        raise UserError(f"--n-tokens must be {config.batch_size} or more, --d-sae 1 and --n-eval-rows 2 or "
                        f"more.")
    folder = run_folder(own.out, own.model)
    check_writable(folder)
    held_out = next(data.rows(own.corpus, tokenizer, "held-out", config.n_ctx, own.n_eval_rows)).to(device)
    source = train.Source(model, tokenizer, config, layers, device)
    W_O = {layer: model.head_matrices(layer).W_O.flatten(0, 1) for layer in layers}
    source.fill(next(source.blocks(0)), 0)
    learners = {(layer, name): started(read_by(name, source.z[layer][:source.n_filled], W_O[layer]), config,
                                       f"{layer} {name}")
                for layer in layers for name in SPACES}
    progress = Progress(own.n_tokens, "tokens")
    with common.keep_freed_memory():
        for step, batches in enumerate(source.batches(0)):
            for (layer, name), learner in learners.items():
                train.learn(learner, read_by(name, batches[layer], W_O[layer]), step, config, layer)
            progress((step + 1) * config.batch_size)
    progress(own.n_tokens // config.batch_size * config.batch_size, last=True)
    results = {}
    print(f"\na match correlates by {MATCHED} or more; [95% interval over features]\n"
          f"{'layer  features of ... in ...':46}{'number':>7} {'L0':>5}   {'mean correlation':22}  "
          f"{'matched':20}  cosine")
    for layer in layers:
        mine = {name: learners[layer, name] for name in SPACES}
        saes = {name: one.sae.rescale(one.scale).requires_grad_(False) for name, one in mine.items()}
        z = torch.cat([model.z_cat_at(part, [layer])[layer][:, 1:].flatten(0, 1)
                       for part in held_out.split(32)])
        results[f"L{layer}"] = compare(saes, z, W_O[layer])
        for pair, r in results[f"L{layer}"].items():
            shown = lambda name, form: "{:{f}} [{:{f}}, {:{f}}]".format(r[name], *r[name + "_ci"], f=form)
            print(f"{layer:5d}  {pair:39}{r['n_features']:7d} {r['l0']:5.1f}   "
                  f"{shown('correlation', '.3f'):22}  {shown('matched', '.1%'):20}  {shown('cosine', '.3f')}")
    write_json(folder / "spaces.json", {"matched": MATCHED, "n_tokens": own.n_tokens, "layers": results})
    print(f"\nwritten to {folder}/spaces.json")


if __name__ == "__main__":
    common.run(main)
