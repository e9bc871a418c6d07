"""Pages to open in a browser, from file://, with nothing fetched from elsewhere: a template and its data.

The dashboards are one page, index.html, with the table of all features in it, and files L<layer>/<number>.js
with 64 features each, which the page loads when one of them is opened: thousands of features cost no more
than those that are looked at.
"""

import json
from pathlib import Path

import torch

from data.common import atomic

CHUNK = 64


def fill(template, content, path):
    """Write data/<template> to `path` with `content`, plain lists and numbers, where it says __DATA__."""
    page = (Path(__file__).parent / template).read_text(encoding="utf8")
    content = json.dumps(content, allow_nan=False, separators=(",", ":"))
    with atomic(path) as temporary:
        # inside a script element only "<" could end it
        temporary.write_text(page.replace("__DATA__", content.replace("<", "\\u003c")), encoding="utf8")


def write_features(folder, layer, tokens, kept, top, spread, records, before):
    """The files of one layer. tokens (R,T); kept: what data.keep collected; top, spread: what features.py
    shows of these places, `before` tokens before each; records: the features in plain numbers."""
    lists = [examples(tokens, entries, shown, kept.largest, before, sources) for entries, shown, sources in
             ((kept.top, top, True), (kept.spread, spread, False))]
    H = top.total.shape[1]
    dfa = torch.zeros(len(kept.n), H).index_add_(0, kept.top.feature, top.total / kept.top.f[:, None])
    dfa /= torch.bincount(kept.top.feature, minlength=len(kept.n)).clamp_min(1)[:, None]
    chunks = {}
    for r in records:
        i, tenths = r["feature"], {}
        for e in lists[1].get(i, []):
            tenths.setdefault(min(int(10 * e[2] / r["largest"]), 9), []).append(e)
        chunks.setdefault(i // CHUNK, {})[i] = {
            **{name: r[name] for name in ("family", "evidence", "cut", "replaced", "raises", "lowers")},
            "facts": f"Active at {r['n']:,} places of {tokens[:, 1:].numel():,} ({r['frequency']:.2%}); "
                     f"activation {r['mean']:.3g} on average where active, {r['largest']:.3g} at most.",
            "explorer": f'to take it apart in a prompt: python attribution.py "..." --feature {layer}.{i}',
            "weights": r["head_weights"], "dfa": [round(x, 3) for x in dfa[i].tolist()],
            "counts": kept.counts[i, :int(kept.counts[i].nonzero().max()) + 1].tolist(),
            "width": float(kept.width[i]), "top": lists[0][i],
            "tenths": [[f"{10 * t} to {10 * t + 10}% of the largest", tenths[t]]
                       for t in sorted(tenths, reverse=True)]}
    for number, chunk in chunks.items():
        content = json.dumps(chunk, allow_nan=False, separators=(",", ":"))
        with atomic(folder / f"L{layer}" / f"{number}.js") as temporary:
            temporary.write_text(f"receive({layer},{number},{content});\n", encoding="utf8")


def examples(tokens, entries, shown, largest, before, with_sources):    # -> {feature: [example, ...]}
    """Places as the page reads them, in the order of entries.

    An example is [row, q, f, first position, token ids, activations, sources, DFA by head, copies].
    Activations are in hundredths of the feature's largest, -1 at BOS; sources are [k, ids around k, DFA by
    head], those of a hundredth of f or more; DFA is in thousandths of f. Places with the same text up to q
    are shown once, and copies counts the others.
    """
    lists, seen, T = {}, {}, tokens.shape[1]
    thousandths = lambda x: (1000 * x / entries.f.view(-1, *[1] * (x.dim() - 1))).round().long().tolist()
    shades = 100 * shown.window.float() / largest[entries.feature, None]
    shades = shades.nan_to_num(-1).round().long().tolist()
    by_head, total = (thousandths(x) for x in (shown.by_head, shown.total)) if with_sources else (None, None)
    sources = shown.sources.tolist()
    for n, (row, q, feature, f) in enumerate(zip(*(column.tolist() for column in entries))):
        first, text = max(q - before, 0), tokens[row].tolist()
        skip = first - (q - before)
        ids = text[first:first + len(shades[n]) - skip]
        key = (feature, *ids[:q - first + 1])
        if key in seen:
            seen[key][8] += 1
            continue
        example = [row, q, float(f"{f:.4g}"), first, ids, shades[n][skip:skip + len(ids)], [], [], 0]
        if with_sources:
            example[7] = total[n]
            example[6] = [[k, [text[k - 1] if k else -1, text[k], text[k + 1] if k + 1 < T else -1], dfa]
                          for k, dfa in zip(sources[n], by_head[n]) if k >= 0 and abs(sum(dfa)) >= 10]
        seen[key] = example
        lists.setdefault(feature, []).append(example)
    return lists
