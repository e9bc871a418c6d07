"""The figures: each function takes what a program computed and saves one PNG.

They are drawn on `Figure` objects without pyplot, so that no display is needed and a notebook's own
plots stay as they are.
"""

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from data.files import atomic

COLOURS = ("#0b62a4", "#d1611f", "#3a7d44", "#8a5aa8")      # colour-blind readers tell them apart


def figure(width, height, panels=1, **options):
    """A figure (sizes in inches) with panels side by side, or (rows, columns) of them -> (figure,
    axes)."""
    rows, columns = panels if isinstance(panels, tuple) else (1, panels)
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def save(fig, path):
    """Write a figure to a .png file, whole or not at all."""
    with atomic(path) as temporary:
        fig.savefig(temporary, dpi=130, format="png")


# ---- training ----


def plot_training(log, densities, path):
    """Error, L0 and dead features over training, and how often features fire. One line per
    layer."""
    fig, axes = figure(11, 7.5, panels=(2, 2))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(densities)))
    colours = dict(zip(densities, shades))
    tokens = [line["tokens"] / 1e6 for line in log]
    labels = {"mse": "squared error per token, in units of training",
              "l0": "L0: active features per token",
              "dead": "share of dead features"}
    for ax, (key, label) in zip(axes.flat, labels.items()):
        for layer, colour in colours.items():
            values = [line[f"L{layer}"][key] for line in log]
            ax.plot(tokens, values, color=colour, linewidth=1, label=f"layer {layer}")
        ax.set(xlabel="training activations (millions)", ylabel=label, ylim=(0, None))

    ax = axes[1, 1]
    for layer, density in densities.items():
        log_density = density.clamp_min(1e-7).log10().float()
        counts, edges = torch.histogram(log_density, bins=50, range=(-7.0, 0.0))
        ax.stairs(counts.numpy(), edges.numpy(), color=colours[layer], label=f"layer {layer}")
    ax.set(xlabel="share of tokens on which a feature fires", ylabel="features",
           xticks=range(-7, 1), xticklabels=["never", *(f"$10^{{{k}}}$" for k in range(-6, 0)),
                                             "1"])
    axes[0, 0].legend()
    save(fig, path)


# ---- the induction study ----


def plot_heads(scores, path):
    """Three scores of every head, on two texts: {text: {score: (layers,H)}}."""
    fig, axes = figure(12, 3, panels=6)
    panels = [(text, name) for text in scores for name in scores[text]]
    for ax, (text, name) in zip(axes, panels):
        image = ax.imshow(scores[text][name], vmin=0, vmax=1, cmap="viridis", origin="lower",
                          aspect="auto")
        ax.set_title(f"{name}\n{text}", fontsize=8)
        ax.set_xlabel("head")
        whole_numbers(ax)
    axes[0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="mean attention")
    save(fig, path)


def plot_prefixes(result, path):
    """Fig. 4a and 19: every head in grey, the two heads picked in colour, with their intervals."""
    lengths = result["prefix_lengths"]
    fig, axes = figure(9, 3.6, panels=2)
    labels = {"attention": "attention to the token after the prefix",
              "logit": "direct logit attribution of that token"}
    for ax, (name, label) in zip(axes, labels.items()):
        mean = np.array(result[name])                       # (lengths,layers,H)
        low, high = np.array(result[f"{name}_ci"])
        ax.plot(lengths, mean.reshape(len(lengths), -1), color="#c8c8c8", linewidth=0.8)
        for kind, colour in zip(("most_after_one", "grows_most"), COLOURS):
            layer, h = map(int, result[kind].split("."))
            ax.fill_between(lengths, low[:, layer, h], high[:, layer, h], color=colour, alpha=0.25,
                            linewidth=0)
            ax.plot(lengths, mean[:, layer, h], "o-", color=colour, markersize=4,
                    label=f"{layer}.{h}, {kind.replace('_', ' ')}")
        ax.set(xlabel="tokens that match (prefix length)", ylabel=label)
    axes[0].set_ylim(0, 1)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.suptitle("Prefix length on random tokens (the paper's Fig. 4a, 19)", fontsize=10)
    save(fig, path)


def plot_intervention(results, heads, path):
    """Fig. 4b: attention before and after, for each choice of examples and condition."""
    conditions = ["prefix cut\n(k-2)", "other token\n(k+2)", "prefix was 1\n(k-2)"]
    fig, axes = figure(3.7 * len(results), 3.6, panels=len(results), sharey=True)
    for ax, (choice, by_condition) in zip(axes, results.items()):
        measured = [head for head in heads if any(head in r for r in by_condition.values())]
        apart = max(1.0, 0.44 * len(measured) + 0.3)        # from one condition to the next
        for i, head in enumerate(measured):
            beside = (i - (len(measured) - 1) / 2) * 0.44
            colour = COLOURS[heads.index(head) % len(COLOURS)]
            label = head                                    # once in the legend
            for j, result in enumerate(by_condition.values()):
                if head in result:
                    draw_before_and_after(ax, j * apart + beside, result[head], colour, label)
                    label = None
        ax.set_xticks(np.arange(3) * apart, conditions, fontsize=8)
        ax.set(ylim=(0, 1), xlim=(-0.6 * apart, 2.6 * apart))
        ax.set_title(f"examples {choice}", fontsize=10)
        if measured:
            ax.legend(fontsize=7, ncols=min(len(measured), 2))
    axes[0].set_ylabel("attention from query to key")
    fig.suptitle("One token of held-out text replaced (the paper's Fig. 4b)", fontsize=10)
    save(fig, path)


def draw_before_and_after(ax, x, result, colour, label):
    """Two bars with intervals, the first one paler."""
    for name, shift, alpha in (("before", -0.1, 0.45), ("after", 0.1, 1.0)):
        ax.bar(x + shift, result[name], 0.19, color=colour, alpha=alpha,
               label=f"{label} {name}" if label else None)
        ax.vlines(x + shift, *result[f"{name}_ci"], color="black", linewidth=1)


def plot_feature(f, proxy, title, path):
    """Fig. 2: a feature's activations split by proxy, as counts and weighted by activation."""
    fig, axes = figure(9, 3.4, panels=2)
    bins = np.linspace(0, f.max() if len(f) else 1, 31)
    parts = [f[proxy], f[~proxy]]
    for ax, weights, label in ((axes[0], None, "positions"),
                               (axes[1], parts, "positions x activation")):
        ax.hist(parts, bins, weights=weights, color=COLOURS[:2], histtype="stepfilled", alpha=0.7,
                label=["X followed the token earlier", "it did not"])
        ax.set(xlabel="activation", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].set_title("specificity", fontsize=9)
    axes[1].set_title("expected value", fontsize=9)
    axes[0].legend(fontsize=8)
    fig.suptitle(as_text(f"Feature {title} (the paper's Fig. 2)"), fontsize=10)
    save(fig, path)


# ---- the IOI study ----


def plot_effects(panels, unit, path):
    """One number for every head: {title: (layers,H)}, the first in logits, the others in `unit`,
    each panel on a scale of its own, though not below a tenth of the largest of these others. A
    head that helps is blue: what it adds is positive, and patching it lowers the difference."""
    fig, axes = figure(12, 3.2, panels=len(panels))
    largest = [np.abs(values).max() for values in panels.values()]
    for i, (ax, (title, values)) in enumerate(zip(axes, panels.items())):
        limit = max(largest[i], 0.1 * max(largest[1:]) if i else 0.0, 1e-9)
        image = ax.imshow(values, vmin=-limit, vmax=limit, cmap="RdBu" if i == 0 else "RdBu_r",
                          origin="lower", aspect="auto")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("head")
        whole_numbers(ax)
        fig.colorbar(image, ax=ax).set_label("logits" if i == 0 else unit, fontsize=8)
    axes[0].set_ylabel("layer")
    fig.suptitle("Blue: the head helps", fontsize=10)
    save(fig, path)


COLUMN_OF_ROLE = {"previous token": 0, "duplicate token": 1, "induction": 1, "S-inhibition": 2,
                  "name mover": 3, "negative name mover": 3, "no role": 4}
COLUMN_TITLES = ["previous token\n(at S1+1)", "duplicate token,\ninduction (at S2)",
                 "S-inhibition\n(at the end)", "name movers\n(at the end)",
                 "no role, yet an\neffect at the end"]


def plot_circuit(roles, at_end, at_S2, path):
    """Heads by the position at which they act (columns) and layer (rows), with the effect of
    patching them there, later layers computed anew.

    roles: {role: [(layer, head)]}, "no role" among them; at_end, at_S2: (layers,H), as parts of a
    whole.
    """
    in_cell = {}                                            # {(layer, column): [(head, role)]}
    for role, heads in roles.items():
        for layer, h in heads:
            in_cell.setdefault((layer, COLUMN_OF_ROLE[role]), []).append((h, role))
    layers = sorted({layer for layer, _ in in_cell})
    first_line = {}         # of each layer; two heads of a role fit side by side on a line
    n_lines = 0
    for layer in layers:
        first_line[layer] = n_lines
        n_lines += max((len(cell) + 1) // 2 for (of, _), cell in in_cell.items() if of == layer)

    fig, ax = figure(9, 1.6 + 0.36 * max(n_lines, 4))
    for (layer, column), cell in in_cell.items():
        for i, (h, role) in enumerate(cell):
            effect = at_S2[layer, h] if column == 1 else at_end[layer, h]
            label = f"{layer}.{h}" + (f"  {effect:+.0%}" if column else "")
            box = {"boxstyle": "round", "color": (*COLOURS, "#777777")[column],
                   "alpha": 0.6 if "negative" in role else 1.0}
            ax.annotate(label, (column + 0.4 * (i % 2), first_line[layer] + i // 2), ha="center",
                        va="center", fontsize=8, color="white", bbox=box)
    ax.set_xticks(np.arange(5) + 0.2, COLUMN_TITLES, fontsize=8)
    ax.set_yticks(list(first_line.values()), layers)
    ax.set(ylabel="layer", xlim=(-0.4, 4.8), ylim=(-0.7, max(n_lines, 1) - 0.3))
    ax.set_title("Heads by role, and what patching each does to the logit difference", fontsize=10)
    save(fig, path)


def plot_ablations(places, path):
    """Fig. 16: the features that the logit difference hangs on most, by order of names, beside the
    errors."""
    fig, axes = figure(11, 4, panels=2, sharey=True)
    for ax, (place, result) in zip(axes, places.items()):
        features = result["features"]
        x = np.arange(len(features))
        for order, colour, shift in zip(("ABBA", "BABA"), COLOURS, (-0.2, 0.2)):
            ax.bar(x + shift, [one[order] for one in features], 0.38, color=colour, label=order)
        for i, one in enumerate(features):
            ax.vlines(i, *one["effect_ci"], color="black", linewidth=1)
        x_errors = np.arange(len(result["error"])) + len(x) + 0.6
        ax.bar(x_errors, [mean for mean, _ in result["error"].values()], 0.6, color="#999999",
               label="SAE error removed")
        names = [f"{one['layer']}.{one['feature']}" for one in features]
        names += [f"error {layer}" for layer in result["error"]]
        ax.set_xticks([*x, *x_errors], names, rotation=75, fontsize=7)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set_title(f"removed at {place}", fontsize=10)
    axes[0].set_ylabel("change of the logit difference")
    axes[0].legend(fontsize=8)
    fig.suptitle("Features of the IOI circuit (the paper's Fig. 16); lines: 95% interval of the "
                 "mean over all prompts", fontsize=10)
    save(fig, path)


def plot_signal(sources, baselines, layers, path):
    """Fig. 5 and 14: what z_cat at S2 from each source takes off the logit difference, prompt by
    prompt; baselines: {name: the same}, as lines."""
    fig, ax = figure(9, 4.6)
    kinds = {"the prompt's own names": COLOURS[0], "other names": COLOURS[2]}
    for i, (name, result) in enumerate(sources.items()):
        mean, interval = result["change"]
        is_own = name == "itself" or name.startswith("connector")
        kind = "the prompt's own names" if is_own else "other names"
        ax.bar(i, mean, 0.6, color=kinds[kind], label=kind)
        ax.vlines(i, *interval, color="black", linewidth=1)
    for (name, change), style in zip(baselines.items(), ("--", ":")):
        ax.axhline(change, color=COLOURS[1], linestyle=style, linewidth=1, label=name)
    ax.axhline(0, color="black", linewidth=0.5)
    names = [as_text(name) for name in sources]
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor",
                  fontsize=8)
    ax.set_ylabel("logit difference, less clean")
    ax.set_title(f"z_cat of layers {' and '.join(map(str, layers))} at S2 from another prompt "
                 f"(the paper's Fig. 5, 14)", fontsize=10)
    ax.margins(y=0.2)
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    ax.legend(once.values(), once.keys(), ncols=2, fontsize=8)
    save(fig, path)


def plot_side_and_position(effects, path):
    """The effects of side and of position, prompt by prompt; effects: {name: [mean, interval]}."""
    fig, ax = figure(7, 3.2)
    for i, (name, (mean, interval)) in enumerate(effects.items()):
        colour = COLOURS[0 if name.startswith("effect of side") else 1]
        ax.hlines(i, *interval, color=colour, linewidth=2)
        ax.plot(mean, i, "o", color=colour, markersize=5)
    ax.axvline(0, color="black", linewidth=0.5)
    ax.set_yticks(range(len(effects)), list(effects), fontsize=8)
    ax.invert_yaxis()
    ax.margins(y=0.1)
    ax.set_xlabel("change of the logit difference, in logits")
    ax.set_title("Side of the connector, and position of S1", fontsize=10)
    save(fig, path)


# ---- features and heads ----


def plot_families(panels, families, contexts, path):
    """Every feature by the context it needs and by how much it reads after a copy, a panel a layer:
    {layer: {"context", "after_copy", "family"}}, (d_sae,) each. context: an index in `contexts`;
    -1, never measured, is not drawn."""
    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    fig, axes = figure(2.9 * columns + 0.6, 3.6 * rows, panels=(rows, columns), sharey=True,
                       squeeze=False)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    colours = (COLOURS[1], "#777777", COLOURS[0], COLOURS[2], COLOURS[3], "white")
    rng = np.random.default_rng(0)
    for ax, (layer, panel) in zip(axes.flat, panels.items()):
        for i, (name, colour) in enumerate(zip(families, colours)):
            is_family = panel["family"] == i
            drawn = is_family & (name != "too rare") & (panel["context"] >= 0)
            beside = rng.uniform(-0.36, 0.36, drawn.sum())  # so that dots do not hide each other
            label = f"{name}: {is_family.sum()}"
            if name == "too rare":
                label += ", not drawn"
            ax.plot(panel["context"][drawn] + beside, panel["after_copy"][drawn], ".", color=colour,
                    markersize=2.5, alpha=0.7, label=label)
        ax.set_xticks(range(len(contexts) + 1), [*contexts, f"> {contexts[-1]}"])
        ax.set(xlabel="tokens of context needed", title=f"layer {layer}", ylim=(-0.02, 1.02))
        ax.legend(fontsize=6.5, markerscale=3)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of activation read\nafter a copy of the token")
    save(fig, path)


def plot_census(census, choices, polysemantic_above, path):
    """Roles of every head, by which of its features are looked at: {choice: how many}. 24 heads a
    row."""
    parts = [census[first:first + 24] for first in range(0, len(census), 24)]
    fig, axes = figure(max(6.0, 0.42 * len(parts[0]) + 3), 3.5 * len(parts) + 0.3,
                       panels=(len(parts), 1), sharey=True, squeeze=False)
    for ax, heads in zip(axes[:, 0], parts):
        for i, ((choice, n), colour) in enumerate(zip(choices.items(), COLOURS)):
            shift = (i - (len(choices) - 1) / 2) * 0.2
            known = [(x, head["roles"][choice]) for x, head in enumerate(heads)
                     if head["roles"][choice] is not None]
            # where no two features share a role: at the top
            ax.plot([x + shift for x, _ in known], [min(roles, 2 * n) for _, roles in known], "o",
                    color=colour, markersize=4, label=choice)
        ax.axhline(polysemantic_above, color="black", linewidth=0.7, linestyle=":")
        ax.set_xticks(range(len(heads)), [head["name"] for head in heads], rotation=60, fontsize=8)
        ax.set(yscale="log", ylabel="number of roles")
        ax.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        ax.minorticks_off()
    fig.suptitle("Roles of each head's features; above the dotted line polysemantic", fontsize=10)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(fig, path)


# ---- one feature in one prompt ----


def plot_sources(moved, layer, tokens, title, path):
    """DFA as a heat map, heads by source tokens: moved (H,k), as `direct.dfa` has it for one query;
    tokens: k texts."""
    fig, ax = figure(1.5 + 0.55 * len(tokens), 1.6 + 0.3 * len(moved))
    image = draw_sources(ax, moved, [f"head {layer}.{h}" for h in range(len(moved))], tokens)
    ax.set_title(as_text(title), fontsize=10)
    fig.colorbar(image, ax=ax, label="DFA")
    save(fig, path)


# ---- the overview in the README ----


def plot_overview(z_cat, f, feature, moved, constant, tokens, layer, path):
    """z_cat, an SAE of it and DFA, for one feature of one token.

    z_cat (D,); f {feature: activation} of those active; moved (H,k): DFA; constant: with DFA the
    activation; tokens: k texts, of which the last is the one looked at.
    """
    fig = Figure(figsize=(11, 5.0), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.25))
    strip, bars = top.subplots(1, 2, width_ratios=(1.6, 1))
    sources, heads = bottom.subplots(1, 2, width_ratios=(3.4, 1))
    head_names = [f"head {layer}.{h}" for h in range(len(moved))]
    draw_z_cat(strip, z_cat, head_names, tokens[-1])
    draw_activations(bars, f, feature, layer)
    image = draw_sources(sources, moved, head_names, tokens)
    sources.set_title(f"DFA: what feature {layer}.{feature} read, by head and source token",
                      fontsize=10)
    bottom.colorbar(image, ax=sources, pad=0.01)
    draw_head_sums(heads, moved, constant, head_names)
    save(fig, path)


def draw_z_cat(ax, z_cat, head_names, token):
    """All heads' outputs side by side, as colours."""
    D = len(z_cat)
    limit = np.abs(z_cat).max()
    ax.imshow(z_cat[None], cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto",
              extent=(0, D, 0, 1))
    for h, name in enumerate(head_names):
        middle = (h + 0.5) * D / len(head_names)
        ax.vlines(h * D / len(head_names), 0, 1, color="black", linewidth=2)
        ax.annotate(f"{name}\n= pattern @ v", (middle, 0), (middle, -0.55), ha="center", va="top",
                    arrowprops={"arrowstyle": "->"}, annotation_clip=False, fontsize=9)
    ax.set(xticks=[], yticks=[], xlim=(-2, D), ylim=(-1.3, 1.0))
    ax.spines[:].set_visible(False)
    ax.set_title(as_text(f"z_cat at {token!r}: all heads' outputs side by side, {D} numbers"),
                 fontsize=10)


def draw_activations(ax, f, feature, layer):
    """The strongest active features, one of them in another colour."""
    strongest = sorted(f, key=f.get, reverse=True)[:8]
    colours = ["#e08214" if i == feature else "#9aa5b1" for i in strongest]
    ax.barh(range(len(strongest)), [f[i] for i in strongest], color=colours)
    ax.set_yticks(range(len(strongest)), [f"{layer}.{i}" for i in strongest], fontsize=8)
    ax.invert_yaxis()
    ax.set_title(f"the SAE: z_cat is about a sum of {len(f)} active features", fontsize=10)
    ax.set_xlabel("activation (the strongest of them)", fontsize=8)


def draw_sources(ax, moved, head_names, tokens):            # -> the image, for a colour bar
    """DFA by head and source token."""
    limit = np.abs(moved).max()
    image = ax.imshow(moved, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    texts = [as_text(repr(token)[1:-1]) for token in tokens]
    ax.set_xticks(range(len(tokens)), texts, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(head_names)), head_names, fontsize=8)
    return image


def draw_head_sums(ax, moved, constant, head_names):
    """DFA summed over sources, and the constant."""
    values = [*moved.sum(1), constant]
    colours = ["#e08214" if value >= 0 else "#8073ac" for value in values]
    ax.barh(range(len(values)), values, color=colours)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(values)), [*head_names, "constant"], fontsize=8)
    ax.invert_yaxis()
    ax.set_title(f"sum: {sum(values):.2f}, its activation", fontsize=10)


# ---- small helpers ----


def whole_numbers(ax):
    """Ticks at whole numbers: layers and heads."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)


def as_text(text):
    """A text as it is: matplotlib takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")
