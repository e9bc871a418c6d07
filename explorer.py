"""A prompt as a circuit: tables, and a page in which every feature can be opened.

    python explorer.py "When Mary and John went to the store, John gave a drink to"

takes the strongest feature of the last token apart, by the formulas of direct.py and
attribution.py, and writes to <out>/<model>/explorer/: explorer.html, where the strongest features
of every token can be opened, and sources.png, which heads brought what from which token.
"""

from dataclasses import dataclass

import torch

from attribution import (FEATURES, Node, Reader, ablation_effects, check_logit, check_node, expand,
                         qk, ratio, read_terms, reader_of, strongest_pairs, strongest_path,
                         trace_prompt, tree_of, unexplained, upstream_features, writer_name)
from data import pages
from data.errors import UserError, run
from data.figures import plot_sources
from data.flags import field, parse_flags
from direct import constant_part, dfa, head_weights, values_minus_bias
from study import StudyConfig, begin, parse_feature

# ---- the program ----


@dataclass(frozen=True)
class ExplorerConfig(StudyConfig):
    prompt: str = field("When Mary and John went to the store, John gave a drink to",
                        "the prompt; BOS is put before it", positional=True)
    feature: str = field("", "the feature to take apart, as layer.feature, or mlp.layer.feature "
                         "for one of a transcoder; empty: the strongest")
    logit: str = field("", "take the logit of this token apart instead of a feature")
    against: str = field("", "less the logit of this token; empty: less the mean over all tokens")
    mlp: bool = field(True, "take MLPs apart, where there are transcoders")
    layer: int = field(-1, "layer in which to look for the strongest; -1: the last that has an "
                       "SAE. With --feature it is not used")
    position: int = field(-1, "where; 1 is the first token after BOS, -1 the last")
    share: float = field(0.03, "a contribution is shown if it is at least this part of the root")
    depth: int = field(3, "levels of the tree on the terminal")
    breadth: int = field(12, "children of each node on the terminal")
    page: bool = field(True, "write the explorer page; a long prompt through a large model takes "
                       "minutes")


def main():
    config = parse_flags(ExplorerConfig, __doc__)
    study = begin(config, "explorer")
    tokens = torch.tensor([study.tokenizer.bos, *study.tokenizer.encode(config.prompt)])
    if len(tokens) < 2:
        raise UserError("the prompt is empty; give some text.")
    transcoders = study.transcoders if config.mlp else {}
    traced = trace_prompt(study.model, study.saes, tokens.to(study.device), transcoders)
    texts = [study.tokenizer.decode([token]) for token in tokens.tolist()]
    root = choose_root(traced, study.tokenizer, config)
    print("\n".join(describe(traced, texts, study.tokenizer, root, config)), flush=True)
    if root.kind == "feature":
        title = f"DFA of {reader_name(root, texts, study.tokenizer)}, by head and source token"
        plot_sources(by_source(traced, root).numpy(), root.layer, texts[:root.position + 1], title,
                     study.folder / "sources.png")
    if config.page:
        print("\nwriting a page to look at every feature of every token ...", flush=True)
        content = explorer_data(traced, texts, study.tokenizer, root)
        results = study.folder.parent
        content["dashboards"] = {
            "feature": layers_with_dashboards(results / "features", study.saes),
            "MLP feature": layers_with_dashboards(results / "mlp" / "features", transcoders)}
        pages.fill("explorer.html", pages.rounded(content), study.folder / "explorer.html")
    print(f"\nwritten to {study.folder}/")


def choose_root(traced, tokenizer, config):                 # -> Reader
    """What the flags name, or the strongest feature there."""
    position = config.position
    if position == -1:
        position = len(traced.tokens) - 1
    if config.logit:
        token = one_token(tokenizer, config.logit, "--logit")
        against = one_token(tokenizer, config.against, "--against") if config.against else -1
        check_logit(traced, position, token, against)
        return Reader("logit", traced.model.config.n_layers, position, token, against)
    kind = "MLP feature" if config.feature.startswith("mlp.") else "feature"
    layer, feature = parse_feature(config.feature.removeprefix("mlp."))
    if feature is None:
        layer = max(traced.saes) if config.layer == -1 else config.layer
        check_node(traced, layer, position, 0)
        f = traced.f[layer][position]
        feature = int(f.argmax())
        if f[feature] == 0:
            raise UserError(f"no feature of layer {layer} is active at position {position}; name "
                            f"one with --feature, or another --position.")
    check_node(traced, layer, position, feature, kind)
    return Reader(kind, layer, position, feature)


def one_token(tokenizer, text, flag):
    """The token of a text. Raises UserError if it is none, or several."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"{flag} {text!r} is {len(ids)} tokens of this model, and one is needed; "
                        f"mind the space before a word.")
    return ids[0]


def layers_with_dashboards(folder, layers):
    """The layers whose dashboards features.py has written, so that the page can link to them."""
    return [layer for layer in layers if any((folder / f"L{layer}").glob("*.js"))]


def explorer_data(traced, texts, tokenizer, root, n_features=15, breadth=12):
    """What the explorer page shows, as plain lists and numbers: for each site (kind, layer,
    position) its strongest features, for each of these and of the features below them the strongest
    children, and for each edge why the head looks there."""
    listed = []                                             # [layer, kind, position, names]
    to_expand = [root]                                      # Readers
    for kind, activations in (("feature", traced.f), ("MLP feature", traced.f_mlp)):
        for layer, f in activations.items():
            for position in range(1, len(texts)):
                strongest = f[position].argsort(descending=True)[:n_features].tolist()
                readers = [Reader(kind, layer, position, i) for i in strongest
                           if f[position, i] > 0]
                listed.append([layer, kind, position, [node_name(one) for one in readers]])
                to_expand += readers

    nodes = {}
    edges = {}
    while to_expand:
        reader = to_expand.pop()
        if node_name(reader) in nodes:
            continue
        # Each feature is the root of a tree of one level; the page multiplies shares along a path.
        terms = read_terms(traced, reader)
        node = Node(reader.kind, reader.layer, reader.position, reader.feature, head=-1,
                    value=terms.pre)
        node = expand(traced, node, terms, 1.0, least=0.0, depth=1, breadth=breadth)
        nodes[node_name(reader)] = node_data(traced, texts, tokenizer, reader, node, terms)
        for child in node.children:
            if child.kind in FEATURES:
                to_expand.append(Reader(child.kind, child.layer, child.position, child.feature))
            edge = f"{node.layer}.{child.head}.{node.position}.{child.position}"
            if child.head >= 0 and child.position >= 0 and edge not in edges:
                edges[edge] = edge_data(traced, node.layer, child.head, node.position,
                                        child.position)
    return {"tokens": texts, "listed": sorted(listed), "nodes": nodes, "qk": edges,
            "start": node_name(root)}


def node_name(node):                                        # Reader or Node -> text
    """What the page calls a feature at a position, or a logit."""
    return f"{node.kind} {node.layer}.{node.feature} at {node.position}"


def node_data(traced, texts, tokenizer, reader, node, terms):   # -> dict
    """One feature at one position, or a logit, for the page."""
    is_constant = terms.component < 0
    children = []
    for child in node.children:
        is_open = child.kind in FEATURES
        edge = None
        if child.head >= 0 and child.position >= 0:
            edge = f"{node.layer}.{child.head}.{node.position}.{child.position}"
        children.append({"label": writer_at(child, texts), "via": via(node, child),
                         "name": node_name(child) if is_open else None, "edge": edge,
                         "value": child.value})
    found = {"title": reader_name(reader, texts, tokenizer), "position": node.position,
             "pre": node.value, "pruned": node.pruned, "n_pruned": node.n_pruned,
             "error": node.error, "mlp": node.mlp,
             "constant": float(terms.value[is_constant].sum()), "children": children}
    if node.kind == "logit":
        return found
    found |= {"layer": node.layer, "feature": node.feature, "kind": node.kind,
              "label": f"{node.layer}.{node.feature}"}
    if node.kind == "MLP feature":
        return found | {"f": float(traced.f_mlp[node.layer][node.position, node.feature])}
    n_heads = traced.model.config.n_heads
    by_head = [float(terms.value[(terms.head == h) & ~is_constant].sum()) for h in range(n_heads)]
    weights = head_weights(traced.saes[node.layer].W_dec[node.feature], n_heads)
    return found | {"f": float(traced.f[node.layer][node.position, node.feature]),
                    "heads": by_head, "weights": weights.tolist()}


def edge_data(traced, layer, head, query, key, n_pairs=6):
    """Why a head looks from one position at another, for the page."""
    why = qk(traced, layer, head, query, key, against="others")
    pairs = [{"query": writer_name(*a), "key": writer_name(*b), "value": value}
             for a, b, value in strongest_pairs(why, n_pairs)]
    return {"score": why.score, "weight": float(traced.cache[layer].pattern[0, head, query, key]),
            "pairs": pairs}


# ---- the report ----


def writer_at(node, texts):
    """What a node is, in words, and at which token it was written."""
    name = writer_name(node.kind, node.layer, node.feature)
    if node.position < 0:
        return name
    return f"{name} at {node.position} {texts[node.position]!r}"


def via(node, child):
    """How a child reaches its parent, in words."""
    head = f"head {node.layer}.{child.head}"
    if child.head < 0 and child.position < 0:
        return ": of the final norm" if node.kind == "logit" else ": the feature's bias"
    if child.position < 0:
        return f": the values of {head}"
    return f" through {head}" if child.head >= 0 else ""


def reader_name(reader, texts, tokenizer):
    """What is taken apart, in words."""
    where = f"at {reader.position} {texts[reader.position]!r}"
    if reader.kind != "logit":
        return f"{reader.kind} {reader.layer}.{reader.feature} {where}"
    less = "the mean of all"
    if reader.against >= 0:
        less = f"that of {tokenizer.decode([reader.against])!r}"
    return f"logit of {tokenizer.decode([reader.feature])!r} less {less} {where}"


def describe(traced, texts, tokenizer, root, config):       # -> lines
    """What is taken apart, in tables: what else is active there; its heads, sources and tree; what
    removing the features below it does; and why a head looks where the strongest child of the root
    was written."""
    position = root.position
    lines = [" ".join(f"{i}:{text!r}" for i, text in enumerate(texts)), ""]
    for kind, activations in (("", traced.f), ("MLP ", traced.f_mlp)):
        for layer, f in activations.items():
            strongest = f[position].argsort(descending=True)[:6].tolist()
            shown = [f"{layer}.{i} {float(f[position, i]):.3f}"
                     for i in strongest if f[position, i] > 0]
            lines.append(f"active at {position} in {kind}layer {layer}:  " + "  ".join(shown))
    lines += ["", f"{reader_name(root, texts, tokenizer)}: {describe_value(traced, root)}", ""]
    if root.kind == "feature":
        lines += describe_dfa(traced, texts, root) + [""]
    tree = tree_of(traced, root, config.share, config.depth, config.breadth)
    lines.append(f"recursive DFA, in units of the root's {tree.value:.4f}:")
    lines += describe_children(texts, tree, tree.value)
    lines += ["", *describe_unexplained(traced, root)]
    lines += describe_ablations(traced, texts, root)
    lines += describe_path(traced, texts, root)
    read_by_heads = [child for child in tree.children if child.head >= 0 and child.position >= 0]
    if read_by_heads:
        first = read_by_heads[0]
        lines += describe_qk(traced, texts, root.layer, first.head, position, first.position)
    return lines


def describe_value(traced, root):
    """The pre-activation and the activation of a feature, or the logit."""
    value = read_terms(traced, root).pre
    if root.kind == "logit":
        return f"{value:+.4f}"
    activations = traced.f if root.kind == "feature" else traced.f_mlp
    f = float(activations[root.layer][root.position, root.feature])
    return f"pre-activation {value:.4f}, activation {f:.4f}"


def by_source(traced, root):                                # -> (H,k)
    """DFA of an attention feature: what each head brought from each position up to its own."""
    kept = traced.cache[root.layer]
    v = values_minus_bias(traced.model, root.layer, kept.v)
    moved = dfa(kept.pattern, v, traced.saes[root.layer].W_enc[:, root.feature])    # (1,H,q,k)
    return moved[0, :, root.position, :root.position + 1].cpu()


def describe_dfa(traced, texts, root):
    """Heads, by DFA and by weights, and the strongest sources."""
    layer = root.layer
    sae = traced.saes[layer]
    moved = by_source(traced, root)                                     # (H,k)
    weights = head_weights(sae.W_dec[root.feature], len(moved))
    constant = float(constant_part(traced.model, layer, sae)[root.feature])
    lines = ["head         DFA   share of decoder"]
    for h, total in enumerate(moved.sum(1).tolist()):
        lines.append(f"{f'{layer}.{h}':8} {total:8.4f}  {float(weights[h]):8.1%}")
    lines += [f"constant {constant:8.4f}", "", "sources by DFA:"]
    all_heads = moved.sum(0)
    for k in all_heads.abs().argsort(descending=True)[:5].tolist():
        h = int(moved[:, k].abs().argmax())
        lines.append(f"{k:4d} {texts[k]!r:16} {float(all_heads[k]):8.4f}   of which head "
                     f"{layer}.{h} {float(moved[h, k]):.4f}")
    return lines


def describe_children(texts, node, total, indent="  "):
    """The tree below a node as indented lines. Numbers are shares of the root, `total`; only
    "errors" and "MLP outputs", in a line of smaller ones, are shares of that line's node, and count
    the children shown too."""
    lines = []
    for child in node.children:
        share = ratio(child.value, total)
        lines.append(f"{indent}{share:+7.1%}  {writer_at(child, texts)}{via(node, child)}")
        lines += describe_children(texts, child, total, indent + "    ")
    if node.n_pruned and node.children:
        lines.append(f"{indent}{ratio(node.pruned, total):+7.1%}  {node.n_pruned} smaller ones; of "
                     f"this node, errors are {node.error:.1%}, MLP outputs {node.mlp:.1%}")
    return lines


def describe_unexplained(traced, root):
    """What ends in errors and in outputs that are not taken apart; with transcoders, what did so
    without them too."""
    ends = unexplained(traced, root)
    lines = [f"over all paths, {ends.share:.1%} of the leaves, by size, are errors or outputs not "
             f"taken apart; they are {ends.of_root:.0%} of the root"]
    if traced.transcoders and root.kind != "MLP feature":
        whole = unexplained(trace_prompt(traced.model, traced.saes, traced.tokens), root)
        lines.append(f"(without transcoders {whole.share:.1%}, and {whole.of_root:.0%})")
    return lines


def describe_ablations(traced, texts, root, n=3):
    """The features below with the largest attribution, and what ablating each does. Attribution has
    the direct step alone; ablation has every path."""
    rows, attributed = upstream_features(traced, root)
    rows, attributed = rows[:n], attributed[:n]
    if not len(rows):
        return []
    lines = ["", "the strongest features below it, removed from the model one at a time, nothing "
             "frozen:"]
    drops = ablation_effects(traced, rows, root).tolist()
    for row, value, drop in zip(rows.tolist(), attributed.tolist(), drops):
        writer = reader_of(traced.components, row)
        lines.append(f"{writer_at(writer, texts)}: attributed {value:+.4f} directly, and the root "
                     f"falls by {drop:+.4f}")
    return lines


def describe_path(traced, texts, root):
    """The strongest path back to a token, and for each step what removing the feature that is read
    does to the one that reads it."""
    lines = ["", "the strongest path back; each line is read by the one before it:"]
    for step in strongest_path(traced, root):
        writer = reader_of(traced.components, step.row)
        through = "" if step.head < 0 else f" through head {step.reader.layer}.{step.head}"
        line = f"{writer_at(writer, texts)}{through}: {step.value:+.4f} of {step.pre:.4f}"
        if writer.kind in FEATURES:
            row = traced.tokens.new_tensor([step.row])
            drop = float(ablation_effects(traced, row, step.reader))
            line += f"; removed, the reader falls by {drop:+.4f}"
        lines.append(line)
    return lines


def describe_qk(traced, texts, layer, head, query, key):
    """Why a head looks where it looks."""
    why = qk(traced, layer, head, query, key, against="others")
    lines = ["", f"why head {layer}.{head} looks from {query} at {key} {texts[key]!r}: its score "
             f"is {why.score:+.2f} above the mean over other keys; the strongest pairs:"]
    for a, b, value in strongest_pairs(why, 6):
        lines.append(f"{value:+8.3f}   {writer_name(*a)}  x  {writer_name(*b)}")
    return lines


if __name__ == "__main__":
    run(main)
