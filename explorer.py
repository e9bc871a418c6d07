"""A prompt as a circuit: tables, and a page in which every feature can be opened.

    python explorer.py "When Mary and John went to the store, John gave a drink to"

takes the strongest feature of the last token apart, by the formulas of direct.py and
attribution.py, and writes to <out>/<model>/explorer/: explorer.html, where the strongest features
of every token can be opened, and sources.png, which heads brought what from which token.
"""

from dataclasses import dataclass

import torch

from attribution import (FEATURES, Node, Place, ablation_effects, check_place, ends, expand, qk,
                         ratio, read_terms, strongest_pairs, strongest_path, trace, trace_prompt,
                         unexplained_share, upstream_features)
from data import pages
from data.errors import UserError, run
from data.figures import plot_sources
from data.files import read_json
from data.flags import field, parse_flags
from data.weights import digest
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


def choose_root(traced, tokenizer, config):                 # -> Place
    """What the flags name, or the strongest feature there."""
    position = config.position
    if position == -1:
        position = len(traced.tokens) - 1
    if config.logit and config.feature:
        raise UserError("--logit and --feature ask for two things at once; give one.")
    if config.logit:
        token = tokenizer.single(config.logit, "--logit")
        against = tokenizer.single(config.against, "--against") if config.against else -1
        root = Place("logit", traced.model.config.n_layers, position, token, against)
        check_place(traced, root)
        return root
    if config.against:
        raise UserError("--against is for --logit: name the token whose logit it is less than.")
    kind = "MLP feature" if config.feature.startswith("mlp.") else "feature"
    layer, feature = parse_feature(config.feature.removeprefix("mlp."))
    if feature is None and config.feature:
        raise UserError(f"--feature {config.feature} names no feature; one of a transcoder is "
                        f"written mlp.0.271.")
    if feature is None:
        layer = max(traced.saes) if config.layer == -1 else config.layer
        check_place(traced, Place("feature", layer, position, feature=0))
        f = traced.f[layer][position]
        feature = int(f.argmax())
        if f[feature] == 0:
            raise UserError(f"no feature of layer {layer} is active at position {position}; name "
                            f"one with --feature, or another --position.")
    root = Place(kind, layer, position, feature)
    check_place(traced, root)
    return root


def layers_with_dashboards(folder, dictionaries):           # Path, {layer: SAE} -> [layer]
    """The layers of which features.py has written dashboards, of these very SAEs or transcoders,
    so that the page can link to them."""
    layers = []
    for layer, sae in dictionaries.items():
        of_layer = folder / f"L{layer}"
        if any(of_layer.glob("*.js")) and \
                read_json(of_layer / "features.json").get("sae") == digest(sae):
            layers.append(layer)
    return layers


def explorer_data(traced, texts, tokenizer, root, n_features=15, breadth=12):
    """What the explorer page shows, as plain lists and numbers: for each site (kind, layer,
    position) its strongest features, for each of these and of the features below them the strongest
    children, and for each edge why the head looks there."""
    listed = []                                             # [layer, kind, position, names]
    to_expand = [root]                                      # Places
    for kind, activations in (("feature", traced.f), ("MLP feature", traced.f_mlp)):
        for layer, f in activations.items():
            for position in range(1, len(texts)):
                strongest = f[position].argsort(descending=True)[:n_features].tolist()
                there = [Place(kind, layer, position, i) for i in strongest if f[position, i] > 0]
                listed.append([layer, kind, position, [page_name(one) for one in there]])
                to_expand += there

    nodes = {}
    edges = {}
    while to_expand:
        place = to_expand.pop()
        if page_name(place) in nodes:
            continue
        # Each feature is the root of a tree of one level; the page multiplies shares along a path.
        terms = read_terms(traced, place)
        node = expand(traced, Node(place, head=-1, value=terms.pre), terms, C=1.0, least=0.0,
                      depth=1, breadth=breadth)
        nodes[page_name(place)] = node_data(traced, texts, tokenizer, node, terms)
        for child in node.children:
            if child.place.kind in FEATURES:
                to_expand.append(child.place)
            edge = edge_key(node, child)
            if edge is not None and edge not in edges:
                edges[edge] = edge_data(traced, place.layer, child.head, place.position,
                                        child.place.position)
    return {"tokens": texts, "listed": sorted(listed), "nodes": nodes, "qk": edges,
            "start": page_name(root)}


def page_name(place):
    """What the page calls a place."""
    return f"{place.kind} {place.layer}.{place.feature} at {place.position}"


def edge_key(node, child):
    """What the page calls the look of a head from a node to a child; None if no head reads it."""
    if child.head < 0 or child.place.position < 0:
        return None
    return f"{node.place.layer}.{child.head}.{node.place.position}.{child.place.position}"


def node_data(traced, texts, tokenizer, node, terms):       # -> dict
    """One feature at one position, or a logit, for the page."""
    place = node.place
    is_constant = terms.component < 0
    children = []
    for child in node.children:
        name = page_name(child.place) if child.place.kind in FEATURES else None
        children.append({"label": name_at(child.place, texts), "via": via(node, child),
                         "name": name, "edge": edge_key(node, child), "value": child.value})
    found = {"kind": place.kind, "title": reader_name(place, texts, tokenizer),
             "position": place.position, "pre": node.value, "pruned": node.pruned,
             "n_pruned": node.n_pruned, "unexplained": node.unexplained,
             "constant": float(terms.value[is_constant].sum()), "children": children}
    if place.kind == "logit":
        return found
    found |= {"layer": place.layer, "feature": place.feature,
              "label": f"{place.layer}.{place.feature}", "f": traced.activation(place)}
    if place.kind == "MLP feature":
        return found
    n_heads = traced.model.config.n_heads
    by_head = [float(terms.value[(terms.head == h) & ~is_constant].sum()) for h in range(n_heads)]
    weights = head_weights(traced.saes[place.layer].W_dec[place.feature], n_heads)
    return found | {"heads": by_head, "weights": weights.tolist()}


def edge_data(traced, layer, head, query, key, n_pairs=6):
    """Why a head looks from one position at another, for the page."""
    why = qk(traced, layer, head, query, key, against="others")
    pairs = [{"query": a.name(), "key": b.name(), "value": value}
             for a, b, value in strongest_pairs(why, n_pairs)]
    return {"score": why.score, "weight": float(traced.cache[layer].pattern[0, head, query, key]),
            "pairs": pairs}


# ---- the report ----


def name_at(place, texts):
    """What stands at a place, in words, and at which token."""
    if place.position < 0:
        return place.name()
    return f"{place.name()} at {place.position} {texts[place.position]!r}"


def via(node, child):
    """How a child reaches its parent, in words."""
    head = f"head {node.place.layer}.{child.head}"
    is_constant = child.place.position < 0
    if child.head < 0 and is_constant:
        return ": of the final norm" if node.place.kind == "logit" else ": the feature's bias"
    if is_constant:
        return f": the values of {head}"
    return f" through {head}" if child.head >= 0 else ""


def reader_name(place, texts, tokenizer):
    """What is taken apart, in words."""
    if place.kind != "logit":
        return name_at(place, texts)
    less = "the mean of all"
    if place.against >= 0:
        less = f"that of {tokenizer.decode([place.against])!r}"
    return (f"logit of {tokenizer.decode([place.feature])!r} less {less} at {place.position} "
            f"{texts[place.position]!r}")


def describe(traced, texts, tokenizer, root, config):       # -> lines
    """What is taken apart, in tables: what else is active there; its heads, sources and tree; what
    removing the features below it does; its strongest path back; and why the first head on that
    path looks there."""
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
    tree = trace(traced, root, config.share, config.depth, config.breadth)
    lines.append(f"recursive DFA, in units of the root's {tree.value:.4f}:")
    lines += describe_children(texts, tree, tree.value)
    lines += ["", *describe_ends(traced, root, tree.value)]
    lines += describe_ablations(traced, texts, root)
    path = strongest_path(traced, root)
    lines += describe_path(traced, texts, path)
    through_heads = [step for step in path if step.by_head]
    if through_heads:
        step = through_heads[0]
        lines += describe_qk(traced, texts, step.reader.layer, next(iter(step.by_head)),
                             step.reader.position, traced.components.place(step.row).position)
    return lines


def describe_value(traced, root):
    """The pre-activation and the activation of a feature, or the logit."""
    value = read_terms(traced, root).pre
    if root.kind == "logit":
        return f"{value:+.4f}"
    return f"pre-activation {value:.4f}, activation {traced.activation(root):.4f}"


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
    """The tree below a node as indented lines, in shares of the root, `total`. Unexplained is over
    all children, shown or not."""
    lines = []
    for child in node.children:
        share = ratio(child.value, total)
        lines.append(f"{indent}{share:+7.1%}  {name_at(child.place, texts)}{via(node, child)}")
        lines += describe_children(texts, child, total, indent + "    ")
    if node.n_pruned:
        says_nothing = ratio(node.unexplained, total)
        lines.append(f"{indent}{ratio(node.pruned, total):+7.1%}  {node.n_pruned} smaller ones "
                     f"(of all that is read here, {says_nothing:+.1%} is unexplained)")
    return lines


def describe_ends(traced, root, total):
    """What all paths end in; with transcoders, what they ended in without them too."""
    found = ends(traced, root)
    lines = ["what all paths end in, in units of the root:    net   by size"]
    for what, (net, size) in found.items():
        lines.append(f"{what:44} {ratio(net, total):+7.1%} {ratio(size, abs(total)):9.1%}")
    last = (f"unexplained, errors and outputs not taken apart: {unexplained_share(found):.1%} by "
            f"size")
    if traced.transcoders and root.kind != "MLP feature":
        whole = ends(trace_prompt(traced.model, traced.saes, traced.tokens), root)
        last += f"; without transcoders {unexplained_share(whole):.1%}"
    return [*lines, last]


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
        name = name_at(traced.components.place(row), texts)
        lines.append(f"{name}: attributed {value:+.4f} directly, and the root "
                     f"falls by {drop:+.4f}")
    return lines


def describe_path(traced, texts, path, n_heads=2):
    """Each step back, in units of the one that reads, and what removing the feature that is read
    does to that one."""
    if not path:
        return []
    lines = ["", "the strongest path back; each line is what contributes most to the one before:"]
    for step in path:
        writer = traced.components.place(step.row)
        line = f"{name_at(writer, texts)}: {step.value:+.4f} of {step.pre:.4f}"
        heads = [f"{step.reader.layer}.{head} {value:+.2f}"
                 for head, value in list(step.by_head.items())[:n_heads]]
        if heads:
            line += f" (heads {', '.join(heads)})"
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
        lines.append(f"{value:+8.3f}   {a.name()}  x  {b.name()}")
    return lines


if __name__ == "__main__":
    run(main)
