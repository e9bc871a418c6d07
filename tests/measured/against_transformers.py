"""Does transformers see the same, on a published model's own weights?

    python tests/measured/against_transformers.py --model published/gemma-3-270m \
        --corpus published/english

Three tables, all but "ours" computed through transformers, with forward hooks and plain loops:

    forward pass    the largest differences of logits, patterns and z_cat, on text; one row is
                    longer than a window
    induction       attention by prefix length (induction.py) of the heads named
    IOI             the change of the logit difference when a head's z is replaced by that of the
                    prompt with the other giver (ioi.py), at S2 and at the end

Also written to <out>/<model>/against_transformers/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import data  # noqa: E402
import induction  # noqa: E402
import ioi  # noqa: E402
from data.errors import run  # noqa: E402
from data.files import check_writable, run_folder, write_json  # noqa: E402
from data.flags import field, parse_flags  # noqa: E402
from data.prompts import draw_prompts, names_of_one_token, other_giver, tokenise  # noqa: E402
from data.stories import HELD_OUT_NAMES  # noqa: E402
from data.tokens import fuzzy_classes, set_n_tokens  # noqa: E402
from model import load_model  # noqa: E402
from study import parse_heads  # noqa: E402


@dataclass(frozen=True)
class PeerConfig:
    model: str = field("tiny", "a directory that transformers reads, or tiny")
    corpus: str = field("python", "text: see train.py")
    heads: str = field("0.2,1.0,2.1,3.0", "heads, such as 5.1,5.2,11.2")
    n_sequences: int = field(24, "random sequences of the prefix protocol")
    n_prompts: int = field(24, "IOI prompts")
    long_row: int = field(700, "tokens of one row that is longer than a window, if they fit")
    seed: int = field(0, "fixes all that is drawn at random")
    out: str = field("out", "folder for results")


def load_theirs(directory):
    """The model by transformers, in float32, with attention patterns at hand."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager",
                                                dtype=torch.float32).eval()


def output_projections(theirs):                             # -> list of modules, by layer
    """The module of each layer whose input is z_cat."""
    inner = theirs.transformer if hasattr(theirs, "transformer") else theirs.model
    if hasattr(inner, "h"):
        return [block.attn.c_proj for block in inner.h]
    return [block.self_attn.o_proj for block in inner.layers]


# ---- the forward pass ----


@torch.no_grad()
def forward_differences(ours, theirs, tokens):              # (B,T) -> {name: largest difference}
    """Of logits, patterns and z_cat of all layers."""
    z_of_layer = {}
    handles = []
    for layer, module in enumerate(output_projections(theirs)):
        def look(module, arguments, layer=layer):
            z_of_layer[layer] = arguments[0]
        handles.append(module.register_forward_pre_hook(look))
    output = theirs(tokens, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    logits, cache = ours(tokens, keep=range(ours.config.n_layers))
    found = {"logits": float((logits - output.logits).abs().max()), "pattern": 0.0, "z_cat": 0.0,
             "largest logit": float(logits.abs().max())}
    for layer, kept in cache.items():
        for name, mine, other in (("pattern", kept.pattern, output.attentions[layer]),
                                  ("z_cat", kept.z_cat, z_of_layer[layer])):
            found[name] = max(found[name], float((mine - other).abs().max()))
    return found


# ---- induction ----


@torch.no_grad()
def prefix_attention(theirs, base, key, query, lengths):    # -> (n,lengths,layers,H)
    """Attention from the query to the key, with the tokens before the key copied to before the
    query, one at a time."""
    found = []
    for tokens, k, q in zip(base, key.tolist(), query.tolist()):
        of_sequence = []
        for length in lengths:
            row = tokens.clone()
            for i in range(length):
                row[q - i] = tokens[k - 1 - i]
            patterns = theirs.base_model(row[None, :q + 1], output_attentions=True,
                                         use_cache=False).attentions
            of_sequence.append(torch.stack([pattern[0, :, q, k] for pattern in patterns]))
        found.append(torch.stack(of_sequence))
    return torch.stack(found).numpy()


def compare_prefixes(ours, theirs, tokenizer, heads, n, seed):      # -> [[head, length, ours, theirs]]
    """Means over the same sequences, for prefixes of 1 and of 9 tokens."""
    classes = fuzzy_classes(tokenizer)
    mine = induction.prefix_curves(ours, tokenizer.bos, classes, n, seed).attention.mean(0)
    generator = torch.Generator().manual_seed(seed)
    base = induction.random_rows(ours, tokenizer.bos, classes, n, generator)
    key, query = induction.draw_key_and_query(base, generator)
    other = prefix_attention(theirs, base, key, query, (1, 9)).mean(0)
    return [[f"{layer}.{h}", length, float(mine[length, layer, h]), float(other[i, layer, h])]
            for layer, h in heads for i, length in enumerate((1, 9))]


# ---- IOI ----


@torch.no_grad()
def patched_change(theirs, batch, source, layer, head, place):      # -> float
    """Mean change of logit[IO] - logit[S] at the end, prompt by prompt."""
    n_heads = theirs.config.num_attention_heads
    module = output_projections(theirs)[layer]
    changes = []
    for i in range(len(batch.tokens)):
        end = int(batch.pos["end"][i])
        tokens = batch.tokens[i:i + 1, :end + 1]
        source_end = int(source.pos["end"][i])
        seen = {}

        def look(module, arguments):
            seen["z"] = arguments[0].clone()

        def put(module, arguments):
            z = arguments[0].clone()
            d_head = z.shape[-1] // n_heads
            part = slice(head * d_head, (head + 1) * d_head)
            z[0, batch.pos[place][i], part] = seen["z"][0, source.pos[place][i], part]
            return (z,)

        def logit_difference(hook, row):
            handle = module.register_forward_pre_hook(hook)
            logits = theirs(row, use_cache=False).logits[0, -1]
            handle.remove()
            return float(logits[batch.io[i]] - logits[batch.s[i]])

        clean = logit_difference(lambda module, arguments: None, tokens)
        logit_difference(look, source.tokens[i:i + 1, :source_end + 1])
        changes.append(logit_difference(put, tokens) - clean)
    return float(np.mean(changes))


def compare_patches(ours, theirs, tokenizer, heads, n, seed):       # -> [[head, place, ours, theirs]]
    """The same prompts, heads and places."""
    names = names_of_one_token(HELD_OUT_NAMES, tokenizer)
    prompts = draw_prompts(n, names, tokenizer, seed)
    batch = tokenise(prompts, tokenizer)
    source = tokenise(other_giver(prompts), tokenizer)
    clean = ioi.run_prompts(ours, batch)
    source_run = ioi.run_prompts(ours, source)
    rows = []
    for layer, head in heads:
        for place in ("S2", "end"):
            z = ioi.with_head_from(ioi.z_at(clean.z[layer], batch, place),
                                   ioi.z_at(source_run.z[layer], source, place), head,
                                   ours.config.n_heads)
            edit = {layer: ioi.patch_at(z, batch.pos[place])}
            change = ioi.logit_diff_with(ours, clean, batch, edit, place) - clean.ld
            other = patched_change(theirs, batch, source, layer, head, place)
            rows.append([f"{layer}.{head}", place, float(change.mean()), other])
    return rows


# ---- the program ----


def main():
    config = parse_flags(PeerConfig, __doc__)
    ours, tokenizer = load_model(config.model), data.load_tokenizer(config.model)
    set_n_tokens(ours, tokenizer, config.model)
    heads = parse_heads(config.heads, ours)
    theirs = load_theirs(data.weights.TINY if config.model == "tiny" else config.model)
    folder = run_folder(config.out, config.model) / "against_transformers"
    check_writable(folder)

    lengths = [min(128, ours.config.n_ctx)] * 4
    if config.long_row <= ours.config.n_ctx:
        lengths.append(config.long_row)
    forward = {}
    for T in sorted(set(lengths)):
        rows = next(data.rows(config.corpus, tokenizer, "held-out", T, lengths.count(T),
                              repeat_share=0.0))
        forward[T] = forward_differences(ours, theirs, rows)
        print(f"{len(rows)} rows of {T} tokens, largest difference: " + ", ".join(
            f"{name} {value:.1e}" for name, value in forward[T].items()))

    tables = {"attention by prefix length": compare_prefixes(
                  ours, theirs, tokenizer, heads, config.n_sequences, config.seed),
              "change of the logit difference, head patched": compare_patches(
                  ours, theirs, tokenizer, heads, config.n_prompts, config.seed)}
    for name, table in tables.items():
        print(f"\n{name}\nhead              ours   transformers")
        for head, where, mine, other in table:
            print(f"{head:6} {where!s:6} {mine:+10.4f} {other:+12.4f}")
    write_json(folder / "against_transformers.json", {"forward": forward} | tables)
    print(f"\nwritten to {folder}/")


if __name__ == "__main__":
    run(main)
