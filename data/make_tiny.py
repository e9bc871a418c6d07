"""Make the model that ships, from nothing but this machine: vocabulary, training, report.

    python -m data.make_tiny [--out out/make_tiny] [--n-steps 18000]

A GPT-2 of about 4 million parameters, trained on the corpus "python" (data/text.py). Interrupted, the same
command goes on from the last checkpoint, 1000 steps back at most. Copy the result over data/tiny/ to ship it.
The report says what was reached, measured on the stored float16 weights.
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

import model as models
from data import bpe, text
from data.common import (Progress, UserError, atomic, bootstrap, fast_bfloat16, field, keep_freed_memory,
                         parse_flags, pick_device, read_json, run, write_json)
from data.stories import held_out_prompts
from data.weights import read_tensors


# Phases of training: (up to this part of the steps, share of rows with a repeated passage, share of the text
# that is stories). Induction and indirect objects are each learnt in a phase that is full of them, and the
# last phase has the corpus as everybody else reads it.
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
    batch_size: int = field(12, "rows per step; many small steps form induction sooner than few large ones")
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
    return bpe.tokenizer(folder)


def new_model(config):
    """GPT-2's initial weights: normal(0.02), and what writes to the residual stream scaled down by sqrt(2 *
    layers)."""
    torch.manual_seed(config.seed)
    shape = models.GPT2Config(config.n_layers, config.n_heads, config.d_model, 4 * config.d_model,
                              config.d_vocab, config.n_ctx)
    model = models.GPT2(shape)
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
            stream = text.rows("python", tokenizer, "train", config.n_ctx, config.batch_size, config.seed,
                               start * config.batch_size, repeat_share, story_share)
            yield from itertools.islice(stream, end - start)
            start = end


@keep_freed_memory()
def train(config, tokenizer, folder):
    """The loop: rows -> loss -> AdamW, with a checkpoint and a quick report now and then -> the model."""
    device = pick_device(config.device)
    model = new_model(config).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(0.9, 0.98), fused=True)
    start = resume(model, optimizer, folder)
    progress, recent = Progress(config.n_steps, "steps"), []
    tokens_per_step = config.batch_size * config.n_ctx
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
            raise UserError(f"the loss is not finite at step {step}; the last checkpoint in {folder} is "
                            f"good, try a lower --lr.")
        progress(step + 1, f"loss {np.mean(recent):.3f}  {(step + 1) * tokens_per_step / 1e6:.1f}M tokens")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.n_steps:
            save_checkpoint(model, optimizer, step + 1, folder)
            note = {"step": step + 1, "loss": float(np.mean(recent)), **quick_report(model, tokenizer)}
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
    """Put the last checkpoint back, if there is one -> the step to go on from. UserError if it is damaged, or
    of a model of another size."""
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
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
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
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none").mean(-1)


@torch.no_grad()
def repeat_attention(model, tokens, matched=1):  # (B,T) -> (layers, H), number of queries
    """Induction score: mean attention of each head from a repeat to the token that followed last time.

    A query q counts if its last `matched` tokens stood together before in the row, ending at some k-1 with 1
    < k < q; its score is its attention to all such k together. Key 0 is BOS and never counts.
    """
    total, queries = 0, 0
    for row in tokens.split(32):
        follows = torch.ones(row.shape[0], row.shape[1], row.shape[1], dtype=torch.bool,
                             device=row.device).tril(-1)
        follows[:, :, : matched + 1] = False
        for back in range(matched):                                     # token[q-back] == token[k-1-back]
            same = row[:, :, None] == row[:, None, :]
            follows &= same.roll((back, 1 + back), (1, 2))
        follows[:, :matched] = False
        repeats = follows.any(-1)                                       # (B,q)
        _, cache = model(row, keep=range(model.config.n_layers))
        mass = torch.stack([(c.pattern * follows[:, None]).sum(-1) for c in cache.values()])  # (layers,B,H,q)
        total = total + mass.transpose(1, 2)[:, :, repeats].sum(-1).cpu()
        queries += int(repeats.sum())
    return total / max(queries, 1), queries


def repeated_random_rows(model, n, seed=0):                             # -> (n,T)
    """BOS, then random tokens, then the same random tokens again."""
    half = (model.config.n_ctx - 1) // 2
    d_vocab, device = model.config.d_vocab, next(model.parameters()).device
    tokens = torch.randint(d_vocab - 1, (n, half), generator=torch.Generator().manual_seed(seed)).to(device)
    return torch.cat([torch.full((n, 1), d_vocab - 1, device=device), tokens, tokens], 1)


@torch.no_grad()
def indirect_objects(model, tokenizer, prompts):
    """Per prompt, the logit difference receiver - giver and whether the receiver is predicted: (n,), (n,)."""
    ids = [[tokenizer.bos, *tokenizer.encode(p.text)] for p in prompts]
    tokens = torch.full((len(ids), max(map(len, ids))), tokenizer.bos)
    for row, prompt in zip(tokens, ids):
        row[: len(prompt)] = torch.tensor(prompt)  # what stands after the prompt cannot change it
    logits = model(tokens.to(next(model.parameters()).device))[0].cpu()
    last = logits[torch.arange(len(ids)), torch.tensor([len(prompt) - 1 for prompt in ids])].float()
    receiver = torch.tensor([tokenizer.single(" " + p.receiver) for p in prompts])
    giver = torch.tensor([tokenizer.single(" " + p.giver) for p in prompts])
    difference = last.gather(1, receiver[:, None]) - last.gather(1, giver[:, None])
    return difference[:, 0].numpy(), (last.argmax(-1) == receiver).numpy()


def quick_report(model, tokenizer):
    """A few numbers to watch while training."""
    difference, top = indirect_objects(model, tokenizer, held_out_prompts(200, seed=1))
    scores = repeat_attention(model, repeated_random_rows(model, 32))[0]
    best = sorted(((s, f"{l}.{h}") for l, row in enumerate(scores.tolist()) for h, s in enumerate(row)),
                  reverse=True)
    rows = next(text.rows("python", tokenizer, "held-out", model.config.n_ctx, 128, repeat_share=0.0))
    return {"held_out_loss": float(loss_per_row(model, rows.to(next(model.parameters()).device)).mean()),
            "induction": {head: round(s, 2) for s, head in best[:4]},
            "ioi_right": float((difference > 0).mean()), "ioi_top": float(top.mean()),
            "ioi_logit_difference": float(difference.mean())}


def report(model, tokenizer, config, device):
    """What the stored model reached on held-out text, repeats and prompts, with 95% intervals over rows."""
    rows = next(text.rows("python", tokenizer, "held-out", config.n_ctx, 1024, repeat_share=0.0))
    losses = torch.cat([loss_per_row(model, part) for part in rows.split(64)]).double().numpy()
    n_bytes = sum(len(tokenizer.decode(row[1:]).replace(bpe.END_OF_TEXT, "").encode())
                  for row in rows.tolist())
    bits_per_byte = losses.mean() * rows[:, 1:].numel() / n_bytes / math.log(2)
    prompts = held_out_prompts(1000)
    difference, top = indirect_objects(model, tokenizer, prompts)
    by_order = {}
    for order in ("ABBA", "BABA"):
        mine = np.array([p.order == order for p in prompts])
        right = (difference[mine] > 0).astype(float)
        by_order[order] = {"n": int(mine.sum()), "receiver_above_giver": float(right.mean()),
                           "receiver_above_giver_ci": bootstrap(lambda i: right[i].mean(), len(right)),
                           "receiver_is_top": float(top[mine].mean()),
                           "logit_difference": float(difference[mine].mean()),
                           "logit_difference_ci": bootstrap(lambda i: difference[mine][i].mean(), len(right))}
    by_head = lambda scores: {f"{layer}.{head}": round(score, 4) for layer, row in enumerate(scores.tolist())
                              for head, score in enumerate(row)}
    random_scores, _ = repeat_attention(model, repeated_random_rows(model, 128))
    real_scores = {}
    for matched in (1, 2, 4):
        scores, n = repeat_attention(model, rows[:512], matched)
        real_scores[f"matched_{matched}"] = {"n_queries": n, **by_head(scores)}
    return {"held_out_loss": losses.mean(),
            "held_out_loss_ci": bootstrap(lambda i: losses[i].mean(), len(losses)),
            "held_out_bits_per_byte": bits_per_byte, "n_held_out_tokens": rows[:, 1:].numel(),
            "induction_repeated_random": by_head(random_scores), "induction_held_out_text": real_scores,
            "indirect_object": by_order, "n_parameters": sum(p.numel() for p in model.parameters()),
            "n_train_tokens": config.n_steps * config.batch_size * config.n_ctx, "device": device,
            "config": settings(config),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__, "matplotlib": matplotlib.__version__}}


def settings(config):
    """The config as a dict, without what may differ between a run and its resumption."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "device")}


def main():
    config = parse_flags(TinyConfig, __doc__)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "make_tiny.json").is_file() and read_json(folder / "make_tiny.json") != settings(config):
        raise UserError(f"{folder} holds a run with other settings; choose another --out.")
    write_json(folder / "make_tiny.json", settings(config))
    tokenizer = make_tokenizer(config, folder)
    trained = train(config, tokenizer, folder)
    write_model(trained, folder)
    result = report(models.load(folder), tokenizer, config, str(next(trained.parameters()).device))
    write_json(folder / "report.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
