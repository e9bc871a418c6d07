"""Pages to open in a browser, from file://, with nothing fetched from elsewhere: a template and its data.

The dashboards are one page, index.html, with the table of all features in it, and files L<layer>/<number>.js
with 64 features each, which the page loads when one of them is opened: thousands of features cost no more
than those that are looked at.
"""

import json
from pathlib import Path

import numpy as np

from data.common import atomic

CHUNK = 64


def fill(template, content, path):
    """Write data/<template> to `path` with `content`, plain lists and numbers, where it says __DATA__."""
    page = (Path(__file__).parent / template).read_text(encoding="utf8")
    content = json.dumps(content, allow_nan=False, separators=(",", ":"))
    with atomic(path) as temporary:
        # inside a script element only "<" could end it
        temporary.write_text(page.replace("__DATA__", content.replace("<", "\\u003c")), encoding="utf8")


def write_chunks(folder, layer, records):
    """records: {feature: what the page shows of it}, as index.html reads them."""
    by_chunk = {}
    for feature, record in records.items():
        by_chunk.setdefault(feature // CHUNK, {})[feature] = record
    for number, chunk in by_chunk.items():
        content = json.dumps(chunk, allow_nan=False, separators=(",", ":"))
        with atomic(folder / f"L{layer}" / f"{number}.js") as temporary:
            temporary.write_text(f"receive({layer},{number},{content});\n", encoding="utf8")


def example_lists(tokens, entries, shown, largest, before, after, with_sources):
    """Examples of each feature as the page reads them -> {feature: [example, ...]}, in the order of entries.

    An example is [row, q, f, first position, token ids, activations, sources, DFA by head, copies].
    Activations are in hundredths of the feature's largest, and null outside the row; sources are [k, ids
    around k, DFA by head] and, like all DFA, in thousandths of f. Places with the same text up to q are shown
    once; copies counts the others.
    """
    tokens, T, lists, seen = tokens.numpy(), tokens.shape[1], {}, {}
    row, q, feature = (column.numpy() for column in entries[:3])
    f, top = entries.f.double().numpy(), largest.double().numpy()
    window = shown.window.float().numpy() / top[feature][:, None]
    hundredths = np.nan_to_num(np.rint(100 * window), nan=-1).astype(int)
    thousandths = lambda x: np.rint(1000 * x / f.reshape(-1, *[1] * (x.ndim - 1))).astype(int)
    if with_sources:
        by_head, total = (thousandths(x.double().numpy()) for x in (shown.by_head, shown.total))
        sources = shown.sources.numpy()
    for n in range(len(f)):
        first, end = max(int(q[n]) - before, 0), min(int(q[n]) + after + 1, T)
        ids = tokens[row[n], first:end].tolist()
        key = (int(feature[n]), *ids[:int(q[n]) - first + 1])
        if key in seen:
            seen[key][8] += 1
            continue
        skip = first - (int(q[n]) - before)
        shades = hundredths[n, skip:skip + len(ids)].tolist()
        example = [int(row[n]), int(q[n]), float(f"{f[n]:.4g}"), first, ids, shades, [], [], 0]
        if with_sources:
            example[7] = total[n].tolist()
            for k, dfa in zip(sources[n].tolist(), by_head[n].tolist()):
                if k >= 0 and abs(sum(dfa)) >= 10:          # a hundredth of f or more
                    around = [int(tokens[row[n], j]) if 0 <= j < T else -1 for j in range(k - 1, k + 2)]
                    example[6].append([k, around, dfa])
        seen[key] = example
        lists.setdefault(int(feature[n]), []).append(example)
    return lists
