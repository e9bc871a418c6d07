"""The figures: each function takes what a program found and saves one PNG."""

import numpy as np
import torch

from data.common import atomic

COLOURS = ("#0b62a4", "#d1611f", "#3a7d44", "#8a5aa8")      # told apart by colour-blind readers too


def figure(width, height, panels=1, **options):
    """A figure (sizes in inches) with panels side by side, or (rows, columns) of them -> (figure, axes).
    Needs no display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, columns = panels if isinstance(panels, tuple) else (1, panels)
    return plt.subplots(rows, columns, figsize=(width, height), constrained_layout=True, **options)


def save(fig, path):
    """Write a figure to a .png file, whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt
    with atomic(path) as temporary:
        fig.savefig(temporary, dpi=130, format="png")
    plt.close(fig)


# ---- training ----


def plot_training(log, densities, path):
    """Four panels: error, L0, dead features over training; how often features fire. One line per layer."""
    import matplotlib.pyplot as plt
    fig, axes = figure(11, 7.5, panels=(2, 2))
    colours = dict(zip(densities, plt.colormaps["viridis"](np.linspace(0, 0.9, len(densities)))))
    tokens = [line["tokens"] / 1e6 for line in log]
    panels = (("mse", "squared error per token, in units of training"),
              ("l0", "L0: active features per token"), ("dead", "share of dead features"))
    for axis, (key, label) in zip(axes.flat, panels):
        for layer, colour in colours.items():
            axis.plot(tokens, [line[f"L{layer}"][key] for line in log], color=colour, linewidth=1,
                      label=f"layer {layer}")
        axis.set(xlabel="training activations (millions)", ylabel=label, ylim=(0, None))
    for layer, density in densities.items():
        counts, edges = torch.histogram(density.clamp_min(1e-7).log10().float(), bins=50, range=(-7.0, 0.0))
        axes[1, 1].stairs(counts.numpy(), edges.numpy(), color=colours[layer], label=f"layer {layer}")
    axes[1, 1].set(xlabel="share of tokens on which a feature fires", ylabel="features", xticks=range(-7, 1),
                   xticklabels=["never", *(f"$10^{{{k}}}$" for k in range(-6, 0)), "1"])
    axes[0, 0].legend()
    save(fig, path)


# ---- the induction study ----


def plot_heads(scores, path):
    """Three scores of every head, on two texts."""
    fig, axes = figure(12, 3, panels=6)
    pairs = [(text, name) for text in scores for name in scores[text]]
    for ax, (text, name) in zip(axes, pairs):
        image = ax.imshow(scores[text][name], vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        ax.set_title(f"{name}\n{text}", fontsize=8)
        ax.set_xlabel("head")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="mean attention")
    save(fig, path)


def plot_prefixes(found, path):
    """Fig. 4a and 19: every head in grey, the two heads picked in colour, with their intervals."""
    lengths, (fig, axes) = found["prefix_lengths"], figure(9, 3.6, panels=2)
    for ax, name, label in ((axes[0], "attention", "attention to the token after the prefix"),
                            (axes[1], "logit", "direct logit attribution of that token")):
        mean, (low, high) = np.array(found[name]), np.array(found[name + "_ci"])        # (lengths,layers,H)
        ax.plot(lengths, mean.reshape(len(lengths), -1), color="#c8c8c8", linewidth=0.8)
        for kind, colour in zip(("short", "long"), COLOURS):
            layer, h = map(int, found[kind + "_head"].split("."))
            ax.fill_between(lengths, low[:, layer, h], high[:, layer, h], color=colour, alpha=0.25, lw=0)
            ax.plot(lengths, mean[:, layer, h], "o-", color=colour, markersize=4,
                    label=f"{layer}.{h}, {kind} prefix")
        ax.set(xlabel="tokens that match (prefix length)", ylabel=label)
    axes[0].set_ylim(0, 1)
    axes[0].legend()
    fig.suptitle("Prefix length on random tokens (Fig. 4a, 19)", fontsize=10)
    save(fig, path)


def plot_intervention(found, heads, path):
    """Fig. 4b: attention before and after, for each choice of examples and condition."""
    fig, axes = figure(11, 3.6, panels=len(found), sharey=True)
    for ax, (choice, conditions) in zip(axes, found.items()):
        mine = [(colour, head) for colour, head in zip(COLOURS, heads)
                if any(head in r for r in conditions.values())]
        for i, (colour, head) in enumerate(mine):
            for j, one in enumerate(r.get(head) for r in conditions.values()):
                for step, (name, alpha) in enumerate((("before", 0.45), ("after", 1.0)) if one else ()):
                    at = j + (i - (len(mine) - 1) / 2) * 0.44 + (step - 0.5) * 0.2
                    ax.bar(at, one[name], 0.19, color=colour, alpha=alpha,
                           label=f"{head} {name}" if j == 0 else None)
                    ax.vlines(at, *one[name + "_ci"], color="black", linewidth=1)
        names = ["prefix cut\n(k-2)", "other token\n(k+2)", "prefix was 1\n(k-2)"]
        ax.set_xticks(range(3), names, fontsize=8)
        ax.set(title=f"examples {choice}", ylim=(0, 1), xlim=(-0.6, 2.6))
        if mine:
            ax.legend(fontsize=8, ncols=len(mine))
    axes[0].set_ylabel("attention from query to key")
    fig.suptitle("One token of held-out text replaced (Fig. 4b)", fontsize=10)
    save(fig, path)


def plot_lengths(lengths, path):
    """How long the matching prefix is where heads attend, against where text repeats at all."""
    fig, ax = figure(6, 3.6)
    for (choice, counts), colour in zip(lengths.items(), ("#777777", *COLOURS)):
        if sum(counts):
            share = np.array(counts) / sum(counts)
            ax.plot(range(1, len(counts) + 1), share, "o-", color=colour, markersize=4,
                    label=f"{choice} (n = {sum(counts):,})")
    ax.set(xlabel="tokens that match (prefix length)", ylabel="share of places", yscale="log",
           title="Prefix lengths in held-out text (10: 10 or more)")
    ax.legend(fontsize=8)
    save(fig, path)


def plot_feature(f, proxy, title, path):
    """Fig. 2: a feature's activations split by proxy, as counts and weighted by activation."""
    fig, axes = figure(9, 3.4, panels=2)
    bins = np.linspace(0, f.max() if len(f) else 1, 31)
    for ax, weighted, label in ((axes[0], False, "positions"), (axes[1], True, "positions x activation")):
        parts = [f[proxy], f[~proxy]]
        ax.hist(parts, bins, weights=parts if weighted else None, color=COLOURS[:2], histtype="stepfilled",
                alpha=0.7, label=["X followed the token earlier", "it did not"])
        ax.set(xlabel="activation", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].set_title("specificity", fontsize=9)
    axes[1].set_title("expected value", fontsize=9)
    axes[0].legend(fontsize=8)
    fig.suptitle(f"Feature {title} (Fig. 2)", fontsize=10)
    save(fig, path)


# ---- the IOI study ----


def plot_effects(panels, unit, path):
    """One number for every head: {title: (layers,H)}, the first in logits, the others in `unit` and on one
    scale."""
    fig, axes = figure(12, 3.2, panels=len(panels))
    whole = max(abs(np.array(values)).max() for values in list(panels.values())[1:])
    for i, (ax, (title, values)) in enumerate(zip(axes, panels.items())):
        most = max(whole if i else abs(np.array(values)).max(), 1e-9)
        image = ax.imshow(values, vmin=-most, vmax=most, cmap="RdBu", origin="lower", aspect="auto")
        ax.set(title=title, xlabel="head")
        ax.title.set_size(9)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        fig.colorbar(image, ax=ax, label=unit if i else "logits")
    axes[0].set_ylabel("layer")
    save(fig, path)


COLUMNS = {"previous token": 0, "duplicate token": 1, "induction": 1, "S-inhibition": 2, "name mover": 3,
           "negative name mover": 3}


def plot_circuit(found, at_end, at_S2, path):
    """{role: [(layer, head)]}: heads by the position at which they act (columns) and layer (rows), with the
    effect of patching them; arrows from each column to the next that has heads."""
    n_layers, (fig, ax) = len(at_end), figure(8.5, 1.4 + 0.75 * min(len(at_end), 8))
    spots = {column: [] for column in range(4)}
    for role, heads in found.items():
        for layer, h in heads:
            column, effect = COLUMNS[role], at_end[layer, h]
            effect = at_S2[layer, h] if column == 1 else effect
            beside = sum(int(y + 0.01) == layer for _, y in spots[column])
            x, y = column + 0.36 * (beside % 2), layer + 0.9 * (beside // 2) / (1 + len(heads) // 2)
            label = f"{layer}.{h}" + (f"  {effect:+.0%}" if column else "")
            box = {"boxstyle": "round", "color": COLOURS[column], "alpha": 0.6 if "negative" in role else 1.0}
            ax.annotate(label, (x, y), ha="center", va="center", fontsize=8, color="white", bbox=box)
            spots[column].append((x, y))
    columns = [column for column in range(4) if spots[column]]
    for left, right in zip(columns, columns[1:]):
        for x, y in spots[left]:
            for x2, y2 in spots[right]:
                if int(y2) > int(y):
                    ax.annotate("", (x2 - 0.16, y2), (x + 0.16, y), zorder=0,
                                arrowprops={"arrowstyle": "->", "color": "#bbbbbb", "linewidth": 0.8})
    names = ["previous token\n(at S1+1)", "duplicate token,\ninduction (at S2)", "S-inhibition\n(at the end)",
             "name movers\n(at the end)"]
    ax.set_xticks(np.arange(4) + 0.18, names)
    ax.set(ylabel="layer", xlim=(-0.4, 3.8), ylim=(-0.6, n_layers - 0.2), yticks=range(n_layers),
           title="Heads with a role, and what patching them does to the logit difference; arrows: order only")
    ax.title.set_size(10)
    save(fig, path)


def plot_ablations(places, path):
    """Fig. 16: the features that the logit difference hangs on most, by order of names, beside the errors."""
    fig, axes = figure(11, 4, panels=2, sharey=True)
    for ax, (place, r) in zip(axes, places.items()):
        at = np.arange(len(r["features"]))
        for order, colour, side in zip(("ABBA", "BABA"), COLOURS, (-0.2, 0.2)):
            ax.bar(at + side, [one[order] for one in r["features"]], 0.38, color=colour, label=order)
        for i, one in enumerate(r["features"]):
            ax.vlines(i, *one["effect_ci"], color="black", linewidth=1)
        errors = np.arange(len(r["error"])) + len(at) + 0.6
        ax.bar(errors, [mean for mean, _ in r["error"].values()], 0.6, color="#999999",
               label="SAE error removed")
        ax.set_xticks([*at, *errors], [f"{one['layer']}.{one['feature']}" for one in r["features"]]
                      + [f"error {layer}" for layer in r["error"]], rotation=75, fontsize=7)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set_title(f"removed at {place}", fontsize=10)
    axes[0].set_ylabel("change of the logit difference")
    axes[0].legend(fontsize=8)
    fig.suptitle("Features of the IOI circuit (Fig. 16); lines: 95% interval of the mean over all prompts",
                 fontsize=10)
    save(fig, path)


def plot_signal(found, layers, path):
    """Fig. 5 and 14: recovered logit difference by source, for both orders of names."""
    fig, ax = figure(9, 4)
    shown = {name: r for name, r in found.items() if r["recovered"] is not None}
    for i, (name, r) in enumerate(shown.items()):
        for order, colour, side in zip(("ABBA", "BABA"), COLOURS, (-0.2, 0.2)):
            if r[order] is not None:
                ax.bar(i + side, r[order], 0.38, color=colour, label=order if i == 0 else None)
                ax.vlines(i + side, *r[order + "_ci"], color="black", linewidth=1)
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_xticks(range(len(shown)), [name.replace(", ", ",\n") for name in shown], rotation=35, ha="right",
                  fontsize=8)
    ax.set_ylabel("recovered logit difference")
    ax.set_title(f"z_cat of layers {' and '.join(map(str, layers))} at S2 from another prompt (Fig. 5, 14)",
                 fontsize=10)
    ax.margins(y=0.2)
    if shown:
        ax.legend(ncols=2)
    save(fig, path)


def plot_cells(cells, path):
    """Side against position."""
    fig, ax = figure(6, 3.6)
    for i, side in enumerate(("same side", "other side")):
        for j, position in enumerate(("same", "2 tokens", "a sentence")):
            r = cells.get(f"{side}, {position}", {"recovered": None})
            if r["recovered"] is not None:
                ax.bar(j + (i - 0.5) * 0.4, r["recovered"], 0.38, color=COLOURS[i],
                       label=side if j == 0 else None)
                ax.vlines(j + (i - 0.5) * 0.4, *r["recovered_ci"], color="black", linewidth=1)
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_xticks(range(3), ["same position", "moved by 2 tokens", "moved by a sentence"])
    ax.margins(y=0.25)
    ax.set(ylabel="recovered logit difference", title="Side of the connector and position of S1")
    ax.title.set_size(10)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=2)
    save(fig, path)


# ---- features and heads ----


def plot_families(axes, families, contexts, path):
    """Every feature by the context it needs and by how much of it is induction: {layer: (context (n,),
    induction (n,), family (n,))}, a panel a layer."""
    fig, panels = figure(2.9 * len(axes) + 0.6, 3.6, panels=len(axes), sharey=True, squeeze=False)
    colours = (COLOURS[1], "#777777", COLOURS[0], COLOURS[2], COLOURS[3], "white")
    random = np.random.default_rng(0)
    for ax, (layer, (context, induction, family)) in zip(panels.flat, axes.items()):
        for i, (name, colour) in enumerate(zip(families, colours)):
            mine, drawn = family == i, (family == i) & (name != "too rare")
            beside = random.uniform(-0.36, 0.36, drawn.sum())       # so that dots do not hide each other
            ax.plot(context[drawn] + beside, induction[drawn], ".", color=colour, markersize=2.5, alpha=0.7,
                    label=f"{name}: {mine.sum()}" + ", not drawn" * (name == "too rare"))
        ax.set_xticks(range(len(contexts) + 1), [*contexts, f"> {contexts[-1]}"])
        ax.set(xlabel="tokens of context needed", title=f"layer {layer}", ylim=(-0.02, 1.02))
        ax.legend(fontsize=6.5, markerscale=3)
    panels.flat[0].set_ylabel("share of activation read\nafter a copy of the token")
    save(fig, path)


def plot_census(census, choices, similarities, many, path):
    """Roles of every head, by which of its features are looked at ({name: how many}); lines from the lowest
    to the highest threshold of similarity."""
    fig, ax = figure(max(6.0, 0.42 * len(census) + 3), 3.8)
    for i, ((name, n), colour) in enumerate(zip(choices.items(), COLOURS)):
        side = (i - (len(choices) - 1) / 2) * 0.2
        for at, one in enumerate(census):
            values = [one["roles"][name][a] for a in similarities]
            if None in values:
                continue
            low, middle, high = (min(value, 2 * n) for value in values)     # no shared pair: at the top
            ax.vlines(at + side, low, high, color=colour, linewidth=1.2)
            ax.plot(at + side, middle, "o", color=colour, markersize=4,
                    label=name if at == 0 else None)
    ax.axhline(many, color="black", linewidth=0.7, linestyle=":")
    ax.set_xticks(range(len(census)), [one["name"] for one in census], rotation=60, fontsize=8)
    ax.set(yscale="log", ylabel="number of roles",
           title=f"Roles of each head's features from similarity {similarities[1]} on (lines: "
                 f"{similarities[0]} to {similarities[-1]}); above the dotted line polysemantic")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.title.set_size(10)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, path)


# ---- the overview in the README ----


def plot_overview(z_cat, f, feature, moved, constant, tokens, layer, path):
    """z_cat, an SAE of it and DFA, for one feature of one token.

    z_cat (D,); f {feature: activation} of those active; moved (H,k): DFA; constant: with DFA the activation;
    tokens: k texts, of which the last is the one looked at.
    """
    H, reach, most = len(moved), np.abs(moved).max(), np.abs(z_cat).max()
    fig = figure(11, 5.0, panels=(1, 1))[0]
    fig.clear()
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.25))
    axes = top.subplots(1, 2, width_ratios=(1.6, 1))

    strip = axes[0]
    strip.imshow(z_cat[None], cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto",
                 extent=(0, len(z_cat), 0, 1))
    for head in range(H):
        middle = (head + 0.5) * len(z_cat) / H
        strip.vlines(head * len(z_cat) / H, 0, 1, color="black", linewidth=2)
        strip.annotate(f"head {layer}.{head}\n= pattern @ v", (middle, 0), (middle, -0.55), ha="center",
                       va="top", arrowprops={"arrowstyle": "->"}, annotation_clip=False, fontsize=9)
    strip.set(xticks=[], yticks=[], xlim=(-2, len(z_cat)), ylim=(-1.3, 1.0))
    strip.spines[:].set_visible(False)
    strip.set_title(f"z_cat at {tokens[-1]!r}: all heads' outputs side by side, {len(z_cat)} numbers",
                    fontsize=10)

    bars = axes[1]
    names = sorted(f, key=f.get, reverse=True)[:8]
    bars.barh(range(len(names)), [f[name] for name in names],
              color=["#e08214" if name == feature else "#9aa5b1" for name in names])
    bars.set_yticks(range(len(names)), [f"{layer}.{name}" for name in names], fontsize=8)
    bars.invert_yaxis()
    bars.set_title(f"the SAE: z_cat is about a sum of {len(f)} active features", fontsize=10)
    bars.set_xlabel("activation (the strongest of them)", fontsize=8)

    sources, heads = bottom.subplots(1, 2, width_ratios=(3.4, 1), sharey=False)
    image = sources.imshow(moved, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    sources.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], rotation=45, ha="right",
                       fontsize=8)
    sources.set_yticks(range(H), [f"head {layer}.{head}" for head in range(H)], fontsize=8)
    sources.set_title(f"DFA: what feature {layer}.{feature} read, by head and source token", fontsize=10)
    bottom.colorbar(image, ax=sources, pad=0.01)
    values = [*moved.sum(1), constant]
    heads.barh(range(H + 1), values, color=["#e08214" if value >= 0 else "#8073ac" for value in values])
    heads.axvline(0, color="black", linewidth=0.8)
    heads.set_yticks(range(H + 1), [*(f"head {layer}.{head}" for head in range(H)), "constant"], fontsize=8)
    heads.invert_yaxis()
    heads.set_title(f"sum: {sum(values):.2f}, its activation", fontsize=10)
    save(fig, path)
