"""Make the model that ships, from nothing but this machine: vocabulary, training, report.

    python -m data.tiny.make [--out out/make_tiny] [--n-steps 18000]

A GPT-2 of about 4 million parameters, trained on the corpus "python" (data/text.py). Interrupted,
the same command goes on from the last checkpoint, 1000 steps back at most. Copy the result over
data/tiny/ to ship it. The report says what was reached, measured on the stored float16 weights.
"""

import dataclasses
import itertools
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data import text
from data.errors import UserError, run
from data.files import atomic, read_json, write_json
from data.flags import field, parse_flags
from data.machine import fast_bfloat16, keep_freed_memory, pick_device
from data.progress import Progress
from data.stats import bootstrap
from data.stories import held_out_prompts
from data.tiny import bpe
from data.tokens import END_OF_TEXT, load_tokenizer, pad_prompts
from data.weights import read_tensors
from induction import head_scores
from model import GPT2, GPT2Config, load_model

# Phases of training: (up to this part of the steps, share of rows with a repeated passage, share of
# the text that is stories). Induction and indirect objects are each learnt in a phase that is full
# of them, and the last phase has the corpus as everybody else reads it.
PHASES = ((0.25, 0.5, text.STORY_SHARE), (5 / 9, text.REPEAT_SHARE, text.STORY_SHARE),
          (0.9, text.REPEAT_SHARE, 0.7),
          (1.0, text.REPEAT_SHARE, text.STORY_SHARE))

CHECKPOINT_EVERY = 1000     # steps


@dataclass(frozen=True)
class TinyConfig:
    out: str = field("out/make_tiny", "folder for the model, its checkpoint and log.jsonl")
    n_layers: int = field(4, "layers")
    n_heads: int = field(4, "heads per layer")
    d_model: int = field(256, "width of the residual stream")
    d_vocab: int = field(4096, "tokens in the vocabulary, trained first")
    n_ctx: int = field(128, "positions: the length of every row")
    n_steps: int = field(18_000, "optimiser steps")
    batch_size: int = field(12, "rows per step; many small steps form induction sooner than few "
                            "large ones")
    lr: float = field(2e-3, "peak learning rate, cosine decay to a tenth")
    warmup: int = field(300, "steps over which the learning rate rises")
    weight_decay: float = field(0.05, "AdamW's, on matrices only")
    seed: int = field(0, "fixes vocabulary, rows and initial weights")
    device: str = field("auto", "cpu, cuda, mps or auto")


def learning_rate(step, config):
    """Linear rise, then half a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.n_steps - config.warmup, 1)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def make_tokenizer(config, folder):
    """Train the vocabulary on 20 million characters of the corpus, unless it is there already."""
    if not (folder / "merges.txt").is_file():
        print(f"learning {config.d_vocab} tokens ...", flush=True)
        size, pages = 0, []
        for page in text.python_documents("train", config.seed):
            pages.append(page)
            size += len(page)
            if size > 20e6:
                break
        bpe.write_bpe(bpe.train_bpe(pages, config.d_vocab), folder)
    return load_tokenizer(folder)


def new_model(config):
    """GPT-2's initial weights: normal(0.02), and what writes to the residual stream scaled down by
    sqrt(2 * layers)."""
    torch.manual_seed(config.seed)
    shape = GPT2Config(config.n_layers, config.n_heads, config.d_model, 4 * config.d_model,
                              config.d_vocab, config.n_ctx)
    model = GPT2(shape)
    for name, parameter in model.named_parameters():
        if name.startswith(("wte", "wpe")):
            torch.nn.init.normal_(parameter, std=0.02)
        if name.endswith("c_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers))
    return model


def training_rows(config, tokenizer, start):
    """(batch_size, n_ctx) batches from step `start` on, in the phases of PHASES."""
    for until, repeat_share, story_share in PHASES:
        end = round(until * config.n_steps)
        if start < end:
            stream = text.rows("python", tokenizer, "train", config.n_ctx, config.batch_size,
                               config.seed, start * config.batch_size, repeat_share, story_share)
            yield from itertools.islice(stream, end - start)
            start = end


@keep_freed_memory()
def train(config, tokenizer, folder):
    """The loop: rows -> loss -> AdamW, with a checkpoint and a quick report now and then -> the
    model."""
    device = pick_device(config.device)
    model = new_model(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(0.9, 0.98), fused=True)
    start = resume(model, optimizer, folder)
    progress, recent = Progress(config.n_steps, "steps"), []
    for step, batch in zip(range(start, config.n_steps), training_rows(config, tokenizer, start)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device)):
            # at this length the explicit pattern has the faster backward pass
            logits, _ = model(batch, keep=range(config.n_layers))
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-99:], loss.item()]
        if not math.isfinite(recent[-1]):
            raise UserError(f"the loss is not finite at step {step}; the last checkpoint in "
                            f"{folder} is good, try a lower --lr.")
        n_tokens = (step + 1) * config.batch_size * config.n_ctx
        progress(step + 1, f"loss {np.mean(recent):.3f}  {n_tokens / 1e6:.1f}M tokens")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.n_steps:
            save_checkpoint(model, optimizer, step + 1, folder)
            note = {"step": step + 1, "loss": float(np.mean(recent)),
                    **quick_report(model, tokenizer)}
            with open(folder / "log.jsonl", "a", encoding="utf8") as log:
                log.write(json.dumps(note) + "\n")
            print("\n" + json.dumps(note), flush=True)
    return model


def save_checkpoint(model, optimizer, step, folder):
    """Weights, Adam's moments and the step, in one safetensors file."""
    state = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        state["weight " + name] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{key} {name}"] = optimizer.state[parameter][key]
    with atomic(folder / "training.checkpoint") as temporary:
        save_file(state, temporary)


def resume(model, optimizer, folder):
    """Put the last checkpoint back, if there is one -> the step to go on from. UserError if it is
    damaged, or of a model of another size."""
    path = folder / "training.checkpoint"
    if not path.is_file():
        return 0
    state = dict(read_tensors(path))
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state["weight " + name])
                optimizer.state[parameter] = {key: state[f"{key} {name}"].to(parameter.device)
                                              for key in ("exp_avg", "exp_avg_sq", "step")}
        return int(state["step"])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged, or was made with other settings; remove it to start "
                        f"anew.") from error


def write_model(model, folder):
    """config.json and model.safetensors (float16) in Hugging Face's GPT-2 layout."""
    c = model.config
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": c.n_layers, "n_head": c.n_heads, "n_embd": c.d_model, "n_inner": c.d_mlp,
        "vocab_size": c.d_vocab, "n_positions": c.n_ctx, "layer_norm_epsilon": c.eps,
        "bos_token_id": c.d_vocab - 1, "eos_token_id": c.d_vocab - 1,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
    tensors = {"transformer." + name: p.detach().to("cpu", torch.float16).contiguous()
               for name, p in model.named_parameters()}
    with atomic(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@torch.no_grad()
def loss_per_row(model, tokens):  # (B,T) -> (B,) nats, mean over the row's predictions
    """Cross-entropy of every next token."""
    logits = model(tokens)[0]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:],
                             reduction="none")
    return losses.mean(-1)


def repeat_scores(model, tokens, bos, matched=1):           # (B,T) -> (layers,H), number of queries
    """Mean attention of each head from a repeat of `matched` tokens to what followed last time."""
    classes = torch.where(tokens == bos, -1, tokens)
    scores, n_queries = head_scores(model, tokens, classes, matched)
    return scores["induction"].cpu(), n_queries["induction"]


def repeated_random_rows(model, n, seed=0):                 # -> (n,T)
    """BOS, then random tokens, then the same random tokens again."""
    bos = model.config.d_vocab - 1
    half = (model.config.n_ctx - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(bos, (n, half), generator=generator)
    rows = torch.cat([torch.full((n, 1), bos), tokens, tokens], 1)
    return rows.to(next(model.parameters()).device)


@torch.no_grad()
def indirect_objects(model, tokenizer, prompts):
    """Per prompt, the logit difference receiver - giver, and whether the receiver is predicted:
    (n,), (n,)."""
    ids = [[tokenizer.bos, *tokenizer.encode(prompt.text)] for prompt in prompts]
    tokens, end = pad_prompts(ids, tokenizer.bos)
    logits = model(tokens.to(next(model.parameters()).device))[0].cpu()
    row = torch.arange(len(prompts))
    last = logits[row, end].float()                         # (n,d_vocab)
    receiver = torch.tensor([tokenizer.single(" " + prompt.receiver) for prompt in prompts])
    giver = torch.tensor([tokenizer.single(" " + prompt.giver) for prompt in prompts])
    difference = last[row, receiver] - last[row, giver]
    return difference.numpy(), (last.argmax(-1) == receiver).numpy()


def quick_report(model, tokenizer):
    """A few numbers to watch while training."""
    device = next(model.parameters()).device
    difference, is_top = indirect_objects(model, tokenizer, held_out_prompts(200, seed=1))
    scores, _ = repeat_scores(model, repeated_random_rows(model, 32), tokenizer.bos)
    strongest = sorted(by_head(scores).items(), key=lambda item: -item[1])[:4]
    rows = next(text.rows("python", tokenizer, "held-out", model.config.n_ctx, 128,
                          repeat_share=0.0))
    return {"held_out_loss": float(loss_per_row(model, rows.to(device)).mean()),
            "induction": {head: round(score, 2) for head, score in strongest},
            "ioi_right": float((difference > 0).mean()), "ioi_top": float(is_top.mean()),
            "ioi_logit_difference": float(difference.mean())}


def by_head(scores):                                        # (layers,H) -> {"3.0": score, ...}
    """Scores under the names of the heads, rounded."""
    return {f"{layer}.{head}": round(score, 4) for layer, row in enumerate(scores.tolist())
            for head, score in enumerate(row)}


def report(model, tokenizer, config, device):
    """What the stored model reached on held-out text, repeats and prompts, with 95% intervals over
    rows."""
    rows = next(text.rows("python", tokenizer, "held-out", config.n_ctx, 1024, repeat_share=0.0))
    losses = torch.cat([loss_per_row(model, part) for part in rows.split(64)]).double().numpy()
    n_bytes = sum(len(tokenizer.decode(row[1:]).replace(END_OF_TEXT, "").encode())
                  for row in rows.tolist())
    bits_per_byte = losses.mean() * rows[:, 1:].numel() / n_bytes / math.log(2)
    random_scores, _ = repeat_scores(model, repeated_random_rows(model, 128), tokenizer.bos)
    real_scores = {}
    for matched in (1, 2, 4):
        scores, n = repeat_scores(model, rows[:512], tokenizer.bos, matched)
        real_scores[f"matched_{matched}"] = {"n_queries": n, **by_head(scores)}
    return {"held_out_loss": losses.mean(),
            "held_out_loss_ci": bootstrap(lambda drawn: losses[drawn].mean(), len(losses)),
            "held_out_bits_per_byte": bits_per_byte, "n_held_out_tokens": rows[:, 1:].numel(),
            "induction_repeated_random": by_head(random_scores),
            "induction_held_out_text": real_scores,
            "indirect_object": indirect_object_report(model, tokenizer),
            "n_parameters": sum(p.numel() for p in model.parameters()),
            "n_train_tokens": config.n_steps * config.batch_size * config.n_ctx, "device": device,
            "config": settings(config),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "matplotlib": matplotlib.__version__}}


def indirect_object_report(model, tokenizer):
    """How often the receiver is above the giver, by order of names."""
    prompts = held_out_prompts(1000)
    difference, is_top = indirect_objects(model, tokenizer, prompts)
    by_order = {}
    for order in ("ABBA", "BABA"):
        is_order = np.array([prompt.order == order for prompt in prompts])
        of_order = difference[is_order]
        right = (of_order > 0).astype(float)
        n = len(of_order)
        by_order[order] = {
            "n": n, "receiver_above_giver": float(right.mean()),
            "receiver_above_giver_ci": bootstrap(lambda drawn: right[drawn].mean(), n),
            "receiver_is_top": float(is_top[is_order].mean()),
            "logit_difference": float(of_order.mean()),
            "logit_difference_ci": bootstrap(lambda drawn: of_order[drawn].mean(), n)}
    return by_order


def settings(config):
    """The config as a dict, without what may differ between a run and its resumption."""
    return {key: value for key, value in dataclasses.asdict(config).items()
            if key not in ("out", "device")}


def main():
    config = parse_flags(TinyConfig, __doc__)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "make_tiny.json"
    if made.is_file() and read_json(made) != settings(config):
        raise UserError(f"{folder} holds a run with other settings; choose another --out.")
    write_json(folder / "make_tiny.json", settings(config))
    tokenizer = make_tokenizer(config, folder)
    trained = train(config, tokenizer, folder)
    write_model(trained, folder)
    result = report(load_model(folder), tokenizer, config, str(next(trained.parameters()).device))
    write_json(folder / "report.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
