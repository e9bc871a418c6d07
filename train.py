"""The main job: train one sparse autoencoder per layer on z_cat, and measure what replacing z_cat
by its reconstruction costs the model.

    python train.py                          the shipped model, all layers, minutes on two cores
    python train.py --layers 1 --d-sae 4096 --n-tokens 10e6
    python train.py --reads mlp              transcoders: from what MLPs read to what they write
    python train.py --top-k 20               TopK SAEs: 20 features for each input, and no l1
    python train.py --model gpt2 --preset paper
    python train.py --model gpt2 --corpus c4 --saes kissane     measure SAEs, train nothing

In reading order: the settings; the training loop (`train`, `run_steps`); the activation buffer; how
an SAE starts; stopping and going on; evaluation; what is written and printed at the end.

Every random draw that training depends on is made from the seed and what it is for (a layer's
start, a block's order, a resampling), never from earlier draws. So a run that was stopped and
resumed ends with the same SAEs, byte for byte, as one that was not (on one machine, with as many
processes). Evaluation is on the same held-out rows whatever the seed.

Words. A *site* is what is kept of a layer's activations: (z_cat,) for an SAE; (mlp_in, mlp_out),
what the MLP reads and what it writes, for a transcoder. The *team*: under torchrun several
processes share each batch (data/team.py); alone it does nothing.

Written to <out>/<model>/: in L<layer>/ sae.safetensors, config.json and metrics.json; beside them
log.jsonl, training.png and model.json, which says whose results these are; and
checkpoint.safetensors until the run is finished. With --saes only measured.json and model.json. Of
transcoders the same is written to <out>/<model>/mlp/.

Shapes: R rows, T positions, B batch of activations, D = H*d_head, d_model, d_in, d_sae, d_out.
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
from torch import Tensor

import data
from data.checkpoint import damaged, load_checkpoint, restore_, save_checkpoint
from data.corpus import HELD_OUT_SHARE
from data.errors import UserError, run
from data.figures import plot_training
from data.files import (atomic, check_writable, claim, parse_json, run_folder, sole_writer,
                        write_json)
from data.flags import field, parse_flags
from data.machine import (deferred_interrupt, float32_products, keep_freed_memory, pick_device,
                          pick_dtype)
from data.progress import Progress
from data.sae_files import MLP, Z_CAT
from data.stats import bootstrap, format_ci
from data.team import Team, join, leave
from data.tokens import set_n_tokens
from data.weights import digest
from model import load_model
from sae import (SAE, Transcoder, dense_step, load_saes, load_transcoders, normalise_decoder,
                 project_decoder_gradient, resample, splice, splice_mlp)
from sparse import sparse_step

# Reports call a feature dead if it fired on none of the last 1,000,000 training activations.
# (Resampling asks something else: whether it fired at all since the last resampling.)
DEAD_WINDOW = 1_000_000
CHECKPOINT_EVERY = 250      # steps: what a power cut can cost


# ---- settings ----


@dataclass(frozen=True)
class TrainConfig:
    model: str = field("tiny", "tiny, gpt2, gemma-2-2b ..., the owner/name of a model on the "
                       "Hugging Face hub, or a directory in its layout")
    corpus: str = field("python", "text: \"python\" is what tiny was trained on, \"c4\" is "
                        "streamed from the hub; or a .txt, .jsonl or .json.gz file, or a folder "
                        "of them")
    reads: str = field(Z_CAT, "z_cat trains SAEs on it; mlp trains transcoders, from what MLPs "
                       "read to what they write")
    layers: tuple[int, ...] = field((), "layers, such as 0,2; all of them if not given")
    d_sae: tuple[int, ...] = field((2048,), "features per SAE: one number for all layers, or one "
                                   "for each (paper: 24576 = 32 x d_in, layers 5 and 7 49152)")
    l1: tuple[float, ...] = field((0.2,), "weight of the sparsity term: one for all layers, or one "
                                  "for each (paper: 0.8 to 3, with --no-normalise)")
    top_k: tuple[int, ...] = field((0,), "train TopK SAEs (Gao et al. 2024): of an input's "
                                   "features the k largest are active, and l1 has no part; one k "
                                   "for all layers, or one for each; 0: no limit, and l1")
    normalise: bool = field(True, "train on z_cat divided by its mean distance to the mean, so "
                            "that one l1 suits all layers; likewise both sides of MLPs (paper: no)")
    lr: float = field(0.0, "Adam's peak learning rate; 0: 3.4e-3 for the 256 numbers of tiny's "
                      "z_cat, less for wider ones, see `default_lr` (paper: 1.2e-3)")
    passes: int = field(1, "how often a text that ends is read in training")
    held_out_share: float = field(HELD_OUT_SHARE, "of the documents of a text of yours, for the "
                                  "metrics")
    n_tokens: int = field(1_700_000, "training activations per layer (paper: about 2e9)")
    batch_size: int = field(1024, "activations per step (paper: 4096)")
    warmup: int = field(50, "steps from 0.1 to 1 x lr, at the start and after each resampling; at "
                        "the start l1 rises too, linearly from 0 (paper: 1000)")
    decay: float = field(0.4, "last part of the run in which lr falls to 0 (paper: 0)")
    resample_every: int = field(350, "steps between resamplings of dead features, none in the last "
                                "half of the run (paper: 25000)")
    resample_times: int = field(4, "resamplings at most (paper: 4)")
    n_ctx: int = field(128, "tokens per row, BOS included (paper: 128)")
    n_eval_rows: int = field(256, "held-out rows for the metrics")
    block_mib: int = field(512, "memory for a block of activations")
    seed: int = field(0, "fixes training rows, initial weights, batches and resampling")
    device: str = field("auto", "cpu, cuda, mps or auto")
    dtype: str = field("float32", "the model's numbers: float32, or bfloat16 for half the memory; "
                       "training activations take bfloat16 products wherever these are faster")
    preset: str = field("", "paper: the paper's settings for GPT-2 Small, by layer; other flags "
                        "still win")
    saes: str = field("", "measure the SAEs in this folder, or kissane, or gemma-scope; train "
                      "nothing")
    out: str = field("out", "folder for results")
    resume: bool = field(False, "go on with the run that is in --out")
    half: bool = field(False, "store the SAEs in float16, as the shipped ones are; the metrics, "
                       "but for dead features, are of what is stored")

    @property
    def n_steps(self):
        return self.n_tokens // self.batch_size

    @property
    def n_activations(self):
        """n_tokens in whole batches: what each layer is trained on."""
        return self.n_steps * self.batch_size


def as_tuple(setting):
    """l1, d_sae or top_k as a tuple; in a notebook one writes TrainConfig(d_sae=4096)."""
    return tuple(setting) if isinstance(setting, (tuple, list)) else (setting,)


def per_layer(setting, layers):
    """A setting with one number for all layers, or with one for each -> {layer: number}."""
    values = as_tuple(setting)
    if len(values) == 1:
        values = values * len(layers)
    return dict(zip(layers, values))


def preset(config):
    """The settings that --preset names: the paper's for GPT-2 Small. The paper says about 2e9
    tokens; it trained on OpenWebText, for which C4 stands in here.

    `train` does not apply them: the command line does, and in a notebook
    config = dataclasses.replace(config, **preset(config)).
    """
    if config.preset == "":
        return {}
    if config.preset != "paper":
        raise UserError(f"--preset {config.preset} is unknown; the only preset is paper.")
    l1_by_layer = (1.8, 0.8, 1.0, 0.9, 1.1, 1.0, 1.1, 1.1, 1.3, 1.2, 1.3, 3.0)
    layers = config.layers or tuple(range(12))
    for layer in layers:
        if not 0 <= layer < len(l1_by_layer):
            raise UserError(f"--preset paper has settings for layers 0 to 11 of GPT-2 Small, not "
                            f"for layer {layer}.")
    return {"layers": layers,
            "l1": tuple(l1_by_layer[layer] for layer in layers),
            "d_sae": tuple(49152 if layer in (5, 7) else 24576 for layer in layers),
            "normalise": False, "lr": 1.2e-3, "n_tokens": 2_000_000_000, "batch_size": 4096,
            "warmup": 1000, "decay": 0.0, "resample_every": 25_000, "resample_times": 4,
            "n_ctx": 128, "corpus": "c4"}


def warn_of_preset(config, model):
    """Say that l1 and sizes of --preset paper were found on GPT-2 Small, where the model is
    another."""
    gpt2_small = "GPT2 of 12 layers, 12 heads of 64, d_model 768"
    if config.preset == "paper" and model.architecture() != gpt2_small:
        print(f"--preset paper: layers, l1 and features are those of a {gpt2_small}, and this is "
              f"a {model.architecture()}; choose your own.", flush=True)


def default_lr(d_in):
    """3.4e-3 * sqrt(256 / d_in). A step of Adam moves every number by about lr, and so a feature's
    encoder, d_in numbers, by lr * sqrt(d_in): in this way by as much for all widths."""
    return 3.4e-3 * math.sqrt(256 / d_in)


def check(config, model, layers, folder, team):
    """Raise UserError for settings that cannot work, before any time is spent."""
    model.check_layers(layers)
    n_layers = len(layers)
    shortest = 2 + ce_stride(model)     # `ce_positions` has none in a shorter row
    longest = model.config.n_ctx
    l1, d_sae, top_k = as_tuple(config.l1), as_tuple(config.d_sae), as_tuple(config.top_k)
    checkpoint = checkpoint_path(folder)
    unfinished = checkpoint.is_file()

    def wrong_number(setting):
        return (f"has {len(setting)} values for {n_layers} layers; give one for all, or one for "
                f"each.")

    at_least_1 = "must be at least 1."
    rules = [   # the flag, what must hold, what to say where it does not
        (f"--reads {config.reads}", config.reads in (Z_CAT, MLP), f"is neither {Z_CAT} nor {MLP}."),
        ("--layers", len(set(layers)) == n_layers, "names a layer twice; name each once."),
        ("--l1", len(l1) in (1, n_layers), wrong_number(l1)),
        ("--d-sae", len(d_sae) in (1, n_layers), wrong_number(d_sae)),
        ("--top-k", len(top_k) in (1, n_layers), wrong_number(top_k)),
        (f"--n-ctx {config.n_ctx}", shortest <= config.n_ctx <= longest,
         f"does not fit this model, which takes {shortest} to {longest} tokens."),
        ("--d-sae", all(n >= 1 for n in d_sae), at_least_1),
        ("--batch-size", config.batch_size >= 1, at_least_1),
        ("--n-eval-rows", config.n_eval_rows >= 1, at_least_1),
        ("--block-mib", config.block_mib >= 1, at_least_1),
        ("--passes", config.passes >= 1, at_least_1),
        ("--resample-every", config.resample_every >= 1, at_least_1),
        ("--warmup", config.warmup >= 1, at_least_1),
        ("--seed", 0 <= config.seed < 2**63, "must be between 0 and 2^63 - 1."),
        ("--lr", config.lr > 0, "must be above 0."),
        ("--l1", all(weight >= 0 for weight in l1), "must be at least 0."),
        ("--top-k", all(0 <= k <= min(d_sae) for k in top_k),
         f"must be between 0 and the number of features, {min(d_sae)}."),
        ("--decay", 0 <= config.decay <= 1, "must be between 0 and 1."),
        # shares of a batch are drawn at random: with 32 expected, none is ever empty
        (f"--batch-size {config.batch_size}", team.size == 1 or config.batch_size >= 32 * team.size,
         f"is too small for {team.size} processes; give {32 * team.size} or more."),
        (f"--n-tokens {config.n_tokens}", config.n_tokens >= config.batch_size,
         f"is less than one batch of {config.batch_size}; raise it or lower --batch-size."),
        ("--resume:", unfinished or not config.resume,
         f"there is no checkpoint in {folder}; leave out --resume to start anew."),
        (folder, not unfinished or config.resume or config.saes,
         f"holds an unfinished run; add --resume to go on with it, or remove {checkpoint}."),
    ]
    for flag, holds, sentence in rules:
        if not holds:
            raise UserError(f"{flag} {sentence}")
    check_writable(folder)


def lasting_settings(config):
    """The config as a dict, without what may differ between a run and its resumption."""
    # Through JSON, which turns tuples into lists, as it did to the settings of a checkpoint, with
    # which these are compared.
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("resume", "out", "device"):
        del settings[name]
    return settings


# ---- the training loop ----


@dataclass
class Learner:
    """One layer's SAE while it is trained."""
    sae: SAE
    optimizer: torch.optim.Adam
    l1: float
    mean_in: Tensor         # (d_in,) mean of what it reads, over the first block
    scale_in: Tensor        # () what it reads is divided by this: mean of |z - mean|, or 1
    mean_out: Tensor        # (d_out,) mean of its target, the vector of mean ablation; an SAE's
                            # target is what it reads, z_cat, and so these are the same as above
    scale_out: Tensor       # () its target is divided by this
    fired: Tensor           # (d_sae,) how many inputs it fired on since the last resampling
    last_fired: Tensor      # (d_sae,) training activations seen up to each feature's last firing
    l0: float               # active features per input in the last step: decides whether the next
                            # one is sparse, and so is saved too
    use_sparse_step: bool = False       # `choose_step` decides on the first batch
    matmul_precision: str = "highest"   # of the dense step: `float32_products`
    last_step: Tensor | None = None     # (3,) mse, sparsity, active entries of f, on the device
    mse: float = math.nan               # on the host; `read_back` sets it, sparsity and l0
    sparsity: float = math.nan
    first_mse: float | None = None      # of the first step of this process
    has_run_away: bool = False

    def step_function(self):
        """The sparse step where few features were active in the step before."""
        few = self.l0 < self.sae.d_sae / 16
        return sparse_step if self.use_sparse_step and few else dense_step

    def in_its_units(self, site):                           # -> (B,d_in), (B,d_out)
        """What it reads and its target, divided by their scales. `site`: of ActivationBuffer."""
        z = site[0] / self.scale_in
        target = z if len(site) == 1 else site[1] / self.scale_out
        return z, target


def train_step(learner, site, step, config, team=Team()):
    """One step of one layer's SAE or transcoder, in place. site: the batch, as ActivationBuffer
    gives it; under torchrun (data/team.py) this process's share of it. A loop of your own calls
    `choose_step` before its first step: without it every step is the dense one."""
    sae = learner.sae
    z, target = learner.in_its_units(site)
    lr = learning_rate(step, config)
    # sparsity comes in gently: fewer features die
    l1_scale = min(1.0, (step + 1) / config.warmup)
    sparse_or_dense_step = learner.step_function()

    # the gradients are derived by hand, without autograd: LossAndGradients in sae.py
    with float32_products(learner.matmul_precision):
        result = sparse_or_dense_step(sae, z, learner.l1 * l1_scale, target)
    team.sum_step(result, len(z) / config.batch_size)   # in place: from shares to the whole batch
    project_decoder_gradient(sae, result.gradients["W_dec"])
    adam_step(learner, result.gradients, lr)
    normalise_decoder(sae)                              # after Adam: what is saved has unit norm

    fired_now = result.fired > 0                        # (d_sae,) on some input of the batch
    n_seen = (step + 1) * config.batch_size
    learner.fired += result.fired
    learner.last_fired = torch.where(fired_now, n_seen, learner.last_fired)
    n_entries = result.fired.sum().to(result.mse.dtype)     # active entries of f, (B,d_sae)
    learner.last_step = torch.stack([result.mse, result.sparsity, n_entries])


def train(config):                                          # -> {layer: metrics}
    """Train, evaluate, write everything; or, with --saes, evaluate only. Returns {} on ranks above
    0 of torchrun.

    Raises UserError for what the user can mend.
    """
    team = join()
    device = pick_device(config.device)
    model = load_model(config.model, device, pick_dtype(config.dtype))
    tokenizer = data.load_tokenizer(config.model)
    set_n_tokens(model, tokenizer, config.model)
    layers = config.layers or tuple(range(model.config.n_layers))
    folder = run_folder(config.out, config.model)
    if config.reads == MLP:
        folder = folder / MLP
    if config.lr == 0:
        config = dataclasses.replace(config, lr=default_lr(site_widths(model, config.reads)[0]))
    check(config, model, layers, folder, team)
    warn_of_preset(config, model)
    held_out = next(data.rows(config.corpus, tokenizer, "held-out", T=config.n_ctx,
                              n=config.n_eval_rows,
                              held_out_share=config.held_out_share)).to(device)     # (R,T)
    if config.saes:
        return measure_saes(config, model, tokenizer, held_out, folder) if team.leads else {}

    with sole_writer(folder) if team.leads else contextlib.nullcontext():
        if team.leads:
            claim(folder, config.model, digest(model))
        buffer = ActivationBuffer(model, tokenizer, config, layers, device, team)
        learners = make_learners(config, layers, buffer.widths, device)
        first_step = 0
        if config.resume:
            first_step = resume(learners, config, folder)
        else:
            initialise_all(learners, config, buffer)
        speed = run_steps(config, buffer, learners, first_step, folder, team)
        if not team.leads:
            return {}
        return finish(config, model, held_out, learners, folder, speed)


def run_steps(config, buffer, learners, first_step, folder, team):
    """The training loop, from `first_step` to the last -> activations per second; None if no step
    was left."""
    d_sae = " or ".join(map(str, sorted({learner.sae.d_sae for learner in learners.values()})))
    kind = "transcoder" if config.reads == MLP else "SAE"
    print(f"{len(learners)} x {kind} {buffer.widths[0]} -> {d_sae}, {config.n_activations:,} "
          f"activations", flush=True)
    progress = Progress(config.n_activations, "tokens")
    log = TrainingLog(folder, config, first_step, team)
    started = time.monotonic()
    n_done = first_step
    with deferred_interrupt() as interrupted, keep_freed_memory():
        for step, batches in buffer.batches(first_step):
            for layer, learner in learners.items():
                if step == first_step:
                    choose_step(learner, layer, batches[layer])
                train_step(learner, batches[layer], step, config, team)
            n_done = step + 1
            read_back(learners, n_done, config.batch_size)
            warn_of_runaways(learners, n_done, config)

            # n_done is also the number of the next step, with which lr starts anew
            if n_done in resampling_steps(config):
                for layer, learner in learners.items():
                    dead = learner.fired == 0           # on nothing since the last resampling
                    z, target = learner.in_its_units(buffer.sample(layer))
                    random = generator(config.seed, "resample", layer, step)
                    resample(learner.sae, learner.optimizer, dead, z, random, target,
                             learner.mean_in / learner.scale_in)
                    learner.fired.zero_()

            progress(n_done * config.batch_size, "L0 by layer: " + "  ".join(
                f"{learner.l0:.1f}" for learner in learners.values()))
            log(n_done, learners)
            stop = team.any(interrupted() is not None)
            is_last = n_done == config.n_steps      # saved too: should evaluation fail, --resume
                                                    # goes straight to it
            if team.leads and (stop or is_last or n_done % CHECKPOINT_EVERY == 0):
                save(folder, config, n_done, learners)
            if stop:
                signal = interrupted() or KeyboardInterrupt     # another process's, perhaps
                raise signal(f"stopped after step {n_done}; --resume goes on from there.")
    if n_done < config.n_steps:
        if team.leads and n_done > first_step:
            save(folder, config, n_done, learners)
        n_tokens = n_done * config.batch_size
        if n_tokens == 0:
            raise UserError(f"--corpus {config.corpus} has too little training text for a batch of "
                            f"{config.batch_size} activations; give more text, or a smaller "
                            f"--batch-size.")
        raise UserError(f"the text of --corpus {config.corpus} ended after {n_tokens:,} of "
                        f"{config.n_activations:,} activations; put more text there and --resume, "
                        f"or start anew with --n-tokens {n_tokens} or with more --passes, and "
                        f"another --out.")
    if n_done == first_step:
        return None
    return (n_done - first_step) * config.batch_size / (time.monotonic() - started)


def learning_rate(step, config):
    """Half a cosine from 0.1 to 1 x lr, at the start and after each resampling; linear to 0 at the
    end."""
    last_restart = max((s for s in resampling_steps(config) if s <= step), default=0)
    warmed_up = min(1.0, (step - last_restart) / config.warmup)
    rise = 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * warmed_up))
    fall = min(1.0, (config.n_steps - step) / max(config.decay * config.n_steps, 1e-9))
    return config.lr * rise * fall


def resampling_steps(config):
    """The steps before which dead features are resampled, and with which lr starts anew: none in
    the second half of the run."""
    steps = [i * config.resample_every for i in range(1, config.resample_times + 1)]
    return [step for step in steps if step <= config.n_steps // 2]


def adam_step(learner, gradients, lr):
    """Adam with our gradients. They are in .grad for this step only, so that only one layer's are
    in memory."""
    for name, gradient in gradients.items():
        getattr(learner.sae, name).grad = gradient
    learner.optimizer.param_groups[0]["lr"] = lr
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def read_back(learners, n_done, batch_size):
    """Bring the numbers of the last step from the device. One transfer for all layers: on a GPU
    each would make the host wait. Raises UserError where a loss is not finite."""
    sums = torch.stack([learner.last_step for learner in learners.values()]).tolist()
    for (layer, learner), (mse, sparsity, n_entries) in zip(learners.items(), sums):
        learner.mse = mse
        learner.sparsity = sparsity
        learner.l0 = n_entries / batch_size
        if not math.isfinite(mse + sparsity):
            raise UserError(f"the loss of layer {layer} is not finite at step {n_done}; the last "
                            f"checkpoint is kept; start again with a lower --lr and another --out.")


def warn_of_runaways(learners, n_done, config):
    """Say once of each layer that its loss has risen beyond all measure. The others go on."""
    for layer, learner in learners.items():
        if learner.first_mse is None:
            learner.first_mse = learner.mse
        if learner.mse > 100 * learner.first_mse and not learner.has_run_away:
            learner.has_run_away = True
            print(f"layer {layer}: at step {n_done} the squared error is {learner.mse:.3g}, and "
                  f"was {learner.first_mse:.3g} at the start. What comes of it will be of no use; "
                  f"train it again with --layers {layer}, an --lr below {config.lr:.2g} and "
                  f"another --out.", flush=True)


def choose_step(learner, layer, site, n=256):
    """Take a faster step where, on some inputs of the first batch, it gives what the dense step in
    float32 gives: on the CPU the sparse step, on a GPU products in TF32.

    So a change of `SAE.activate`, `SAE.encode` or `dense_step` is trained with, though sparse.py
    knows nothing of it. A resumed run decides again, on the batch where it goes on: what is
    compared differs by rounding, or by another formula and far more than `agree` allows.
    """
    # A new SAE's biases are such that some pre-activations are 0 but for rounding, and active or
    # not by chance. So a copy is compared whose biases are a little higher.
    sae = copy.deepcopy(learner.sae)
    with torch.no_grad():
        sae.b_enc += 0.01 * sae.b_enc.abs().mean()
    z, target = learner.in_its_units(tuple(part[:n] for part in site))
    exact = dense_step(sae, z, learner.l1, target)
    if z.device.type != "cpu":
        with float32_products("high"):
            in_tf32 = dense_step(sae, z, learner.l1, target)
        learner.matmul_precision = "high" if agree(in_tf32, exact) else "highest"
        return
    learner.use_sparse_step = agree(sparse_step(sae, z, learner.l1, target), exact)
    if not learner.use_sparse_step:
        print(f"layer {layer}: the sparse step does not give what dense_step gives: is it of "
              f"another activation, or another loss? Taking the dense step, which is slower.",
              flush=True)


def agree(result, exact, tolerance=0.03):                   # LossAndGradients x 2 -> bool
    """Whether loss and gradients are the same but for rounding, and for a feature now and then that
    rounding makes active."""
    if result.gradients.keys() != exact.gradients.keys():
        return False
    pairs = [(result.mse, exact.mse), (result.sparsity, exact.sparsity)]
    pairs += [(result.gradients[name], of_exact) for name, of_exact in exact.gradients.items()]
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in pairs)


# ---- activations ----


class ActivationBuffer:
    """Batches of all layers' activations: a block of whole rows is run through the model, shuffled,
    and drained batch by batch. Position 0 (BOS) is left out.

    One forward pass serves all layers. With the same settings, a block depends on its number alone.
    In a team, each process has the activations of its own rows of a block, and its share of each
    batch.
    """

    def __init__(self, model, tokenizer, config, layers, device, team=Team()):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.layers = layers
        self.device = device
        self.team = team
        self.widths = site_widths(model, config.reads)
        self.per_row = config.n_ctx - 1                     # activations
        # The fewest blocks that fit the memory, and all of them equally long. By default 131,072
        # activations of tiny's four layers fit, enough for 128 steps; 1,660 steps are then 13
        # blocks of 128 steps, 1,033 rows each, and 119 activations of a block are left over.
        bytes_each = 4 * sum(self.widths) * len(layers)
        fit_memory = config.block_mib * 2**20 // bytes_each             # activations
        n_blocks = math.ceil(config.n_steps / max(1, fit_memory // config.batch_size))
        wanted_steps = math.ceil(config.n_steps / n_blocks)
        self.n_rows = math.ceil(wanted_steps * config.batch_size / self.per_row)
        self.n_rows = max(self.n_rows, team.size)           # a row for each process at least
        # counted from n_rows, which may be enough for more steps than were wanted
        self.steps_per_block = self.n_rows * self.per_row // config.batch_size
        self.sites = None           # {layer: site} of this process's rows of the block, (N,width)
        self.block_number = None    # of the block that is in them
        self.n_filled = 0           # activations in the block, those of all processes

    def batches(self, first_step):                          # -> step, {layer: site}
        """Batches for every step from `first_step` on, until the steps or the text end. They are
        copies, which no refill touches."""
        B = self.config.batch_size
        first_block, first_batch = divmod(first_step, self.steps_per_block)
        step = first_step
        if step == self.config.n_steps:                     # resumed at evaluation
            return
        for number, tokens in enumerate(self.blocks(first_block), start=first_block):
            if len(tokens) < self.team.size:                # the text ends: not a row for each
                return
            if number != self.block_number:                 # `initialise_all` may have filled it
                self.fill(tokens, number)
            random = generator(self.config.seed, "block", number)
            order = torch.randperm(self.n_filled, generator=random)
            for i in range(first_batch, self.n_filled // B):
                batch = order[i * B:(i + 1) * B]
                # `mine` are the places in self.sites[layer] of those activations of the batch that
                # this process holds; alone, it is `batch` itself. per_row tells `share` which row
                # an activation is from, since rows are dealt out to processes.
                _, mine = self.team.share(batch, self.per_row)
                mine = mine.to(self.device)
                yield step, {layer: tuple(part[mine] for part in self.sites[layer])
                             for layer in self.layers}
                step += 1
                if step == self.config.n_steps:
                    return
            first_batch = 0

    def blocks(self, first_number):                         # -> (n_rows,T) tokens, ...
        """Rows of training text, from block `first_number` on."""
        config = self.config
        return data.rows(config.corpus, self.tokenizer, "train", config.n_ctx, self.n_rows,
                         config.seed, start=first_number * self.n_rows, passes=config.passes,
                         held_out_share=config.held_out_share)

    def fill(self, tokens, number):                         # (R,T), fewer rows where the text ends
        """Run the model on a block and keep its sites, but not position 0."""
        self.n_filled = len(tokens) * self.per_row
        self.block_number = number
        tokens = tokens[self.team.rank::self.team.size]
        if self.sites is None:
            N = math.ceil(self.n_rows / self.team.size) * self.per_row
            self.sites = {layer: tuple(torch.empty(N, width, device=self.device)
                                       for width in self.widths) for layer in self.layers}
        for i in range(0, len(tokens), 64):
            part = tokens[i:i + 64].to(self.device)
            here = slice(i * self.per_row, (i + len(part)) * self.per_row)
            for layer, site in run_sites(self.model, self.config.reads, part, self.layers).items():
                for kept, new in zip(self.sites[layer], site):
                    kept[here] = new[:, 1:].flatten(0, 1)

    def sample(self, layer):                                # -> site of (n,width)
        """Activations of the block at hand, 8192 to 16383 of them, or all if there are fewer; the
        same in all processes. Dead features are resampled from them.

        Each process fills in those of its own rows, and the sum puts them together.
        """
        places = torch.arange(0, self.n_filled, max(1, self.n_filled // 8192))
        # which of `places` are this process's, and where they lie in self.sites[layer]
        which, mine = self.team.share(places, self.per_row)
        site = []
        for part in self.sites[layer]:
            sampled = torch.zeros(len(places), part.shape[1], device=self.device)
            sampled[which.to(self.device)] = part[mine.to(self.device)]
            self.team.sum(sampled)
            site.append(sampled)
        return tuple(site)


def site_widths(model, reads):                              # -> tuple
    """The widths of a site's tensors."""
    if reads == MLP:
        return (model.config.d_model, model.config.d_model)
    return (model.config.d_z_cat,)


def run_sites(model, reads, tokens, layers):                # (b,T) -> {layer: site of (b,T,width)}
    """The sites of some layers in float32. Products are in bfloat16 where that is faster, whatever
    --dtype is."""
    if reads == MLP:
        return model.mlp_bfloat16(tokens, layers)
    return {layer: (z,) for layer, z in model.z_cat_bfloat16(tokens, layers).items()}


def generator(*key):
    """An independent generator for each key (seed, purpose, step ...): no draw depends on those
    before it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---- how an SAE starts ----


def make_learner(widths, d_sae, l1, lr, device="cpu", top_k=0):     # -> Learner
    """An SAE, or for a site of two a transcoder, and its Adam before the first step; `initialise`
    then fits it to activations."""
    # its random weights are replaced: `initialise`, `restore`
    if len(widths) == 1:
        sae = SAE(widths[0], d_sae, top_k=top_k)
    else:
        sae = Transcoder(widths[0], d_sae, widths[1], top_k=top_k)
    sae = sae.to(device)
    # beta1 = 0, no momentum: a feature moves only in steps in which it fires
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.0, 0.9999), fused=True)
    never = torch.zeros(d_sae, dtype=torch.int64, device=device)
    return Learner(sae, optimizer, l1,
                   # all of this `initialise` and `restore` know better
                   mean_in=torch.zeros(sae.d_in, device=device),
                   scale_in=torch.ones((), device=device),
                   mean_out=torch.zeros(sae.d_out, device=device),
                   scale_out=torch.ones((), device=device),
                   fired=never, last_fired=never.clone(), l0=float(d_sae))


def make_learners(config, layers, widths, device):          # -> {layer: Learner}
    """One for each layer, with its own size, l1 and k. l1 has no part where there is a k."""
    d_sae = per_layer(config.d_sae, layers)
    l1 = per_layer(config.l1, layers)
    top_k = per_layer(config.top_k, layers)
    return {layer: make_learner(widths, d_sae[layer], 0.0 if top_k[layer] else l1[layer], config.lr,
                                device, top_k[layer])
            for layer in layers}


def initialise_all(learners, config, buffer):
    """Fit every SAE to the activations of the first block."""
    if buffer.team.size > 1:
        # a buffer without a team holds the whole block: so all processes start with the same SAEs
        buffer = ActivationBuffer(buffer.model, buffer.tokenizer, config, buffer.layers,
                                  buffer.device)
    buffer.fill(next(buffer.blocks(0)), 0)
    for layer, learner in learners.items():
        random = generator(config.seed, "start", layer)
        site = tuple(part[:buffer.n_filled] for part in buffer.sites[layer])
        initialise(learner, site, config.normalise, random)


@torch.no_grad()
def initialise(learner, site, normalise, random):           # site of (N,width)
    """W_enc's columns are random directions in the space that activations fill, of length 1/2 (by
    trial), b_dec is the mean of the target. An SAE's W_dec has the same directions; a transcoder's
    row of W_dec is the direction in which the target moves with its feature's column.

    Attention outputs have low rank, and features that start outside their space stay dead (arXiv
    2508.16929). So a direction is drawn from a normal distribution with the activations'
    covariance. Each b_enc lets its feature fire on one token in a hundred, so that the sparse step
    serves from the start.
    """
    sae = learner.sae
    z, target = site[0], site[-1]
    some = slice(None, None, max(1, len(z) // 8192))        # 8192 to 16383 of them are enough
    learner.mean_in = z.mean(0)
    learner.mean_out = target.mean(0)
    centred = z[some] - learner.mean_in
    centred_target = target[some] - learner.mean_out
    if normalise:
        learner.scale_in = centred.norm(dim=-1).mean()
        learner.scale_out = centred_target.norm(dim=-1).mean()
    # their number times the covariance; F.normalize below takes the factor out again
    variances, directions = eigenvectors((centred.T @ centred).cpu())
    noise = torch.randn(sae.d_sae, sae.d_in, generator=random)
    drawn = F.normalize((noise * variances.clamp_min(0).sqrt()) @ directions.T, dim=-1).to(z.device)
    sae.b_dec.copy_(learner.mean_out / learner.scale_out)
    sae.W_enc.copy_(0.5 * drawn.T)
    if len(site) == 1:
        sae.W_dec.copy_(drawn)
    else:
        sae.W_dec.copy_(F.normalize((centred @ drawn.T).T @ centred_target, dim=-1))
    # the part of pre-activations that varies; an eighth is enough for a quantile
    pre = (centred[::8] / learner.scale_in) @ sae.W_enc
    sae.b_enc.copy_(-pre.kthvalue(math.ceil(0.99 * len(pre)), dim=0).values)
    if not sae.subtracts_b_dec:                             # then the mean is in them too
        sae.b_enc -= (learner.mean_in / learner.scale_in) @ sae.W_enc
    learner.l0 = 0.01 * sae.d_sae


def eigenvectors(covariance):                               # (D,D) -> (D,), (D,D)
    """Variances and directions. In float32 it may not converge where the rank is low."""
    try:
        return torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        variances, directions = torch.linalg.eigh(covariance.double())
        return variances.float(), directions.float()


# ---- stopping and going on ----

# A Learner's tensors that last from step to step, besides SAE and Adam.
SAVED = ("fired", "last_fired", "mean_in", "scale_in", "mean_out", "scale_out")


def checkpoint_path(folder):
    """Where a run that is not finished has its checkpoint."""
    return folder / "checkpoint.safetensors"


def save(folder, config, n_done, learners):
    """All that the rest of the run depends on: weights, Adam's moments, counts, how many steps are
    done."""
    tensors = {"step": torch.tensor(n_done)}
    for layer, learner in learners.items():
        for name, parameter in learner.sae.named_parameters():
            adam = learner.optimizer.state[parameter]
            tensors[f"{layer} {name}"] = parameter.detach()
            for key in ("step", "exp_avg", "exp_avg_sq"):
                tensors[f"{layer} {name} {key}"] = adam[key]
        for name in SAVED:
            tensors[f"{layer} {name}"] = getattr(learner, name)
        tensors[f"{layer} l0"] = torch.tensor(learner.l0, dtype=torch.float64)
    save_checkpoint(checkpoint_path(folder), tensors, lasting_settings(config))


def resume(learners, config, folder):                       # -> how many steps are done
    """Restore all learners from a checkpoint. Raises UserError if it is damaged or of other
    settings."""
    path = checkpoint_path(folder)
    tensors = load_checkpoint(path, lasting_settings(config))
    try:
        for layer, learner in learners.items():
            restore(learner, tensors, layer)
        n_done = int(tensors["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path) from error
    if not 0 <= n_done <= config.n_steps:
        raise damaged(path)
    return n_done


@torch.no_grad()
def restore(learner, tensors, layer):
    """Make a learner what it was when the checkpoint's tensors were written."""
    for name, parameter in learner.sae.named_parameters():
        restore_(parameter, tensors[f"{layer} {name}"])
        learner.optimizer.state[parameter] = {
            "step": restore_(parameter.new_zeros(()), tensors[f"{layer} {name} step"]),
            "exp_avg": restore_(torch.empty_like(parameter), tensors[f"{layer} {name} exp_avg"]),
            "exp_avg_sq": restore_(torch.empty_like(parameter),
                                   tensors[f"{layer} {name} exp_avg_sq"])}
    for name in SAVED:
        restore_(getattr(learner, name), tensors[f"{layer} {name}"])
    l0 = tensors[f"{layer} l0"]
    learner.l0 = float(restore_(torch.empty_like(l0), l0))


class TrainingLog:
    """log.jsonl, with what training.png shows: a line every n_steps // 200 steps."""

    def __init__(self, folder, config, first_step, team):
        self.path = folder / "log.jsonl"
        self.config = config
        self.every = max(1, config.n_steps // 200)          # steps
        self.silent = not team.leads
        if self.silent:
            return
        # of an earlier run nothing stays; of a resumed one, what came after its checkpoint goes
        lines = [line for line in read_log(self.path) if line["step"] <= first_step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines),
                                 encoding="utf8")

    def __call__(self, n_done, learners):
        if self.silent or n_done % self.every:
            return
        n_tokens = n_done * self.config.batch_size
        line = {"step": n_done, "tokens": n_tokens, "lr": learning_rate(n_done - 1, self.config)}
        for layer, learner in learners.items():
            line[f"L{layer}"] = {"mse": learner.mse, "sparsity": learner.sparsity,
                                 "l0": learner.l0, "dead": dead_fraction(learner, n_tokens)}
        try:
            with open(self.path, "a", encoding="utf8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; make room, and --resume "
                            f"goes on from the last checkpoint.") from error


def read_log(path):                                         # -> list of dicts
    """The lines of log.jsonl; one that was cut short, as a power cut may leave it, is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(parse_json(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def dead_fraction(learner, n_tokens):
    """Share of features that fired on none of the last DEAD_WINDOW of n_tokens activations."""
    window = min(DEAD_WINDOW, n_tokens)
    return float((learner.last_fired <= n_tokens - window).float().mean())


# ---- evaluation ----


@torch.no_grad()
def evaluate(model, saes, rows, means):                     # -> {layer: metrics}
    """What each layer's SAE keeps of its z_cat, and what the model loses when z_cat is replaced; or
    what each layer's transcoder makes of its MLP's output, and the same.

    saes: {layer: SAE or Transcoder}. rows (R,T): held-out tokens. means: {layer: (d_out,)}, the
    vector of mean ablation, from training text. Cross-entropies are nats per token over the
    predictions made from positions 1 to T-2, or, where the vocabulary is large, from one in
    `ce_stride` of them; every replacement leaves position 0 (BOS) as it is. *zero* puts 0 in place
    of z_cat, so that attention adds b_O alone, or of what the MLP writes. Intervals are 95%
    bootstrap intervals over rows. Where z_cat matters too little to tell, that is if CE_zero -
    CE_clean is below 0.05 nats or its interval reaches 0, ce_recovered_zero is None; likewise
    ce_recovered_mean, judged by CE_mean.
    """
    R, T = rows.shape
    metrics = {}
    for layer, values in evaluate_rows(model, saes, rows, means).items():
        metrics[layer] = summarise(values, T - 1)
        metrics[layer]["n_ce_tokens"] = ce_positions(R, T, ce_stride(model)).numel()
    return metrics


@torch.no_grad()
def evaluate_rows(model, saes, rows, means):                # -> {layer: {name: numpy (R,...)}}
    """What `evaluate` sums up, for each row."""
    R, T = rows.shape
    positions = ce_positions(R, T, ce_stride(model)).to(rows.device)    # (R,m)
    n_logits = positions.shape[1] * model.config.d_vocab                # of a row
    widest = max(n_logits, *(T * sae.d_sae for sae in saes.values()))
    # 8 rows at most, and 256 MiB for the largest tensor, or one row's
    n_rows = max(1, min(8, 2**26 // widest))
    by_row = {layer: [] for layer in saes}
    for tokens, q in zip(rows.split(n_rows), positions.split(n_rows)):
        found = {}
        x = model.embed(tokens)                             # the clean stream before each layer
        for layer in range(model.config.n_layers):
            if layer in saes:
                found[layer] = evaluate_layer(model, saes[layer], means[layer], layer, x, tokens, q)
            x, _ = model.run_layers(x, layers=(layer,))
        ce_clean = row_ce(model.unembed(at_positions(x, q)), tokens, q)
        for layer in saes:
            found[layer]["ce_clean"] = ce_clean
            by_row[layer].append({name: value.cpu().double().numpy()
                                  for name, value in found[layer].items()})
    return {layer: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for layer, parts in by_row.items()}


def ce_stride(model):
    """How many positions apart cross-entropies are measured: 1 up to GPT-2's 50,257 tokens. The
    product with Gemma's 262,144 costs more than all its layers: there it is 5."""
    return max(1, model.config.d_vocab // 50_000)


def ce_positions(R, T, stride):                             # -> (R,m)
    """Positions 1 to T-2 of R rows, or one in `stride` of them, the first in turn 1, 2, ..."""
    first = 1 + torch.arange(R) % stride
    return first[:, None] + stride * torch.arange((T - 2) // stride)


def evaluate_layer(model, sae, mean, layer, x, tokens, q):  # -> {name: (R,...)}
    """What one layer's SAE makes of its z_cat, and the cross-entropy at q with z_cat replaced by
    the reconstruction, by 0 and by the mean; likewise a transcoder and what the MLP writes.

    mean (d_out,); x (R,T,d_model), the clean stream before the layer; tokens (R,T); q (R,m), the
    positions of `ce_positions`.
    """
    block = model.blocks[layer]
    z_cat = block.heads(x, with_pattern=False).z_cat        # an edit changes nothing before it

    def ce_of(edited_z_cat, edit_mlp=None):
        after = block.after_heads(x, edited_z_cat, edit_mlp=edit_mlp)
        to_the_end = range(layer + 1, model.config.n_layers)
        last, _ = model.run_layers(x + after.attn_out + after.mlp_out, layers=to_the_end)
        return row_ce(model.unembed(at_positions(last, q)), tokens, q)

    by_zero = replace_with(torch.zeros_like(mean))
    by_mean = replace_with(mean)
    if sae.reads == MLP:
        clean = block.after_heads(x, z_cat)
        result = reconstruction_stats(sae, clean.mlp_in[:, 1:], clean.mlp_out[:, 1:])
        result["ce_sae"] = ce_of(z_cat, splice_mlp(sae))
        result["ce_zero"] = ce_of(z_cat, of_output(by_zero))
        result["ce_mean"] = ce_of(z_cat, of_output(by_mean))
    else:
        result = reconstruction_stats(sae, z_cat[:, 1:], z_cat[:, 1:])
        result["ce_sae"] = ce_of(splice(sae)(z_cat))
        result["ce_zero"] = ce_of(by_zero(z_cat))
        result["ce_mean"] = ce_of(by_mean(z_cat))
    return result


def at_positions(x, q):                                     # (R,T,...), (R,m) -> (R,m,...)
    """Each row at positions of its own."""
    row = torch.arange(len(q), device=q.device)[:, None]
    return x[row, q]


def row_ce(logits, tokens, q):                              # (R,m,d_vocab), (R,T), (R,m) -> (R,)
    """Mean cross-entropy of each row's predictions from positions q, in nats. The logits are those
    at q."""
    next_token = at_positions(tokens, q + 1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), next_token.flatten(), reduction="none")
    return losses.unflatten(0, q.shape).mean(-1)


def replace_with(value):
    """The edit that puts one vector in place of z_cat, or of what the MLP writes, at every position
    but 0."""
    def edit(z):
        replacement = value.to(z.dtype).expand_as(z[:, 1:])
        return torch.cat([z[:, :1], replacement], 1)
    return edit


def of_output(edit):
    """An edit of one tensor as an edit of what an MLP writes, whatever it reads."""
    return lambda mlp_in, mlp_out: edit(mlp_out)


def reconstruction_stats(sae, z, target):                   # (R,T,d_in), (R,T,d_out) -> {name: ...}
    """Per row, (R,): active features per token, squared error, and for the variance the sum of
    target^2; and the sum of the target, (R,d_out)."""
    f = sae.encode(z.to(sae.b_dec.dtype))
    target = target.to(sae.b_dec.dtype)
    return {"l0": (f != 0).float().sum(-1).mean(-1),
            "error": (sae.decode(f) - target).square().sum((-1, -2)),
            "power": target.square().sum((-1, -2)),
            "sum": target.sum(1)}


def ce_recovered(ablated, sae, clean):                      # numpy (R,) each -> float
    """(CE_ablated - CE_sae) / (CE_ablated - CE_clean), a ratio of means over the same rows, no mean
    of ratios."""
    return (ablated - sae).mean() / (ablated - clean).mean()


def summarise(by_row, n_positions):                         # {name: (R,...) float64} -> metrics
    """Per-row numbers -> one layer's metrics with intervals: rows are drawn, then ratios of means
    taken. n_positions: positions of a row, without position 0. `drawn` below are row indices, in a
    bootstrap sample some of them more than once."""

    def explained_variance(drawn):
        n = len(drawn) * n_positions
        sums = by_row["sum"][drawn].sum(0)
        total = by_row["power"][drawn].sum() - (sums ** 2).sum() / n
        return 1 - by_row["error"][drawn].sum() / total

    def mean(name):
        return lambda drawn: by_row[name][drawn].mean()

    def above_clean(name):
        return lambda drawn: (by_row[name][drawn] - by_row["ce_clean"][drawn]).mean()

    def recovered(name):
        return lambda drawn: ce_recovered(by_row[name][drawn], by_row["ce_sae"][drawn],
                                          by_row["ce_clean"][drawn])

    statistics = {name: mean(name) for name in ("l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean")}
    for name in ("ce_sae", "ce_zero", "ce_mean"):
        statistics[f"{name}_minus_clean"] = above_clean(name)
    statistics["ce_recovered_zero"] = recovered("ce_zero")
    statistics["ce_recovered_mean"] = recovered("ce_mean")
    statistics["explained_variance"] = explained_variance

    n_rows = len(by_row["l0"])
    metrics = {}
    for name, statistic in statistics.items():
        metrics[name] = float(statistic(np.arange(n_rows)))
        metrics[f"{name}_ci"] = bootstrap(statistic, n_rows)
    for kind in ("zero", "mean"):
        low, _ = metrics[f"ce_{kind}_minus_clean_ci"]
        if metrics[f"ce_{kind}_minus_clean"] < 0.05 or low <= 0:
            metrics[f"ce_recovered_{kind}"] = None
            metrics[f"ce_recovered_{kind}_ci"] = None
    metrics["n_eval_tokens"] = n_rows * n_positions     # of L0 and variance
    return metrics


def mean_targets(model, reads, layers, rows):               # (R,T) -> {layer: (d_out,)}
    """The mean of z_cat, or of what the MLP writes, over all positions but 0."""
    sums = {layer: 0 for layer in layers}
    for part in rows.split(16):
        for layer, site in run_sites(model, reads, part, layers).items():
            sums[layer] = sums[layer] + site[-1][:, 1:].sum((0, 1))
    return {layer: total / rows[:, 1:].numel() for layer, total in sums.items()}


# ---- what is written and printed ----


def finish(config, model, held_out, learners, folder, speed):   # -> {layer: metrics}
    """Write the SAEs, measure what was written, write metrics, figure and table."""
    saes = write_saes(config, model, learners, folder)
    print(f"measuring on {len(held_out)} held-out rows ...", flush=True)
    means = {layer: learner.mean_out for layer, learner in learners.items()}
    metrics = evaluate(model, saes, held_out, means)

    n_tokens = config.n_activations
    last_resampling = max(resampling_steps(config), default=0)
    since_resampling = n_tokens - config.batch_size * last_resampling
    densities = {}
    for layer, learner in learners.items():
        densities[layer] = learner.fired.cpu().double() / since_resampling
        metrics[layer] |= {"dead_fraction": dead_fraction(learner, n_tokens),
                           "n_dead_tokens": min(DEAD_WINDOW, n_tokens),
                           "n_train_tokens": n_tokens,
                           "tokens_per_second": speed, "seed": config.seed}
        write_json(folder / f"L{layer}" / "metrics.json", metrics[layer])
    plot_training(read_log(folder / "log.jsonl"), densities, folder / "training.png")
    checkpoint_path(folder).unlink(missing_ok=True)
    print(table(metrics, config.reads), f"\n\nwritten to {folder}/", sep="")
    return metrics


def write_saes(config, model, learners, folder):            # -> {layer: SAE}, as they were stored
    """Write every SAE, and beside it a config.json that says what it is of and how it was made.
    This ends training: the learners' SAEs are converted, in place, to take z_cat in its own
    units."""
    of_model = {"model": config.model, "architecture": model.architecture(),
                "weights": digest(model), "left_out": "position 0", "units": "those of the model"}
    saes = {}
    for layer, learner in learners.items():
        path = folder / f"L{layer}" / "sae.safetensors"
        sae = learner.sae
        if sae.reads == MLP:
            sae.rescale(learner.scale_in, learner.scale_out)
        else:
            sae.rescale(learner.scale_out)
        sae.about |= {"layer": layer, **of_model}
        sae.save(path, torch.float16 if config.half else torch.float32)
        write_json(path.with_name("config.json"),
                   {**lasting_settings(config), "d_in": sae.d_in, "d_out": sae.d_out,
                    "l1_of_layer": learner.l1, **sae.about, "top_k": sae.top_k})
        saes[layer] = SAE.load(path, learner.mean_out.device)
    return saes


def measure_saes(config, model, tokenizer, held_out, folder):   # -> {layer: metrics}
    """Measure the SAEs of --saes, or its transcoders, on held-out text; nothing is trained. Mean
    ablation puts in the mean over n_eval_rows rows of training text."""
    claim(folder, config.model, digest(model))
    load = load_transcoders if config.reads == MLP else load_saes
    saes = load(config.saes, model, config.layers, held_out.device)     # (): all that are there
    print(f"measuring {config.saes} on {len(held_out)} held-out rows ...", flush=True)
    training_rows = next(data.rows(config.corpus, tokenizer, "train", T=config.n_ctx,
                                   n=config.n_eval_rows,
                                   held_out_share=config.held_out_share)).to(held_out.device)
    means = mean_targets(model, config.reads, list(saes), training_rows)
    metrics = evaluate(model, saes, held_out, means)
    layers = {f"L{layer}": values for layer, values in metrics.items()}
    write_json(folder / "measured.json",
               {"saes": config.saes, "corpus": config.corpus, "layers": layers})
    print(table(metrics, config.reads), f"\n\nwritten to {folder}/measured.json", sep="")
    return metrics


def table(metrics, reads):
    """The metrics of all layers, a line each."""
    replaced = "the MLP's output" if reads == MLP else "z_cat"
    lines = [f"cross-entropy in nats per token, clean and with {replaced} replaced; [95% interval]",
             f"layer    L0   clean     SAE    zero    mean  {'recovered over zero':>23}  "
             f"{'recovered over mean':>23}   variance   dead"]
    for layer, m in metrics.items():
        over_zero = format_ci(m["ce_recovered_zero"], m["ce_recovered_zero_ci"], ".1%")
        over_mean = format_ci(m["ce_recovered_mean"], m["ce_recovered_mean_ci"], ".1%")
        dead = f"{m['dead_fraction']:6.1%}" if "dead_fraction" in m else "   n/a"
        lines.append(f"{layer:5d} {m['l0']:5.1f} {m['ce_clean']:7.3f} {m['ce_sae']:7.3f} "
                     f"{m['ce_zero']:7.3f} {m['ce_mean']:7.3f}  {over_zero:>23}  {over_mean:>23}"
                     f"  {m['explained_variance']:9.1%} {dead}")
    return "\n".join(lines)


def main():
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w", encoding="utf8")     # of several processes one speaks
    try:
        train(parse_flags(TrainConfig, __doc__, preset=preset))
    finally:
        leave()


if __name__ == "__main__":
    run(main)
