"""The induction study: heads that need a short prefix, and heads that need a long one (the paper,
Fig. 4 and 19).

An induction head at a query looks for the same token earlier in the text, and attends to the one
after it:

    ... A B C X ...... A B C    prefix length 3: query C attends to key X, as A B C stood before X
              k            q    L[q,k] = length of the longest run up to q that equals that before k

    heads          induction, previous-token and duplicate-token score of every head
    prefix         random rows; in each, the prefix grown from 0 to 9 tokens with key and query in
                   place: attention to X, and direct logit attribution of X, for every head
    intervention   held-out text: the token at k-2 replaced, so that 1 token of the prefix is left.
                   Controls: the token at k+2 replaced instead; that at k-2 where only 1 matched
    features       '"board" is next by induction': next_by_induction.py

    python induction.py         all four on the shipped model, in <out>/<model>/induction/

Two tokens match if they are equal but for one leading space and the case of letters
(data.tokens.fuzzy_classes). BOS, which also stands between the documents of a row, matches nothing,
and is never the key X.

Shapes: B batch, T positions (q query, k key), H heads, d_head; n examples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UserError, run
from data.figures import plot_heads, plot_intervention, plot_prefixes
from data.files import write_json
from data.flags import field, parse_flags
from data.progress import Progress
from data.stats import format_ci, mean_with_ci
from data.tokens import fuzzy_classes
from direct import direct_logits
from next_by_induction import study_features
from sae import check_feature
from study import (StudyConfig, begin, finish, held_out_rows, parse_feature, parse_heads,
                   reported)

LENGTHS = range(10)             # prefix lengths of the paired protocol
SHORTEST_ROW = 2 * max(LENGTHS) + 3     # BOS, the longest prefix, key, that prefix again, one more
MIN_ATTENTION = 0.3             # above which a head counts as attending (Fig. 4b)

# ---- which tokens match ----


def prefix_lengths(classes):                                # (B,T) -> (B,q,k)
    """L[q,k]: the length of the longest run of tokens that ends at q and matches the run that ends
    at k-1; 0 for k > q and for k = 0.

    classes: an integer for each token, equal where tokens match; BOS is -1, which matches nothing.

    L[q,k] = 1 + L[q-1,k-1] if q matches k-1, else 0.
    """
    B, T = classes.shape
    same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]          # (B,q,k)
    lengths = classes.new_zeros(B, T, T)
    for q in range(1, T):
        lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])
    return lengths


# ---- heads ----


@torch.no_grad()
def head_scores(model, tokens, classes, matched=1):  # (B,T) x 2 -> {score: (layers,H)}, {score: n}
    """Mean attention of every head at the queries that have something to look at; and how many
    queries that is.

    induction: to the keys k with L[q,k] >= matched, summed over them. duplicate: to earlier
    occurrences of the query's token, summed. previous: to the token before the query. BOS is never
    such a key. (data/tiny/make.py asks for other `matched`, and for the number.)
    """
    layers = range(model.config.n_layers)
    names = ("induction", "previous", "duplicate")
    attention = {(name, layer): 0 for name in names for layer in layers}
    n_queries = dict.fromkeys(names, 0)
    for part in torch.arange(len(tokens), device=tokens.device).split(16):
        targets = score_targets(classes[part], matched)
        for name in names:
            n_queries[name] += int(targets[name].any(-1).sum())
        for layer, kept in model.layer_caches(tokens[part]):
            for name in names:
                on_target = (kept.pattern * targets[name][:, None]).sum(-1)         # (B,H,q)
                attention[name, layer] = attention[name, layer] + on_target.sum((0, 2))
    scores = {}
    for name in names:
        sums = torch.stack([attention[name, layer] for layer in layers])            # (layers,H)
        scores[name] = sums / max(n_queries[name], 1)
    return scores, n_queries


def score_targets(classes, matched):                        # (B,T) -> {score: (B,q,k) bool}
    """The keys that each score is about. None of them is BOS: many heads look there from anywhere,
    and between documents it may follow a copy of the query's token by chance."""
    q, k = query_and_key_positions(classes)
    is_token = (classes >= 0)[:, None]                                  # (B,1,k)
    same = classes[:, :, None] == classes[:, None]
    return {"induction": (prefix_lengths(classes) >= matched) & (k < q) & is_token,
            "duplicate": same & (k < q) & is_token,
            "previous": (k == q - 1) & is_token}


def query_and_key_positions(tokens):                        # (B,T) -> (T,1), (1,T)
    """Query and key positions, to compare with each other."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return position[:, None], position[None]


def random_rows(model, bos, token_class, n, generator, repeat=False):   # -> (n,T)
    """BOS and random tokens that all differ, also in class: of each class only the first token is
    ever drawn. With `repeat`, half as many, and then the same again. token_class: (n_vocab,)."""
    longest = min(128, model.config.n_ctx)                  # with `repeat` T is odd: 127
    n_different = (longest - 1) // 2 if repeat else longest - 1
    class_of = token_class.cpu().numpy()
    _, one_of_each = np.unique(class_of, return_index=True)
    pool = torch.from_numpy(one_of_each[class_of[one_of_each] >= 0])
    if len(pool) < n_different:
        raise UserError(f"this vocabulary has {len(pool)} tokens that differ, and a row takes "
                        f"{n_different}.")
    drawn = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:n_different]]
                         for _ in range(n)])
    parts = [torch.full((n, 1), bos), drawn]
    if repeat:
        parts.append(drawn)
    return torch.cat(parts, 1).to(token_class.device)


# ---- prefix length (Fig. 4a, 19) ----


class PrefixCurves(NamedTuple):
    """Scores of every head by prefix length, paired: the sequences are the same for all lengths."""
    attention: np.ndarray   # (n,lengths,layers,H) from the query to the key after the prefix
    logit: np.ndarray       # (n,lengths,layers,H) direct logit attribution of the key's token


@torch.no_grad()
def prefix_curves(model, bos, token_class, n=400, seed=0, progress=lambda rows: None):
    """The paired protocol -> PrefixCurves.

    Key and query of a random row stay where they are, and for each length p the p tokens before the
    key are copied to the p tokens up to the query. All tokens but the copies differ.
    """
    generator = torch.Generator().manual_seed(seed)
    base = random_rows(model, bos, token_class, n, generator)
    key, query = draw_key_and_query(base, generator)
    order = query.argsort()         # a block is cut after its last query: sorted, that is cheapest
    base, key, query = base[order], key[order], query[order]
    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    attention, logit = [], []
    for rows in torch.arange(n, device=base.device).split(8):
        up_to_query = base[rows, :query[rows].max() + 1]
        tokens, k, q = grow_prefix(up_to_query, key[rows], query[rows])
        pattern, direct = attention_and_logits(model, matrices, up_to_query, tokens, k, q)
        attention.append(pattern.cpu().numpy())
        logit.append(direct.cpu().numpy())
        progress(int(rows[-1]) + 1)
    shape = (n, len(LENGTHS), model.config.n_layers, model.config.n_heads)
    return PrefixCurves(np.concatenate(attention).reshape(shape),
                        np.concatenate(logit).reshape(shape))


def draw_key_and_query(base, generator):                    # (n,T) -> (n,), (n,)
    """Random positions with room for the longest prefix before each."""
    n, T = base.shape
    longest = max(LENGTHS)
    if T < SHORTEST_ROW:
        raise UserError(f"prefixes of {longest} tokens take rows of {SHORTEST_ROW} tokens or more; "
                        f"this model has {T}.")
    key = torch.randint(longest + 1, T - longest - 1, (n,), generator=generator)
    query = [torch.randint(int(k) + longest, T, (), generator=generator) for k in key]
    return key.to(base.device), torch.stack(query).to(base.device)


def grow_prefix(base, key, query):              # (b,T), (b,), (b,) -> (B,T), (B,), (B,)
    """Each row once for each prefix length, lengths varying fastest, so that B = b * lengths ->
    tokens, keys, queries."""
    n_lengths = len(LENGTHS)
    tokens = base.repeat_interleave(n_lengths, 0)
    k = key.repeat_interleave(n_lengths)
    q = query.repeat_interleave(n_lengths)
    length = torch.tensor(LENGTHS, device=base.device).repeat(len(base))
    row = torch.arange(len(tokens), device=base.device)
    for back in range(max(LENGTHS)):
        grown = back < length                               # the rows whose prefix is longer
        tokens[row[grown], (q - back)[grown]] = tokens[row[grown], (k - 1 - back)[grown]]
    return tokens, k, q


def attention_and_logits(model, matrices, base, tokens, k, q):  # (b,T), (B,T), (B,), (B,)
    """Every head's attention from q to k, and what it adds at q, directly, to the logit of the
    token at k, less the mean over all tokens -> (B,layers,H) each.

    tokens: of `grow_prefix`, base with other tokens in the longest prefix before q. What stands
    before that is the same in all, and is run once.
    """
    n_new = max(LENGTHS)                                    # positions up to q that may differ
    row = torch.arange(len(tokens), device=tokens.device)
    positions = q[:, None] + torch.arange(1 - n_new, 1, device=q.device)            # (B,n_new)
    caches = model.rerun_caches(model.run(base), row // len(LENGTHS), positions, tokens=tokens)
    attention = []

    def look(kept):
        attention.append(kept.pattern[row, :, -1, k])                   # (B,H): q is the last

    direction = model.logit_directions(tokens[row, k])
    last = torch.full_like(q, n_new - 1)
    logits = direct_logits(model, matrices, caches, last, direction, look)
    return torch.stack(attention, 1), logits


def pick_heads(attention):                      # (n,lengths,layers,H) -> two of (layer, head)
    """The head that attends most after 1 matching token; and, of the others, the one whose
    attention grows most from 1 token to 9. In GPT-2 Small they are to be a short-prefix and a
    long-prefix head; in another model they need not."""
    mean = attention.mean(0)
    first = argmax_head(mean[1])
    rise = mean[max(LENGTHS)] - mean[1]
    rise[first] = -np.inf
    return first, argmax_head(rise)


def argmax_head(scores):                                    # (layers,H) -> (layer, head)
    """The head with the largest score."""
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    return int(layer), int(head)


# ---- intervention on real text (Fig. 4b) ----


class Examples(NamedTuple):
    """Places in real text where a prefix matches."""
    row: Tensor             # (n,)
    q: Tensor               # (n,)
    k: Tensor               # (n,)
    length: Tensor          # (n,)

    def pick(self, which):
        return Examples(*(column[which] for column in self))


def find_examples(classes):                                 # (B,T) -> Examples
    """Places where a prefix matches, by text alone: the query has no other such key, so that no
    head's attention is divided."""
    parts = []
    for rows in torch.arange(len(classes), device=classes.device).split(16):
        lengths, possible = possible_examples(classes[rows])
        is_only_key = (lengths > 0).sum(-1, keepdim=True) == 1
        parts.append(examples_where(possible & is_only_key, lengths, rows))
    return joined_examples(parts)


@torch.no_grad()
def find_attended(model, tokens, classes, heads):           # (B,T) x 2 -> {head: Examples}
    """Places where a prefix matches and a head's attention is over 0.3, as in the paper. Other keys
    may match there too; and since places are chosen by the attention that is measured then, some of
    what it loses is regression to the mean: the controls say how much. heads: of (layer, head)."""
    parts = {head: [] for head in heads}
    layers = {layer for layer, _ in heads}
    for rows in torch.arange(len(tokens), device=tokens.device).split(16):
        lengths, possible = possible_examples(classes[rows])
        for layer, kept in model.layer_caches(tokens[rows], layers):
            for head in heads:
                if head[0] == layer:
                    attends = kept.pattern[:, head[1]] > MIN_ATTENTION
                    parts[head].append(examples_where(possible & attends, lengths, rows))
    return {head: joined_examples(of_head) for head, of_head in parts.items()}


def possible_examples(classes):                             # (b,T) -> (b,q,k), (b,q,k) bool
    """Prefix lengths, 0 where the key is not before the query; and where a prefix of 1 or more
    tokens matches, the key and the token at k-2, which is to be replaced, are not BOS, and the two
    copies of the prefix do not overlap."""
    q, k = query_and_key_positions(classes)
    lengths = prefix_lengths(classes) * (k < q)
    is_token = classes >= 0
    before_is_token = F.pad(is_token, (2, 0))[:, :-2]                   # (b,k): at k-2
    fits = (is_token & before_is_token)[:, None]                        # (b,1,k)
    return lengths, (lengths > 0) & (k + lengths <= q + 1) & fits


def examples_where(chosen, lengths, rows):                  # (b,q,k) x 2, (b,) -> Examples
    """The places that are chosen; rows: the number of each row in the text."""
    row, q, k = chosen.nonzero(as_tuple=True)
    return Examples(rows[row], q, k, lengths[row, q, k])


def joined_examples(parts):                                 # list of Examples -> Examples
    """The examples of all parts, one after the other."""
    return Examples(*(torch.cat(column) for column in zip(*parts)))


def with_token_replaced(tokens, token_class, examples, offset, generator):      # -> (n,T)
    """A copy of each example's row with the token at k + offset replaced by a random one that
    matches nothing in the row."""
    rows = tokens[examples.row].clone()
    for row, position in zip(rows, (examples.k + offset).tolist()):
        present = {-1, *token_class[row].tolist()}
        for _ in range(10_000):
            token = int(torch.randint(len(token_class), (), generator=generator))
            if int(token_class[token]) not in present:
                row[position] = token
                break
        else:
            raise UserError("a row of this text has nearly every token of the vocabulary, and none "
                            "is left to replace one by.")
    return rows


@torch.no_grad()
def attention_at(model, rows, examples, layers):            # (n,T) -> (n,len(layers),H)
    """Every head's attention from q to k, in some layers."""
    parts = []
    order = examples.q.argsort()        # a block is cut after its last query: sorted is cheapest
    for part in order.split(32):
        row = torch.arange(len(part), device=rows.device)
        q, k = examples.q[part], examples.k[part]
        up_to_query = rows[part, :q.max() + 1]
        attention = [kept.pattern[row, :, q, k]
                     for _, kept in model.layer_caches(up_to_query, layers)]
        parts.append(torch.stack(attention, 1))
    return torch.cat(parts)[order.argsort()].cpu().numpy()


def intervene(model, tokens, token_class, examples, heads, n, seed=0):  # -> {condition: {...}}
    """Attention of the heads before and after one token is replaced.

    corrupt: k-2, prefix 2 or longer. control, other token: k+2, the same examples; in both, k+2
    stands before the prefix that ends at the query, and is not BOS. control, prefix 1: k-2, prefix
    exactly 1. At most n examples each, drawn at random; intervals over rows.
    """
    generator = torch.Generator().manual_seed(seed)
    after_k = (examples.k + 2).clamp_max(tokens.shape[1] - 1)
    has_room = (examples.k + 2 <= examples.q - examples.length) \
        & (token_class[tokens[examples.row, after_k]] >= 0)
    long = draw(examples.pick((examples.length >= 2) & has_room), n, generator)
    of_one_token = draw(examples.pick(examples.length == 1), n, generator)
    layers = sorted({layer for layer, _ in heads})
    results = {}
    for chosen, offsets in ((long, {"corrupt": -2, "control, other token": 2}),
                            (of_one_token, {"control, prefix 1": -2})):
        counts = {"n": len(chosen.q), "n_rows": len(chosen.row.unique())}
        if not len(chosen.q):
            results |= {condition: counts for condition in offsets}
            continue
        before = attention_at(model, tokens[chosen.row], chosen, layers)
        for condition, offset in offsets.items():
            rows = with_token_replaced(tokens, token_class, chosen, offset, generator)
            after = attention_at(model, rows, chosen, layers)
            results[condition] = counts | {
                f"{layer}.{h}": before_and_after(before[:, layers.index(layer), h],
                                                 after[:, layers.index(layer), h],
                                                 chosen.row.cpu().numpy())
                for layer, h in heads}
    return results


def before_and_after(before, after, row):                   # (n,) x 3 -> {name: mean, name_ci: ...}
    """Means of both and of the change, with intervals over rows."""
    result = {}
    for name, values in (("before", before), ("after", after), ("change", after - before)):
        result[name], result[f"{name}_ci"] = mean_with_ci(values, row)
    return result


def draw(examples, n, generator):                           # -> Examples, n at most
    """Some of the examples, drawn at random without replacement."""
    drawn = torch.randperm(len(examples.q), generator=generator)[:n]
    return examples.pick(drawn.to(examples.q.device))


# ---- the program ----


@dataclass(frozen=True)
class InductionConfig(StudyConfig):
    feature: str = field("", "the feature to draw, as layer.feature; empty: the first one found")
    n_sequences: int = field(400, "random sequences for each prefix length (the paper: 400)")
    n_examples: int = field(300, "places in real text where a token is replaced, per condition")
    heads: str = field("", "heads whose attention is measured where a token is replaced, such as "
                       "5.1,5.5; empty: the two that prefix lengths pick")
    n_rows: int = field(2048, "rows of real text")


def main():
    config = parse_flags(InductionConfig, __doc__)
    for flag, value in (("--n-sequences", config.n_sequences), ("--n-examples", config.n_examples),
                        ("--n-rows", config.n_rows)):
        if value < 2:
            raise UserError(f"{flag} must be 2 or more, not {value}.")
    layer, feature = parse_feature(config.feature)
    study = begin(config, "induction")
    if layer is not None:
        check_feature(study.saes, layer, feature)
    heads = parse_heads(config.heads, study.model) if config.heads else None
    rows = held_out_rows(study, config.n_rows)
    token_class = fuzzy_classes(study.tokenizer).to(study.device)

    report_heads(study, scores_on_two_texts(study, rows, token_class))

    if study.n_ctx >= SHORTEST_ROW:
        picked = study_prefixes(study, token_class)
    else:
        picked = ()
        print(f"\nprefixes of {max(LENGTHS)} tokens take rows of {SHORTEST_ROW} tokens; this "
              f"model has {study.n_ctx}, so that they are left out; and so is the intervention, "
              f"unless --heads names heads for it")
    heads = heads or picked
    if heads:
        report_interventions(study, compute_interventions(study, rows, token_class, heads), heads)

    print("\nlooking for features ...", flush=True)
    study_features(study, rows, token_class, layer, feature)
    finish(study)


def scores_on_two_texts(study, rows, token_class):          # -> {text: {score: (layers,H)}}
    """The scores on repeated random tokens and on held-out text."""
    generator = torch.Generator().manual_seed(study.config.seed)
    repeated = random_rows(study.model, study.tokenizer.bos, token_class, 64, generator,
                           repeat=True)
    scores = {}
    for text, tokens in (("repeated random tokens", repeated), ("held-out text", rows[:256])):
        scores[text], _ = head_scores(study.model, tokens, token_class[tokens])
    return scores


def study_prefixes(study, token_class):                     # -> the two heads that are picked
    """All heads by prefix length."""
    config = study.config
    progress = Progress(config.n_sequences, "sequences")
    curves = prefix_curves(study.model, study.tokenizer.bos, token_class, config.n_sequences,
                           config.seed, progress)
    picked = pick_heads(curves.attention)
    report_prefixes(study, curves, *picked)
    return picked


def compute_interventions(study, rows, token_class, heads):     # -> {choice of examples: {...}}
    """The intervention on examples chosen by text alone, and where each head attends."""
    config, model = study.config, study.model
    classes = token_class[rows]
    by_text = find_examples(classes)
    results = {"by text alone": intervene(model, rows, token_class, by_text, heads,
                                          config.n_examples, config.seed)}
    for (layer, h), examples in find_attended(model, rows, classes, heads).items():
        results[f"where {layer}.{h} attends"] = intervene(
            model, rows, token_class, examples, [(layer, h)], config.n_examples, config.seed)
    return results


# ---- the report ----


def report_heads(study, scores):
    """The strongest heads by each score."""
    plain = {}
    for text, by_name in scores.items():
        print(f"\nmean attention on {text}, strongest heads")
        plain[text] = {}
        for name, values in by_name.items():
            n_heads = values.shape[1]
            strongest = [divmod(i, n_heads)
                         for i in values.flatten().argsort(descending=True)[:5].tolist()]
            shown = [f"{layer}.{h} {float(values[layer, h]):.2f}" for layer, h in strongest]
            print(f"{name:>10}  " + "  ".join(shown))
            plain[text][name] = values.tolist()
    write_json(study.folder / "heads.json", plain)
    plot_heads(plain, study.folder / "heads.png")


def report_prefixes(study, curves, first, grows):
    """Attention by prefix length, for the two heads picked and the strongest others."""
    longest = max(LENGTHS)
    statistics = {}
    for name, values in zip(PrefixCurves._fields, curves):
        statistics[name], statistics[f"{name}_ci"] = mean_with_ci(values)
    rise, rise_ci = mean_with_ci(curves.attention[:, longest] - curves.attention[:, 1])
    result = {"n_sequences": study.config.n_sequences, "prefix_lengths": list(LENGTHS),
              "most_after_one": f"{first[0]}.{first[1]}", "grows_most": f"{grows[0]}.{grows[1]}",
              **statistics, "rise": rise, "rise_ci": rise_ci}
    write_json(study.folder / "prefix.json", result)
    plot_prefixes(result, study.folder / "prefix.png")

    mean = curves.attention.mean(0)                                     # (lengths,layers,H)
    strongest = mean[longest].argsort(axis=None)[::-1][:6]
    others = [divmod(int(i), mean.shape[2]) for i in strongest]
    print(f"\nattention to the token after the prefix, by prefix length; "
          f"{study.config.n_sequences} random sequences, the same for all lengths")
    print("head " + "".join(f"{length:6d}" for length in LENGTHS) + "   rise from 1 to 9")
    picked = {first: "  most after one", grows: "  grows most"}
    for layer, h in dict.fromkeys([first, grows, *others]):
        low, high = rise_ci
        print(f"{f'{layer}.{h}':5}" + "".join(f"{a:6.2f}" for a in mean[:, layer, h])
              + "   " + format_ci(rise[layer][h], [low[layer][h], high[layer][h]], "+.2f")
              + picked.get((layer, h), ""))
    reported(study, "5.1 below 0.3 for short prefixes, over 0.7 for long ones; 5.5 already 0.7 for "
             "short")


def report_interventions(study, results, heads):
    """Attention before and after, for every choice of examples and condition."""
    names = [f"{layer}.{h}" for layer, h in heads]
    print(f"\nattention before and after one token is replaced; [95% interval]\n{'examples':22}"
          f"{'replaced':22}{'n':>5}  head  before  after   change")
    for choice, conditions in results.items():
        measured = [name for name in names if choice in ("by text alone", f"where {name} attends")]
        for condition, result in conditions.items():
            for name in measured:
                if name not in result:
                    print(f"{choice:22}{condition:22}{0:5}  {name:5}    n/a: no such place in this "
                          f"text")
                    continue
                r = result[name]
                change = format_ci(r["change"], r["change_ci"], "+.3f")
                print(f"{choice:22}{condition:22}{result['n']:5}  {name:5} {r['before']:6.2f} "
                      f"{r['after']:6.2f}   {change}")
    write_json(study.folder / "intervention.json", {"heads": names, "conditions": results})
    plot_intervention(results, names, study.folder / "intervention.png")
    reported(study, "long prefixes corrupted: 5.1 falls from 0.55 to 0.05, 5.5 stays at 0.43")


if __name__ == "__main__":
    run(main)
