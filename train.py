"""The main job: train one sparse autoencoder per layer on z_cat, and measure what the reconstructions cost
the model.

    python train.py                          the shipped model, all layers, a few minutes on two cores
    python train.py --layers 1 --d-sae 4096 --n-tokens 10e6
    python train.py --model gpt2 --preset paper
    python train.py --model gpt2 --corpus c4 --saes kissane         measure SAEs that are there, train nothing

Every forward pass serves all layers. A block of whole rows is turned into activations, shuffled, and drained
batch by batch; BOS (position 0) is left out. What is random depends on the seed and the step alone, so a run
that is stopped and goes on with --resume ends with the same bytes as one that was not.

Written to <out>/<model>/: L<layer>/sae.safetensors, config.json and metrics.json, log.jsonl, training.png.

Shapes: R rows, T positions, B batch of activations, D = H*d_head = d_in, d_sae.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import data
import model as models
from data.bpe import check_fits
from data.common import (Progress, UserError, atomic, bootstrap, check_writable, deferred_interrupt,
                         field, keep_freed_memory, parse_flags, parse_json, pick_device, pick_dtype, run,
                         run_folder, with_interval, write_json)
from data.figures import plot_training
from data.team import Team, join
from data.weights import read_tensors
from sae import (SAE, dense_step, load_all, normalise_decoder, project_decoder_gradient, resample,
                 sparse_step, splice)

DEAD_WINDOW = 1_000_000     # training activations: a feature is dead if it fired on none of the last ones
CHECKPOINT_EVERY = 250      # steps: what a power cut can cost


@dataclass(frozen=True)
class TrainConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., or a directory in Hugging Face layout")
    corpus: str = field("python", "text: \"python\" is what tiny was trained on, \"c4\" is streamed from the "
                        "hub; or a .txt, .jsonl or .json.gz file, a folder of them, an address")
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all of them if not given")
    d_sae: tuple[int, ...] = field((2048,), "features per SAE: one number for all layers, or one for each "
                                   "(paper: 24576 = 32 x d_in, layers 5 and 7 49152)")
    l1: tuple[float, ...] = field((0.2,),
                                  "weight of the sparsity term: one for all layers, or one for each (paper: "
                                  "0.8 to 3, of raw z_cat)")
    normalise: bool = field(True, "train on z_cat in units of its mean distance from its mean, so that one "
                            "l1 suits all layers (paper: no)")
    lr: float = field(3.4e-3, "Adam's peak learning rate (paper: 1.2e-3)")
    n_tokens: int = field(2_500_000, "training activations per layer (paper: about 2e9)")
    batch_size: int = field(2048, "activations per step (paper: 4096)")
    warmup: int = field(100, "steps from 0.1 to 1 x lr, again after each resampling; l1 rises from 0 over "
                        "the first of these (paper: 1000)")
    decay: float = field(0.2, "last part of the run in which lr falls to 0 (paper: 0)")
    resample_every: int = field(250, "steps between resamplings of dead features, none in the last half of "
                                "the run (paper: 25000)")
    resample_times: int = field(4, "resamplings at most (paper: 4)")
    n_ctx: int = field(128, "tokens per row, BOS included (paper: 128)")
    n_eval_rows: int = field(256, "held-out rows for the metrics")
    block_mib: int = field(512, "memory for a block of activations")
    seed: int = field(0, "fixes rows, initial weights, batches and resampling")
    device: str = field("auto", "cpu, cuda, mps or auto")
    dtype: str = field("float32", "the model's numbers: float32, or bfloat16 for half the memory")
    preset: str = field("", "paper: the paper's settings for GPT-2 Small, by layer; other flags still win")
    saes: str = field("", "measure the SAEs in this folder, or kissane, or gemma-scope; train nothing")
    out: str = field("out", "folder for results")
    resume: bool = field(False, "go on with the run that is in --out")
    half: bool = field(False, "store the SAEs in float16, as the shipped ones are; the metrics are of what "
                       "is stored")


@dataclass
class Learner:
    """One layer's SAE while it is trained."""
    sae: SAE
    optimizer: torch.optim.Adam
    l1: float
    fired: Tensor           # (d_sae,) inputs on which it was active since the last resampling; 0: it is dead
    last_fired: Tensor      # (d_sae,) training activations seen when it was last active: dead in the metrics
    l0: float               # active features per input in the last step: chooses the dense or sparse step
    mean: Tensor            # (D,) mean activation over the first block, the vector of mean ablation
    scale: Tensor           # () what activations are divided by: 1, or their mean distance from the mean
    mse: float = math.nan   # the last step's, for the log
    sparsity: float = math.nan


def train(config):
    """Train, evaluate, write everything -> {layer: metrics}, {} in a process that torchrun started and that
    does not lead. Raises UserError for what the user can mend."""
    team, device = join(), pick_device(config.device)
    model = models.load(config.model, device, pick_dtype(config.dtype))
    tokenizer = data.tokenizer(config.model)
    layers = config.layers or tuple(range(model.config.n_layers))
    folder = run_folder(config.out, config.model)
    check(config, model, tokenizer, layers, folder, team)
    if team.leads and not config.saes:
        remove_leftovers(folder)
    held_out = next(data.rows(config.corpus, tokenizer, "held-out", config.n_ctx, config.n_eval_rows))
    held_out = held_out.to(device)
    if config.saes:
        return measure(config, model, tokenizer, held_out, folder)
    source, begun = Source(model, tokenizer, config, layers, device, team), time.monotonic()
    first_step, learners = start(config, source, folder)
    step, n_steps = first_step, config.n_tokens // config.batch_size
    progress, log = Progress(config.n_tokens, "tokens"), Log(folder, config, first_step, team)

    with deferred_interrupt() as interrupted, keep_freed_memory():
        for batches in source.batches(first_step):
            for layer, learner in learners.items():
                learn(learner, batches[layer], step, config, layer, team)
            step += 1
            if step in resampling_steps(config):
                for layer, learner in learners.items():
                    resample(learner.sae, learner.optimizer, learner.fired == 0,
                             source.sample(layer) / learner.scale,
                             generator(config.seed, "resample", layer, step - 1))
                    learner.fired.zero_()
            progress(step * config.batch_size,
                     "L0 by layer: " + "  ".join(f"{one.l0:.1f}" for one in learners.values()))
            log(step, learners)
            stop = team.any(interrupted())
            if team.leads and (stop or step % CHECKPOINT_EVERY == 0 or step == n_steps):
                save_checkpoint(folder, config, step, learners)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step}; --resume goes on from there.")
    if step < n_steps:
        if team.leads and step > first_step:
            save_checkpoint(folder, config, step, learners)
        raise UserError(f"the text of --corpus {config.corpus} ended after {step * config.batch_size:,} of "
                        f"{config.n_tokens:,} activations; put more text there and --resume, or start anew "
                        f"with --n-tokens {step * config.batch_size} and another --out.")
    speed = (step - first_step) * config.batch_size / (time.monotonic() - begun)
    progress(step * config.batch_size, last=True)
    return finish(config, model, held_out, learners, folder, speed) if team.leads else {}


def per_layer(value, layers):
    """A setting that is one number for all layers or a tuple with one for each -> {layer: number}."""
    values = value if isinstance(value, tuple) else (value,)
    return dict(zip(layers, values * len(layers) if len(values) == 1 else values))


def preset(config):
    """The settings that --preset names; the paper gives its number of tokens as about 2e9."""
    if config.preset == "":
        return {}
    if config.preset != "paper":
        raise UserError(f"--preset {config.preset} is unknown; the one there is is paper.")
    layers = config.layers or tuple(range(12))
    l1 = (1.8, 0.8, 1.0, 0.9, 1.1, 1.0, 1.1, 1.1, 1.3, 1.2, 1.3, 3.0)
    if bad := [layer for layer in layers if not 0 <= layer < len(l1)]:
        raise UserError(f"--preset paper has settings for layers 0 to 11 of GPT-2 Small, not for layer "
                        f"{bad[0]}.")
    return {"layers": layers, "l1": tuple(l1[layer] for layer in layers),
            "d_sae": tuple(49152 if layer in (5, 7) else 24576 for layer in layers), "normalise": False,
            "lr": 1.2e-3, "n_tokens": 2_000_000_000, "batch_size": 4096, "warmup": 1000, "decay": 0.0,
            "resample_every": 25_000, "resample_times": 4, "n_ctx": 128, "corpus": "c4"}


def check(config, model, tokenizer, layers, folder, team):
    """Raise UserError for settings that cannot work, before any time is spent."""
    model.check_layers(layers)
    check_fits(tokenizer, model, config.model)
    if len(set(layers)) != len(layers):
        raise UserError("--layers names a layer twice; name each once.")
    for name in ("l1", "d_sae"):
        if isinstance(values := getattr(config, name), tuple) and len(values) not in (1, len(layers)):
            raise UserError(f"--{name.replace('_', '-')} has {len(values)} values for {len(layers)} layers; "
                            f"give one for all, or one for each.")
    if not 3 <= config.n_ctx <= model.config.n_ctx:
        raise UserError(f"--n-ctx {config.n_ctx} does not fit this model, which takes 3 to "
                        f"{model.config.n_ctx} tokens.")
    l1, d_sae = per_layer(config.l1, layers), per_layer(config.d_sae, layers)
    if min(d_sae.values()) < 1:
        raise UserError(f"--d-sae is {min(d_sae.values())}; it must be at least 1.")
    for name in ("batch_size", "n_eval_rows", "block_mib", "resample_every", "warmup"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 1.")
    if config.seed < 0 or config.lr <= 0 or min(l1.values()) < 0 or not 0 <= config.decay <= 1:
        raise UserError("--lr must be above 0, --seed and --l1 at least 0, and --decay between 0 and 1.")
    if team.size > 1 and config.batch_size < 32 * team.size:
        raise UserError(f"--batch-size {config.batch_size} is too small for {team.size} processes; give "
                        f"{32 * team.size} or more.")
    if config.n_tokens < config.batch_size:
        raise UserError(f"--n-tokens {config.n_tokens} is less than one batch of {config.batch_size}; raise "
                        f"it or lower --batch-size.")
    if config.resume and not (folder / "checkpoint.safetensors").is_file():
        raise UserError(f"--resume: there is no checkpoint in {folder}; leave out --resume to start anew.")
    if not config.resume and not config.saes and (folder / "checkpoint.safetensors").is_file():
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove "
                        f"{folder}/checkpoint.safetensors.")
    check_writable(folder)


def remove_leftovers(folder):
    """Remove what a run was writing when it was killed: our own temporary files, and those of safetensors."""
    for path in (*folder.glob(".*tmp*"), *folder.glob("L*/.*tmp*")):
        if path.is_file():
            path.unlink()


# ---- one step ----


def learn(learner, z, step, config, layer, team=Team()):                # z (B,D), or a team's share of it
    """One layer's part of a step, in place: loss, gradients, projection, Adam, unit norm, counts."""
    sae, optimizer, z = learner.sae, learner.optimizer, z / learner.scale
    result = step_of(learner, z)(sae, z, learner.l1 * min(1.0, (step + 1) / config.warmup))
    if team.size > 1:                                   # from means over shares to the mean over the batch
        for mean in (result.mse, result.sparsity, *result.gradients.values()):
            mean *= len(z) / config.batch_size
        team.sum(result.mse, result.sparsity, result.fired, *result.gradients.values())
    if not math.isfinite(result.mse + result.sparsity):
        raise UserError(f"the loss of layer {layer} is not finite at step {step}; the last checkpoint is "
                        f"kept; start again with a lower --lr and another --out.")
    project_decoder_gradient(sae, result.gradients["W_dec"])
    for name, gradient in result.gradients.items():
        getattr(sae, name).grad = gradient
    optimizer.param_groups[0]["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()       # gradients of one layer at a time are in memory
    normalise_decoder(sae)
    learner.fired += result.fired
    learner.last_fired[result.fired > 0] = (step + 1) * config.batch_size
    learner.l0 = float(result.fired.sum()) / config.batch_size
    learner.mse, learner.sparsity = float(result.mse), float(result.sparsity)


def step_of(learner, z):
    """The gradient's function: the sparse one where few features were active in the step before."""
    return sparse_step if z.device.type == "cpu" and learner.l0 < learner.sae.d_sae / 16 else dense_step


def learning_rate(step, config):
    """Half a cosine from 0.1 to 1 x lr, at the start and after each resampling; linear to 0 at the end."""
    since = step - max((s for s in resampling_steps(config) if s <= step), default=0)
    rise = 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * min(1.0, since / config.warmup)))
    n_steps = config.n_tokens // config.batch_size
    fall = min(1.0, (n_steps - step) / max(config.decay * n_steps, 1e-9))
    return config.lr * rise * fall


def resampling_steps(config):
    """The steps before which dead features are resampled."""
    half = config.n_tokens // config.batch_size // 2
    return [k * config.resample_every for k in range(1, config.resample_times + 1)
            if k * config.resample_every <= half]


# ---- activations ----


class Source:
    """Batches of all layers' activations, block by block. Everything depends on seed and step alone. In a
    team, each process has the activations of its own rows of a block, and its share of each batch."""

    def __init__(self, model, tokenizer, config, layers, device, team=Team()):
        self.model, self.tokenizer, self.config, self.team = model, tokenizer, config, team
        self.layers, self.device, self.z, self.number = layers, device, None, None
        per_row, D = config.n_ctx - 1, model.config.n_heads * model.config.d_head
        n_steps = config.n_tokens // config.batch_size
        in_memory = config.block_mib * 2**20 // (D * 4 * len(layers))       # activations
        n_blocks = math.ceil(n_steps / max(1, in_memory // config.batch_size))
        in_each = math.ceil(n_steps / n_blocks)                             # steps: as many in each block
        self.n_rows = math.ceil(in_each * config.batch_size / per_row)
        self.steps_per_block = self.n_rows * per_row // config.batch_size

    def batches(self, first_step):
        """Yields {layer: (B,D)} for every step from `first_step` on, until the steps or the text end: copies,
        which no refill touches."""
        n_steps, size = self.config.n_tokens // self.config.batch_size, self.config.batch_size
        number, place = divmod(first_step, self.steps_per_block)
        step = first_step
        if step == n_steps:
            return
        for tokens in self.blocks(number):
            if number != self.number:
                self.fill(tokens, number)
            order = torch.randperm(self.n_filled, generator=generator(self.config.seed, "block", number))
            for i in range(place, self.n_filled // size):
                if step == n_steps:
                    return
                _, index = self.team.share(order[i * size:(i + 1) * size], self.config.n_ctx - 1)
                index = index.to(self.device)
                yield {layer: self.z[layer][index] for layer in self.layers}
                step += 1
            if step == n_steps:
                return
            number, place = number + 1, 0

    def fill(self, tokens, number):                     # (R,T), with fewer rows where the text ends
        """Run the model on block `number` and keep z_cat, but not BOS's: self.z is {layer: (N,D)} of this
        process's rows; the block has n_filled activations in all."""
        self.n_filled, self.number = len(tokens) * (self.config.n_ctx - 1), number
        tokens = tokens[self.team.rank::self.team.size]
        if self.z is None:
            shape = (math.ceil(self.n_rows / self.team.size), self.config.n_ctx - 1,
                     self.model.config.n_heads * self.model.config.d_head)
            self.rows = {layer: torch.empty(shape, device=self.device) for layer in self.layers}
            self.z = {layer: rows.flatten(0, 1) for layer, rows in self.rows.items()}
        for i in range(0, len(tokens), 64):
            found = self.model.z_cat_fast(tokens[i:i + 64].to(self.device), self.layers)
            for layer in self.layers:
                self.rows[layer][i:i + len(tokens[i:i + 64])] = found[layer][:, 1:]

    def sample(self, layer):
        """Some 8192 activations of the block at hand, the same in all processes: what dead features are drawn
        from."""
        index = torch.arange(0, self.n_filled, max(1, self.n_filled // 8192))
        mine, kept = self.team.share(index, self.config.n_ctx - 1)
        z = torch.zeros(len(index), self.z[layer].shape[1], device=self.device)
        z[mine.to(self.device)] = self.z[layer][kept.to(self.device)]
        self.team.sum(z)
        return z

    def blocks(self, number):
        return data.rows(self.config.corpus, self.tokenizer, "train", self.config.n_ctx, self.n_rows,
                         self.config.seed, number * self.n_rows)


# ---- start, stop, go on ----


def start(config, source, folder):
    """New learners, or those of the checkpoint -> (step to begin with, {layer: Learner})."""
    d_in = source.model.config.n_heads * source.model.config.d_head
    d_sae, l1 = per_layer(config.d_sae, source.layers), per_layer(config.l1, source.layers)
    learners = {}
    for layer in source.layers:
        learners[layer] = new_learner(d_in, d_sae[layer], l1[layer], config.lr, source.device)
    if config.resume:
        return load_checkpoint(folder, config, learners), learners
    if source.team.size > 1:                            # everybody begins with the same, from the whole block
        source = Source(source.model, source.tokenizer, config, source.layers, source.device)
    begun = time.monotonic()
    source.fill(next(source.blocks(0)), 0)
    seconds_per_token = (time.monotonic() - begun) / source.n_filled
    for layer, learner in learners.items():
        initialise(learner, source.z[layer][:source.n_filled], config, generator(config.seed, "start", layer))
    expect(config, source, learners, seconds_per_token)
    return 0, learners


def new_learner(d_in, d_sae, l1, lr, device="cpu"):     # -> Learner
    """An SAE and its Adam before the first step; `initialise` then fits it to activations."""
    sae = SAE(d_in, d_sae).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.0, 0.9999), fused=True)
    zeros = torch.zeros(d_sae, dtype=torch.int64, device=device)
    return Learner(sae, optimizer, l1, zeros, zeros.clone(), float(d_sae), torch.zeros_like(sae.b_dec.data),
                   torch.ones((), device=device))


def expect(config, source, learners, seconds_per_token):
    """Say what training will take: memory by count, time by the first block and a step of each SAE's copy."""
    bytes_of = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    saes = [bytes_of(one.sae) for one in learners.values()]
    # weights and Adam's two moments of all SAEs; gradients and the encoder's product of one; torch itself
    block = sum(z.nbytes for z in source.z.values())
    memory = (bytes_of(source.model) + block + 3 * sum(saes) + 3 * max(saes)
              + 8 * config.batch_size * max(one.sae.d_sae for one in learners.values()) + 3e8)
    seconds = seconds_per_token * config.n_tokens
    for layer, one in learners.items():
        trial, z = copy.deepcopy(one), source.z[layer][:config.batch_size]
        for step in range(2):       # the first makes Adam's moments
            begun = time.monotonic()
            learn(trial, z, step, config, layer)
        seconds += (time.monotonic() - begun) * (config.n_tokens // config.batch_size)
    sizes = sorted({one.sae.d_sae for one in learners.values()})
    duration = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    print(f"{len(saes)} x SAE {one.sae.d_in} -> {' or '.join(map(str, sizes))}, {config.n_tokens:,} "
          f"activations: expect {memory / 1e9:.1f} GB of memory and {duration} of training", flush=True)


@torch.no_grad()
def initialise(learner, z, config, random):                             # z (N,D)
    """b_dec is the mean activation, W_dec's rows are random directions in the space that activations fill,
    W_enc half their transpose.

    Attention outputs have low rank, and features that start outside their space stay dead (arXiv 2508.16929),
    so a row is a random mixture of centred activations: normal, with the activations' own covariance. Each
    b_enc lets its feature fire on one token in a hundred, so that the sparse step serves from the start.
    """
    sae, learner.mean = learner.sae, z.mean(0)
    centred = z[:: max(1, len(z) // 8192)] - learner.mean
    if config.normalise:
        learner.scale = centred.norm(dim=-1).mean()
    covariance = (centred.T @ centred).cpu()
    try:
        variances, directions = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:        # in float32 it may not converge where the rank is low
        variances, directions = (found.float() for found in torch.linalg.eigh(covariance.double()))
    noise = torch.randn(sae.d_sae, sae.d_in, generator=random)
    mixtures = noise * variances.clamp_min(0).sqrt() @ directions.T
    sae.b_dec.copy_(learner.mean / learner.scale)
    sae.W_dec.copy_(F.normalize(mixtures, dim=-1))
    sae.W_enc.copy_(0.5 * sae.W_dec.T)
    pre = centred[::8] / learner.scale @ sae.W_enc
    sae.b_enc.copy_(-pre.kthvalue(math.ceil(0.99 * len(pre)), dim=0).values)
    learner.l0 = 0.01 * sae.d_sae


def generator(*key):
    """A random generator for each key (seed, purpose, step ...): no draw depends on those before it."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7],
                                                        "big"))


def settings(config):
    """The config as a dict, without what may differ between a run and its resumption."""
    return {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(config))).items()
            if k not in ("resume", "out", "device")}


def save_checkpoint(folder, config, step, learners):
    """All that the rest of the run depends on: weights, Adam's moments, counts, the step, the settings."""
    state = {"step": torch.tensor(step)}
    for layer, learner in learners.items():
        for name, parameter in learner.sae.named_parameters():
            state[f"{layer} {name}"] = parameter.detach()
            adam = learner.optimizer.state[parameter]
            state |= {f"{layer} {name} {key}": adam[key] for key in ("step", "exp_avg", "exp_avg_sq")}
        state |= {f"{layer} {name}": getattr(learner, name)
                  for name in ("fired", "last_fired", "mean", "scale")}
        state[f"{layer} l0"] = torch.tensor(learner.l0, dtype=torch.float64)
    with atomic(folder / "checkpoint.safetensors") as temporary:
        save_file(state, temporary, metadata={"settings": json.dumps(settings(config))})


def load_checkpoint(folder, config, learners):
    """Put a checkpoint back -> the step to go on with. UserError if damaged or of other settings."""
    path = folder / "checkpoint.safetensors"
    state, mine = dict(read_tensors(path)), settings(config)
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
    try:
        theirs = dict(parse_json(about["settings"]))
        if different := [key for key in mine if theirs.get(key) != mine[key]]:
            key = different[0]
            raise UserError(f"--resume: {path} was made with {key} = {theirs.get(key)}, not {mine[key]}; use "
                            f"the same settings, or another --out.")
        for layer, learner in learners.items():
            put_back(learner, lambda name: state[f"{layer} {name}"])
        if not 0 <= (step := int(state["step"])) <= config.n_tokens // config.batch_size:
            raise ValueError
        return step
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: {path} is damaged: it lacks something, or holds other numbers than a "
                        f"checkpoint; remove it and start anew.") from error


@torch.no_grad()
def put_back(learner, saved):
    """Make a learner what it was when `saved(name)`, a function to tensors, was written. Raises ValueError
    for one of another shape or type, or not finite."""
    def into(tensor, name):
        found = saved(name)
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype) or not found.isfinite().all():
            raise ValueError(name)
        return tensor.copy_(found)

    for name, parameter in learner.sae.named_parameters():
        into(parameter, name)
        learner.optimizer.state[parameter] = {
            "step": into(parameter.new_zeros(()), f"{name} step"),
            **{key: into(torch.empty_like(parameter), f"{name} {key}") for key in ("exp_avg", "exp_avg_sq")}}
    for name in ("fired", "last_fired", "mean", "scale"):
        into(getattr(learner, name), name)
    learner.l0 = float(saved("l0"))


class Log:
    """log.jsonl: about 200 lines, with what training.png shows."""

    def __init__(self, folder, config, first_step, team):
        self.path, self.every = folder / "log.jsonl", max(1, config.n_tokens // config.batch_size // 200)
        self.config, self.silent = config, not team.leads
        if self.silent:
            return
        kept = [line for line in read_log(self.path) if line["step"] <= first_step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __call__(self, step, learners):
        if self.silent or step % self.every:
            return
        line = {"step": step, "tokens": step * self.config.batch_size,
                "lr": learning_rate(step - 1, self.config)}
        for layer, one in learners.items():
            line[f"L{layer}"] = {"mse": one.mse, "sparsity": one.sparsity, "l0": one.l0,
                                 "dead": dead_fraction(one, line["tokens"])[0]}
        try:
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, and --resume "
                            f"goes on from the last checkpoint.") from error


def read_log(path):
    """The lines of log.jsonl; one that was cut short, as a power cut may leave it, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(parse_json(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def dead_fraction(learner, n_tokens):
    """Share of features that fired on none of the last DEAD_WINDOW training activations, and how many
    activations that were."""
    window = min(DEAD_WINDOW, n_tokens)
    return float((learner.last_fired <= n_tokens - window).float().mean()), window


# ---- evaluation ----


@torch.no_grad()
def evaluate(model, saes, rows, means):
    """What each layer's SAE keeps of its z_cat, and what the model loses when z_cat is replaced -> {layer:
    metrics}.

    saes: {layer: SAE}. rows (R,T): held-out tokens. means: {layer: (D,)}, the vector of mean ablation, from
    training text. Cross-entropies are nats per token over the predictions made from positions 1
    to T-2; every replacement leaves position 0 (BOS) as it is. *zero* sets z_cat to 0 in the model's own
    weights (b_O stays). Intervals are 95% bootstrap intervals over rows. Where z_cat matters too little to
    tell, that is if CE_zero - CE_clean is below 0.05 nats or its interval reaches 0, ce_recovered_zero is
    None; so for mean.
    """
    # {name: (R,...)}, filled in place: small results kept between large tensors would break memory up
    per_row = {layer: {} for layer in saes}
    widest = max(model.config.d_vocab, *(sae.d_sae for sae in saes.values()))
    size = max(1, min(8, 2**26 // (rows.shape[1] * widest)))            # 256 MiB at most
    for first in range(0, len(rows), size):
        tokens, found = rows[first:first + size], {}
        x = model.embed(tokens)
        for layer in range(model.config.n_layers):              # x is the clean stream before it
            if layer in saes:
                found[layer] = evaluate_layer(model, saes[layer], means[layer], layer, x, tokens)
            x, _ = model.through(x, layers=(layer,))
        ce_clean = row_ce(model.unembed(x), tokens)
        for layer in saes:
            for name, value in (found[layer] | {"ce_clean": ce_clean}).items():
                whole = per_row[layer].setdefault(name, np.empty((len(rows), *value.shape[1:])))
                whole[first:first + size] = value.cpu()
    return {layer: summarise(found, rows.shape[1] - 1) for layer, found in per_row.items()}


def mean_z_cat(model, layers, rows):                                    # (R,T) -> {layer: (D,)}
    """The mean of z_cat over all positions but 0."""
    sums = [{layer: z[:, 1:].float().sum((0, 1)) for layer, z in model.z_cat_at(part, layers).items()}
            for part in rows.split(16)]
    return {layer: sum(one[layer] for one in sums) / rows[:, 1:].numel() for layer in layers}


def evaluate_layer(model, sae, mean, layer, x, tokens):     # (D,), (R,T,d_model), (R,T) -> {name: (R,...)}
    """What one layer's SAE makes of its z_cat, and the cross-entropy with z_cat replaced by the
    reconstruction, by 0 and by the mean; x is the clean stream before the layer."""
    block = model.blocks[layer]
    z_cat = block.heads(x, with_pattern=False).z_cat
    result = reconstruction(sae, z_cat[:, 1:])
    edits = {"ce_sae": splice(sae), "ce_zero": constant(torch.zeros_like(mean)), "ce_mean": constant(mean)}
    for name, edit in edits.items():
        attn_out, mlp_out, _ = block.rest(x, edit(z_cat))
        after, _ = model.through(x + attn_out + mlp_out, layers=range(layer + 1, model.config.n_layers))
        result[name] = row_ce(model.unembed(after), tokens)
    return result


def row_ce(logits, tokens):                                             # (R,T,d_vocab), (R,T) -> (R,)
    """Mean cross-entropy of each row's predictions from positions 1 to T-2, in nats."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
    return losses.unflatten(0, tokens.shape)[:, 1:-1].mean(-1)          # the last has no next token


def constant(value):
    """The edit that puts one vector in place of z_cat at every position but 0."""
    return lambda z: torch.cat([z[:, :1], value.to(z.dtype).expand_as(z[:, 1:])], 1)


def reconstruction(sae, z):                                             # (R,T,D) -> dict of (R,), and (R,D)
    """Per row: active features per token, squared error, and for the variance the sums of z^2 and of z."""
    z = z.to(sae.b_dec.dtype)
    f = sae.encode(z)
    return {"l0": (f != 0).float().sum(-1).mean(-1), "error": (sae.decode(f) - z).square().sum((-1, -2)),
            "power": z.square().sum((-1, -2)), "z_sum": z.sum(1)}


def ce_recovered(ablated, sae, clean):          # cross-entropies of the same rows, numpy (R,) each -> float
    """(CE_ablated - CE_sae) / (CE_ablated - CE_clean), a ratio of means over rows, no mean of ratios."""
    return (ablated - sae).mean() / (ablated - clean).mean()


def summarise(row, positions):                                          # {name: (R,) float64} -> metrics
    """Per-row numbers -> one layer's metrics with intervals: rows are drawn, then ratios of means taken."""
    mean = lambda name: lambda i: row[name][i].mean()
    above_clean = lambda name: lambda i: (row[name][i] - row["ce_clean"][i]).mean()

    def recovered(name):
        return lambda i: ce_recovered(row[name][i], row["ce_sae"][i], row["ce_clean"][i])

    def explained_variance(i):
        variance = row["power"][i].sum() - (row["z_sum"][i].sum(0) ** 2).sum() / (len(i) * positions)
        return 1 - row["error"][i].sum() / variance

    statistics = {name: mean(name) for name in ("l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean")}
    statistics |= {f"{name}_minus_clean": above_clean(name) for name in ("ce_sae", "ce_zero", "ce_mean")}
    statistics |= {"ce_recovered_zero": recovered("ce_zero"), "ce_recovered_mean": recovered("ce_mean"),
                   "explained_variance": explained_variance}
    n_rows, metrics = len(row["l0"]), {}
    for name, statistic in statistics.items():
        metrics[name] = float(statistic(np.arange(n_rows)))
        metrics[name + "_ci"] = bootstrap(statistic, n_rows)
    for kind in ("zero", "mean"):
        if metrics[f"ce_{kind}_minus_clean"] < 0.05 or metrics[f"ce_{kind}_minus_clean_ci"][0] <= 0:
            metrics[f"ce_recovered_{kind}"] = metrics[f"ce_recovered_{kind}_ci"] = None
    return metrics | {"n_eval_tokens": n_rows * positions}


# ---- the end of a run ----


def finish(config, model, held_out, learners, folder, speed):
    """Write the SAEs, measure what was written, write metrics, figure and table -> {layer: metrics}."""
    dtype, saes = torch.float16 if config.half else torch.float32, {}
    for layer, learner in learners.items():
        path = folder / f"L{layer}" / "sae.safetensors"
        learner.sae.rescale(learner.scale).save(path, dtype)
        saes[layer] = SAE.load(path, learner.mean.device)
        write_json(folder / f"L{layer}" / "config.json",
                   {"layer": layer, "d_in": saes[layer].d_in, "l1_of_layer": learner.l1, **settings(config)})
    print(f"measuring on {len(held_out)} held-out rows ...", flush=True)
    metrics = evaluate(model, saes, held_out, {layer: learner.mean for layer, learner in learners.items()})
    n_tokens = config.n_tokens // config.batch_size * config.batch_size
    since_resampling = n_tokens - config.batch_size * max(resampling_steps(config), default=0)
    densities = {}
    for layer, learner in learners.items():
        densities[layer] = learner.fired.cpu().double() / since_resampling
        dead, window = dead_fraction(learner, n_tokens)
        metrics[layer] |= {"dead_fraction": dead, "n_dead_tokens": window, "n_train_tokens": n_tokens,
                           "tokens_per_second": speed, "seed": config.seed}
        write_json(folder / f"L{layer}" / "metrics.json", metrics[layer])
    plot_training(read_log(folder / "log.jsonl"), densities, folder / "training.png")
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    print(table(metrics), f"\n\nwritten to {folder}/", sep="")
    return metrics


def measure(config, model, tokenizer, held_out, folder):
    """Measure the SAEs of --saes on held-out text -> {layer: metrics}, also written to measured.json. The
    mean of mean ablation is that of as many rows of training text."""
    saes = load_all(config.saes, model, config.layers, held_out.device)
    print(f"measuring {config.saes} on {len(held_out)} held-out rows ...", flush=True)
    rows = next(data.rows(config.corpus, tokenizer, "train", config.n_ctx, config.n_eval_rows))
    metrics = evaluate(model, saes, held_out, mean_z_cat(model, list(saes), rows.to(held_out.device)))
    write_json(folder / "measured.json", {"saes": config.saes, "corpus": config.corpus,
                                          "layers": {f"L{layer}": m for layer, m in metrics.items()}})
    print(table(metrics), f"\n\nwritten to {folder}/measured.json", sep="")
    return metrics


def table(metrics):
    """The metrics of all layers, a line each."""
    recovered = lambda m, kind: with_interval(m[f"ce_recovered_{kind}"], m[f"ce_recovered_{kind}_ci"], ".1%")
    lines = ["cross-entropy in nats per token, clean and with z_cat replaced; [95% interval]",
             "layer    L0   clean     SAE    zero    mean   recovered over zero   recovered over mean   "
             "variance   dead"]
    for layer, m in metrics.items():
        lines.append(f"{layer:5d} {m['l0']:5.1f} {m['ce_clean']:7.3f} {m['ce_sae']:7.3f} {m['ce_zero']:7.3f} "
                     f"{m['ce_mean']:7.3f}  {recovered(m, 'zero'):>20}"
                     f"  {recovered(m, 'mean'):>20}  {m['explained_variance']:9.1%} "
                     + (f"{m['dead_fraction']:6.1%}" if "dead_fraction" in m else "   n/a"))
    return "\n".join(lines)


def main():
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")              # of several processes one speaks
    train(parse_flags(TrainConfig, __doc__, preset=preset))


if __name__ == "__main__":
    run(main)
