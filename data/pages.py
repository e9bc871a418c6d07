"""Pages to open in a browser, from file://, with nothing fetched from elsewhere: a template and its
data.

The dashboards are one page, index.html, with the table of all features in it, and files
L<layer>/<number>.js with 64 features each, which the page loads when one of them is opened:
thousands of features cost no more than those that are looked at. heads.js, which heads.py writes,
is loaded in the same way.
"""

import json
from pathlib import Path

import torch

from data.files import write_text

CHUNK = 64                  # features in a file


def to_json(content):
    """JSON without spaces. Raises ValueError for NaN and infinity, which it lacks."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def rounded(value):
    """Floats with five significant digits, so that a page stays small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return value


def fill(template, content, path):
    """Write data/<template> to `path` with `content`, plain lists and numbers, where it says
    __DATA__."""
    page = (Path(__file__).parent / template).read_text(encoding="utf8")
    # inside a script element only "<" could end it
    write_text(path, page.replace("__DATA__", to_json(content).replace("<", "\\u003c")))


def write_script(path, function, *arguments):
    """A script that hands its data to a function of the page that loads it."""
    write_text(path, f"{function}({','.join(map(to_json, arguments))});\n")


# ---- the dashboards of one layer's features ----


def write_features(folder, layer, tokens, of_layer, records, n_before):
    """The files of one layer.

    tokens (R,T); of_layer: a features.LayerCollection, with `n_before` tokens before each place;
    records: the features in plain numbers.
    """
    collected = of_layer.collected
    top = examples(tokens, collected.top, of_layer.top, collected.largest, n_before, True)
    spread = examples(tokens, collected.spread, of_layer.spread, collected.largest, n_before, False)
    dfa = dfa_shares(collected, of_layer.top)
    of_heads = dfa.shape[1] > 0                             # not a transcoder's
    n_tokens = tokens[:, 1:].numel()
    chunks = {}
    for record in records:
        i = record["feature"]
        chunks.setdefault(i // CHUNK, {})[i] = {
            **{name: record[name] for name in ("family", "after_copy", "chance", "X", "X_share",
                                               "context_kept", "raises", "lowers")},
            "facts": f"Active at {record['n']:,} places of {n_tokens:,} "
                     f"({record['frequency']:.2%}); activation {record['mean']:.3g} on average "
                     f"where active, {record['largest']:.3g} at most.",
            "explorer": f'to take it apart in a prompt: python explorer.py "..." --feature '
                        f'{"" if of_heads else "mlp."}{layer}.{i}',
            "weights": record["head_weights"],
            "dfa": [round(share, 3) for share in dfa[i].tolist()],
            "counts": collected.counts[i].tolist(),
            "top": top[i],
            "tenths": by_tenth(spread.get(i, []), record["largest"])}
    for number, chunk in chunks.items():
        write_script(folder / f"L{layer}" / f"{number}.js", "receive", layer, number, chunk)


def dfa_shares(collected, shown):                           # -> (d_sae,H)
    """Each head's part of a feature's strongest activations: a ratio of sums."""
    feature = collected.top.feature
    d_sae = len(collected.n)
    total = torch.zeros(d_sae).index_add_(0, feature, collected.top.f)
    by_head = torch.zeros(d_sae, shown.total.shape[1]).index_add_(0, feature, shown.total)
    return by_head / total.clamp_min(1e-30)[:, None]


def by_tenth(spread, largest):                              # -> [[title, examples], ...]
    """Examples under the tenth of the feature's range that they come from, the highest first."""
    tenths = {}
    for example in spread:
        tenths.setdefault(min(int(10 * example["f"] / largest), 9), []).append(example)
    return [[f"{10 * tenth} to {10 * tenth + 10}% of the largest", tenths[tenth]]
            for tenth in sorted(tenths, reverse=True)]


def examples(tokens, entries, shown, largest, n_before, with_sources):  # -> {feature: [dict, ...]}
    """Places as the page reads them, in the order of entries.

    Each has its row and position q; f; the position of the first token shown, `ids`; `shades`,
    activations in hundredths of the feature's largest, -1 at BOS; and, with_sources, the DFA by
    head in thousandths of f: `total`, and `sources` with the ids around k, for those of a hundredth
    of f or more. Places with the same text up to q are shown once; `copies` counts the others.
    """
    T = tokens.shape[1]
    shades = 100 * shown.window.float() / largest[entries.feature, None]
    shades = shades.nan_to_num(-1).round().long().tolist()
    f = entries.f[:, None]
    total = (1000 * shown.total / f).round().long().tolist()
    by_head = (1000 * shown.by_head / f[:, None]).round().long().tolist()
    sources = shown.sources.tolist()

    lists = {}
    seen = {}
    columns = (column.tolist() for column in entries)
    for n, (row, q, feature, activation) in enumerate(zip(*columns)):
        text = tokens[row].tolist()
        first = max(q - n_before, 0)
        n_missing = first - (q - n_before)                  # the window begins before the row
        shades_here = shades[n][n_missing:]
        ids = text[first:first + len(shades_here)]
        text_up_to_q = (feature, *ids[:q - first + 1])
        if text_up_to_q in seen:
            seen[text_up_to_q]["copies"] += 1
            continue
        example = {"row": row, "q": q, "f": float(f"{activation:.4g}"), "first": first, "ids": ids,
                   "shades": shades_here[:len(ids)], "sources": [], "total": [], "copies": 0}
        if with_sources:
            example["total"] = total[n]
            for k, dfa in zip(sources[n], by_head[n]):
                if k >= 0 and abs(sum(dfa)) >= 10:
                    around = [text[k - 1] if k > 0 else -1, text[k],
                              text[k + 1] if k + 1 < T else -1]
                    example["sources"].append({"k": k, "around": around, "dfa": dfa})
        seen[text_up_to_q] = example
        lists.setdefault(feature, []).append(example)
    return lists
