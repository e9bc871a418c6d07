"""The indirect-object-identification (IOI) study (the paper, Fig. 5, 14 and 16; the task: Wang et
al. 2022).

    When Mary and John went to the store, John gave a drink to  ->  Mary
         IO   and S1                      S2               end

The logit difference is logit[IO] - logit[S] at the end. ABBA is this order of names; BABA has S
before the connector, IO after it.

    circuit     direct logit attribution, attention, and activation patching of every head; roles
    features    with SAEs spliced in, is the task still done? With the SAE error kept, which
                features, at S2 and at the end, does it depend on, and what do they look at?
    signal      what do the layers that act at S2 tell the rest: where S1 was, or on which side of
                " and"? z_cat at S2 is replaced by another prompt's. Which heads and features carry
                it? The layers are chosen on one half of the prompts, and all this is measured on
                the other
    qk          why do the name movers look at IO rather than at S?

    python ioi.py           all four on the shipped model, in <out>/<model>/ioi/

A *source* prompt is its base prompt with something changed: another S2, other names, another
connector. Patching copies the source run's z_cat at a position into the base run, at the matching
position of each row. Recovered = (LD_patched - LD_zero) / (LD_clean - LD_zero), a ratio of means
over prompts; LD_zero has z_cat = 0 there. (The paper folds value biases into b_O, which shifts its
z_cat, and so what 0 means: docs/DIFFERENCES.md, "Bias convention".) The *effect of order* is LD
patched from prompts with other names in the same order, less LD patched from those with the order
flipped.

Shapes: N prompts, T positions, H heads, D = H*d_head, d_sae; L layers.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attribution import Place, qk, read_terms, seen_keys, trace_prompt
from data.errors import UserError, run
from data.figures import (plot_ablations, plot_circuit, plot_effects, plot_side_and_position,
                          plot_signal)
from data.files import write_json
from data.flags import field, parse_flags
from data.progress import Progress
from data.prompts import (CONNECTORS, FILLERS, ORDERS, POSITIONS, PromptBatch, draw_prompts,
                          flipped, longer, names_of_one_token, other_giver, placed, tokenise,
                          with_connector, with_filler, with_other_names)
from data.stats import bootstrap, format_ci, mean_with_ci, wilson
from data.stories import HELD_OUT_NAMES
from direct import constant_part, dfa, direct_logits, token_effects, values_minus_bias
from model import Run, span
from sae import ablate, splice, splice_mlp
from study import Study, StudyConfig, begin, finish, held_out_rows, reported

# ---- runs and patches ----


class PromptRun(NamedTuple):
    """A run of the model on some prompts, from which patches start or take what they put in."""
    run: Run
    ld: Tensor              # (N,) logit difference at the end

    @property
    def z(self):
        """z_cat by layer, (N,T,D) each."""
        return self.run.z_cat


def run_prompts(model, batch, edit_z=None):                 # -> PromptRun
    """The run of these prompts. (A patch of a run with edits has to come after them in the prompt:
    what it computes anew is without them.)"""
    run = model.run(batch.tokens, edit_z)
    return PromptRun(run, logit_difference(model, z_at(run.final, batch, "end"), batch))


def logit_difference(model, at_end, batch):                 # (N,d_model) -> (N,)
    """logit[IO] - logit[S], of the stream at the end."""
    logits = model.unembed(at_end, torch.stack([batch.io, batch.s], -1)).float()    # (N,2)
    return logits[:, 0] - logits[:, 1]


@torch.no_grad()
def logit_diff_with(model, base, batch, edit_z, place, rows=None):      # {layer: edit} -> (N,)
    """Logit difference of a run once more, with edits of z_cat. They may change each prompt from a
    named place on, or from the start if place is "BOS"; only that is computed anew.

    rows: of the base run, if the batch is not all of it.
    """
    end = batch.pos["end"]
    start = torch.zeros_like(end) if place == "BOS" else batch.pos[place]
    rows = batch.rows() if rows is None else rows
    final = model.rerun(base.run, rows, span(start, end), edit_z)
    return logit_difference(model, final[:, -1], batch)     # the last of a span is the end


@torch.no_grad()
def spliced_difference(model, batch, edit_z, edit_mlp):     # -> (N,)
    """Logit difference of whole runs with edits of z_cat and of what MLPs write."""
    final, _ = model.run_layers(model.embed(batch.tokens), edit_z, edit_mlp=edit_mlp)
    return logit_difference(model, z_at(final, batch, "end"), batch)


def patch_at(values, position):                             # (N,D), (N,) -> edit
    """The edit that puts values[i] at position[i] of row i, and leaves all else as it is."""
    def edit(z):
        z = z.clone()
        z[torch.arange(len(z), device=z.device), position] = values.to(z.dtype)
        return z
    return edit


def z_at(z, batch, place):                                  # (N,T,D) -> (N,D)
    """z, or the stream, at a named position, which is each prompt's own."""
    return z[batch.rows(), batch.pos[place]]


def with_head_from(base_z, source_z, head, n_heads):        # (N,D), (N,D) -> (N,D)
    """The base's z_cat with one head's part from the source."""
    z = base_z.unflatten(-1, (n_heads, -1)).clone()
    z[:, head] = source_z.unflatten(-1, (n_heads, -1))[:, head]
    return z.flatten(-2)


class IOI(NamedTuple):
    """The prompts of a study, and the clean run on them."""
    study: Study
    names: list
    batch: PromptBatch
    clean: PromptRun

    @property
    def model(self):
        return self.study.model

    @property
    def saes(self):
        return self.study.saes

    @property
    def transcoders(self):
        return self.study.transcoders

    @property
    def seed(self):
        return self.study.config.seed

    @property
    def others(self):
        """The prompts with other names, the same each time: what is patched from them, or from
        these with something else changed too, is compared prompt by prompt."""
        return with_other_names(self.batch.prompts, self.names, self.seed)

    def run(self, prompts):                                 # -> PromptBatch, PromptRun
        """Other prompts, and the run on them."""
        batch = tokenise(prompts, self.study.tokenizer, self.study.device)
        return batch, run_prompts(self.model, batch)

    def pick(self, rows):                                   # (n,) -> IOI
        """Some of the prompts."""
        clean = PromptRun(self.clean.run.pick(rows), self.clean.ld[rows])
        return self._replace(batch=self.batch.pick(rows), clean=clean)

    @torch.no_grad()
    def z_at_S2(self, prompts, layers):                     # -> {layer: (N,D)}
        """z_cat of the layers at S2 of other prompts, of which no more is run."""
        source = tokenise(prompts, self.study.tokenizer, self.study.device)
        up_to_S2 = source.tokens[:, :int(source.pos["S2"].max()) + 1]
        z = self.model.z_cat_at(up_to_S2, layers)
        return {layer: z_at(z[layer], source, "S2") for layer in layers}

    def edits_at_S2(self, z):                               # {layer: (N,D)} -> {layer: edit}
        """Another z_cat at S2, in the layers for which one is given."""
        return {layer: patch_at(values, self.batch.pos["S2"]) for layer, values in z.items()}

    def patch_S2(self, z):                                  # {layer: (N,D)} -> (N,)
        """Logit difference with another z_cat at S2."""
        return logit_diff_with(self.model, self.clean, self.batch, self.edits_at_S2(z), "S2")

    def patch_S2_from(self, prompts, layers):               # -> (N,)
        """Logit difference with z_cat of the layers at S2 from that of other prompts."""
        return self.patch_S2(self.z_at_S2(prompts, layers))

    def run_with_S2_from(self, prompts, layers):            # -> PromptRun
        """The whole run with z_cat of the layers at S2 from that of other prompts."""
        edits = self.edits_at_S2(self.z_at_S2(prompts, layers))
        return run_prompts(self.model, self.batch, edits)


# ---- the circuit ----

# Who might look at whom.
ATTENTION_PAIRS = (("end", "IO"), ("end", "S1"), ("end", "S2"), ("S2", "S1"), ("S2", "S1+1"),
                   ("S1+1", "S1"))
PREVIOUS_TOKEN = "each -> the one before"


class Circuit(NamedTuple):
    """What every head does, (N,L,H) each; effects are changes of the logit difference (LD)."""
    attention: dict         # {"end -> IO": ...}, for ATTENTION_PAIRS and PREVIOUS_TOKEN
    dla_io: np.ndarray      # direct logit attribution at the end: its part of IO's logit
    dla_s: np.ndarray       # and of S's; both less the mean over the prompts' names
    direct: np.ndarray      # if z is patched at the end, with later layers' z_cat there frozen
    at_end: np.ndarray      # if z is patched at the end
    at_S2: np.ndarray       # if z is patched at S2

    @property
    def dla(self):                                          # -> (N,L,H)
        """Direct logit attribution of LD itself."""
        return self.dla_io - self.dla_s


@torch.no_grad()
def compute_circuit(model, clean, batch, source_run, source, progress=lambda n_done: None):
    """Attention and effects of every head -> Circuit.

    source: the prompts with the other giver (`other_giver`). The effects are of putting the
    source's z of a head, at S2 or at the end, into the clean run.
    """
    attention, dla_io, dla_s = attention_and_dla(model, batch)
    runs = (model, clean, batch, source_run, source)
    direct = effects_of_heads(*runs, "end", is_direct=True)
    progress(1)
    at_end = effects_of_heads(*runs, "end")
    progress(2)
    at_S2 = effects_of_heads(*runs, "S2")
    progress(3)
    return Circuit(attention, dla_io, dla_s, direct, at_end, at_S2)


@torch.no_grad()
def effects_of_heads(model, base, batch, source_run, source, place, is_direct=False):   # -> (N,L,H)
    """The change of the base run's logit difference if one head's z at a place is that of another
    run.

    is_direct: with z_cat of all later layers there as it was. MLPs and the final norm are computed
    anew all the same: "direct" is without later heads. (Direct logit attribution is without MLPs
    too.)
    """
    L = model.config.n_layers
    H = model.config.n_heads
    effects = []
    for layer in range(L):
        of_base = z_at(base.z[layer], batch, place)
        of_source = z_at(source_run.z[layer], source, place)
        later = range(layer + 1, L) if is_direct else ()
        frozen = {i: patch_at(z_at(base.z[i], batch, place), batch.pos[place]) for i in later}
        for head in range(H):
            patched = with_head_from(of_base, of_source, head, H)
            edits = frozen | {layer: patch_at(patched, batch.pos[place])}
            effects.append(logit_diff_with(model, base, batch, edits, place) - base.ld)
    return torch.stack(effects, 1).unflatten(1, (L, H)).cpu().numpy()


def attention_and_dla(model, batch):                # -> {pair: (N,L,H)}, (N,L,H), (N,L,H)
    """Every head's attention between named positions, and its direct logit attribution at the end
    to IO and to S, each less the mean over all names of the prompts."""
    row = batch.rows()
    end = batch.pos["end"]
    attention = {f"{q} -> {k}": [] for q, k in ATTENTION_PAIRS} | {PREVIOUS_TOKEN: []}

    def look(kept):
        for q, k in ATTENTION_PAIRS:
            pattern = kept.pattern[row, :, batch.pos[q], batch.pos[k]]              # (N,H)
            attention[f"{q} -> {k}"].append(pattern)
        attention[PREVIOUS_TOKEN].append(attention_to_previous(kept.pattern, end))

    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    names = torch.cat([batch.io, batch.s]).unique()
    mean_name = model.logit_directions(names).mean(0)
    to_io = model.logit_directions(batch.io) - mean_name
    to_s = model.logit_directions(batch.s) - mean_name
    dla_io = direct_logits(model, matrices, model.layer_caches(batch.tokens), end, to_io, look)
    # run once more: no layer's cache is kept
    dla_s = direct_logits(model, matrices, model.layer_caches(batch.tokens), end, to_s)
    attention = {pair: torch.stack(by_layer, 1).cpu().numpy()
                 for pair, by_layer in attention.items()}
    return attention, dla_io.cpu().numpy(), dla_s.cpu().numpy()


def attention_to_previous(pattern, end):                    # (N,H,T,T), (N,) -> (N,H)
    """Mean attention to the token before, over a prompt's tokens whose previous one is not BOS."""
    to_previous = pattern.diagonal(-1, 2, 3)                # (N,H,T-1), for queries 1 to T-1
    query = torch.arange(1, pattern.shape[2], device=end.device)
    is_counted = ((query > 1) & (query <= end[:, None])).to(pattern.dtype)          # (N,T-1)
    return (to_previous * is_counted[:, None]).sum(-1) / is_counted.sum(-1, keepdim=True)


ROLES = ("name mover", "negative name mover", "S-inhibition", "duplicate token", "induction",
         "previous token")
LOOKS_AT = 0.2              # mean attention with which a head looks at something
MIN_EFFECT = 0.05           # effect that counts, as a part of LD_clean - LD_source: `find_roles`


def find_roles(attention, direct, at_end, at_S2):           # {pair: (L,H)}, (L,H) x 3
    """Roles by rule, from means over prompts -> {role: [(layer, head)]}.

    LD_source is the logit of the base's IO less that of its S in the source run, about -LD_clean.
    Effects are changes as parts of LD_clean - LD_source: patching a head that helps lowers LD, so
    its effect is negative.

    name mover           looks from the end at IO; direct effect -5% or lower
    negative name mover  looks from the end at IO; direct effect +5% or higher
    S-inhibition         looks from the end at S2; effect in all at least 5% lower than the direct
                         one: it works through later heads
    duplicate token      looks from S2 at S1; effect at S2 of 5% or more, of either sign
    induction            looks from S2 at S1+1; effect at S2 of 5% or more, of either sign
    previous token       looks from S1+1 at S1, and from all tokens at the one before. By attention
                         alone: source and base are the same text up to S2, so patching shows
                         nothing there.
    """
    looks = {pair: weight >= LOOKS_AT for pair, weight in attention.items()}
    acts_at_S2 = np.abs(at_S2) >= MIN_EFFECT
    heads_of = {"name mover": looks["end -> IO"] & (direct <= -MIN_EFFECT),
                "negative name mover": looks["end -> IO"] & (direct >= MIN_EFFECT),
                "S-inhibition": looks["end -> S2"] & (at_end - direct <= -MIN_EFFECT),
                "duplicate token": looks["S2 -> S1"] & acts_at_S2,
                "induction": looks["S2 -> S1+1"] & acts_at_S2,
                "previous token": looks["S1+1 -> S1"] & looks[PREVIOUS_TOKEN]}
    return {role: [(int(layer), int(head)) for layer, head in np.argwhere(heads)]
            for role, heads in heads_of.items()}


def without_role(roles, effects):                           # -> [(layer, head)]
    """Heads that no rule names, though patched at the end they have an effect of twice what counts,
    directly or in all."""
    named = {head for heads in roles.values() for head in heads}
    largest = np.maximum(np.abs(effects["direct"]), np.abs(effects["at_end"]))
    strong = {(int(layer), int(head)) for layer, head in np.argwhere(largest >= 2 * MIN_EFFECT)}
    return sorted(strong - named)


def study_circuit(ioi):                                     # -> dict
    """Can the model do the task, which heads do it, and what are their roles?

    "unit" is what effects are divided by: LD_clean - LD_source, or 1 where that is not clearly
    above 0. "by_prompt" is the Circuit, "effects" its means, in units. "movers" and "signal_layers"
    are for the studies after this one.
    """
    model = ioi.model
    batch = ioi.batch
    clean = ioi.clean
    source, source_run = ioi.run(other_giver(batch.prompts))
    ld = clean.ld.cpu().numpy()
    source_ld = -source_run.ld.cpu().numpy()    # the base's IO less its S: the source's S and IO
    _, (low, _) = mean_with_ci(ld - source_ld)
    told_apart = low > 0
    unit = float(ld.mean() - source_ld.mean()) if told_apart else 1.0

    c = compute_circuit(model, clean, batch, source_run, source, Progress(3, "effects"))
    effects = {name: getattr(c, name).mean(0) / unit for name in ("direct", "at_end", "at_S2")}
    attention = {pair: weight.mean(0) for pair, weight in c.attention.items()}
    roles = find_roles(attention, **effects) if told_apart else {role: [] for role in ROLES}
    layer_changes = []
    for layer in range(model.config.n_layers):
        patched = ioi.patch_S2({layer: z_at(source_run.z[layer], source, "S2")})
        layer_changes.append((patched - clean.ld).cpu().numpy() / unit)
    signal_layers, signal_rows = pick_signal_layers(ioi, layer_changes)
    return {"ld": ld, "source_ld": source_ld, "told_apart": told_apart, "unit": unit,
            "by_prompt": c, "effects": effects, "attention": attention, "roles": roles,
            "movers": pick_movers(roles, effects["direct"]),
            "layer_effects": [float(change.mean()) for change in layer_changes],
            "signal_layers": signal_layers, "signal_rows": signal_rows}


def pick_movers(roles, direct):                 # {role: heads}, (L,H) -> [(layer, head)]
    """The two strongest name movers, or for want of them the head whose direct effect is lowest,
    the most helpful one."""
    movers = roles["name mover"]
    if not movers:
        movers = [divmod(int(direct.argmin()), direct.shape[1])]
    return sorted(movers, key=lambda head: direct[head])[:2]


def pick_signal_layers(ioi, layer_changes):                 # [(N,)] by layer -> layers, rows
    """The layers whose z_cat at S2 is studied, and the prompts to study it on: --signal-layers on
    all prompts, or the two layers with the largest effect at S2, however small it is, on the first
    half, and then the second half."""
    rows = ioi.batch.rows()
    if ioi.study.config.signal_layers:
        return list(ioi.study.config.signal_layers), rows
    half = len(rows) // 2
    on_first_half = [abs(change[:half].mean()) for change in layer_changes]
    return sorted(np.argsort(on_first_half)[::-1][:2].tolist()), rows[half:]


# ---- through SAEs (Fig. 16) ----


class FeatureEffects(NamedTuple):
    """What happens to LD when a feature is removed at one place of each prompt; one entry for each
    prompt in which it is active there. In the other prompts nothing happens."""
    row: Tensor             # (n,)
    feature: Tensor         # (n,)
    f: Tensor               # (n,) activation
    change: Tensor          # (n,) of LD


@torch.no_grad()
def ablate_features(model, sae, layer, batch, clean, place):    # -> FeatureEffects
    """Each feature that is active at the place of a prompt, ablated there, one at a time (SAE error
    kept)."""
    f = sae.encode(z_at(clean.z[layer], batch, place))      # (N,d_sae)
    row, feature = f.nonzero(as_tuple=True)
    changes = []
    for part in torch.arange(len(row), device=row.device).split(256):
        copies = batch.pick(row[part])                      # a prompt once for each of its features
        position = torch.arange(copies.tokens.shape[1], device=row.device)
        where = position == copies.pos[place][:, None]
        edit = {layer: ablate(sae, feature[part], where)}
        ld = logit_diff_with(model, clean, copies, edit, place, row[part])
        changes.append(ld - clean.ld[row[part]])
    change = torch.cat(changes) if changes else f.new_zeros(0)
    return FeatureEffects(row, feature, f[row, feature], change)


@torch.no_grad()
def ablate_error(model, sae, layer, batch, clean, place):   # -> (N,) change of LD
    """The SAE's error removed at the place: z_hat instead of z_cat."""
    z_hat = sae(z_at(clean.z[layer], batch, place))
    edit = patch_at(z_hat, batch.pos[place])
    return logit_diff_with(model, clean, batch, {layer: edit}, place) - clean.ld


def rank_features(effects, prompts, n_top):                 # {layer: FeatureEffects} -> [dict]
    """The features with the largest mean effect over all prompts, with intervals, and by order of
    names and template."""
    order = np.array([prompt.order for prompt in prompts])
    template = np.array([prompt.template for prompt in prompts])
    total = []                                              # (size, layer, feature)
    for layer, e in effects.items():
        features, index = e.feature.unique(return_inverse=True)
        sums = e.change.new_zeros(len(features)).index_add_(0, index, e.change)
        total += [(abs(size), layer, i) for size, i in zip(sums.tolist(), features.tolist())]
    ranked = []
    for _, layer, i in sorted(total, reverse=True)[:n_top]:
        e = effects[layer]
        is_this = e.feature == i
        change = np.zeros(len(prompts))                     # 0 where it is not active
        change[e.row[is_this].cpu().numpy()] = e.change[is_this].cpu().numpy()
        mean, interval = mean_with_ci(change)
        ranked.append({
            "layer": layer, "feature": i, "n_active": int(is_this.sum()),
            "effect": mean, "effect_ci": interval,
            "where_active": float(e.change[is_this].mean()),
            **{one: float(change[order == one].mean()) for one in ORDERS},
            "by_template": {t: float(change[template == t].mean())
                            for t in np.unique(template).tolist()}})
    return ranked


def what_stands_at(k, pos, row):
    """What stands at position k of a prompt: a named position, BOS, or something else."""
    if k == 0:
        return "BOS"
    for name in ("connector", "IO", "S1", "S1+1", "S2", "end"):     # in BABA, S1+1 is the connector
        if int(pos[name][row]) == k:
            return name
    return "else"


class FeatureAtPlace(NamedTuple):
    """A feature at one place of the prompts, and those of each order in which it is most active."""
    layer: int
    feature: int
    place: str
    f: Tensor               # (N,) activation
    rows: dict              # {order: (m,)}


def most_active_prompts(sae, layer, feature, batch, clean, place, n=8):     # -> FeatureAtPlace
    """The prompts of each order in which a feature is most active at the place, n of them at
    most."""
    f = sae.encode(z_at(clean.z[layer], batch, place))[:, feature]
    rows_of = {}
    for order in ORDERS:
        f_of_order = torch.where(batch.has_order(order), f, 0)
        rows = f_of_order.argsort(descending=True)[:n]
        rows_of[order] = rows[f_of_order[rows] > 0]
    return FeatureAtPlace(layer, feature, place, f, rows_of)


@torch.no_grad()
def dfa_by_position(model, sae, batch, active):             # -> {order: {position: share}}
    """DFA of a feature (FeatureAtPlace) by what stands at the source.

    Shares are sums over prompts, over the sum of activations; with "constant"
    (direct.constant_part) they sum to 1.
    """
    constant = float(constant_part(model, active.layer, sae)[active.feature])
    shares = {order: {} for order in active.rows}
    for order, rows in active.rows.items():
        if not len(rows):
            continue
        total = float(active.f[rows].sum())
        kept = model.layer_cache(batch.tokens[rows], active.layer)
        v = values_minus_bias(model, active.layer, kept.v)
        moved = dfa(kept.pattern, v, sae.W_enc[:, active.feature]).sum(1)           # (B,q,k)
        add(shares[order], "constant", constant * len(rows) / total)
        for i, row in enumerate(rows.tolist()):
            q = int(batch.pos[active.place][row])
            for k, value in enumerate(moved[i, q, :q + 1].tolist()):
                add(shares[order], what_stands_at(k, batch.pos, row), value / total)
    return shares


@torch.no_grad()
def writers_by_position(model, saes, transcoders, batch, active):
    """One step of recursive DFA, in the same prompts and units: what was written at the sources,
    and by whom -> {order: {(position, writer): share}}. Constants are under ("constant", "").
    Where there are transcoders, MLP outputs are taken apart."""
    shares = {order: {} for order in active.rows}
    for order, rows in active.rows.items():
        total = float(active.f[rows].sum())
        for row in rows.tolist():
            tokens = batch.tokens[row, :int(batch.pos["end"][row]) + 1]
            traced = trace_prompt(model, saes, tokens, transcoders)
            position = int(batch.pos[active.place][row])
            reader = Place("feature", active.layer, position, active.feature)
            terms = read_terms(traced, reader)
            written, values = terms.over_heads()
            for n, value in zip(written.tolist(), values.tolist()):
                writer = traced.components.place(n)
                name = what_stands_at(writer.position, batch.pos, row)
                add(shares[order], (name, writer.name()), value / total)
            constants = float(terms.value[terms.component < 0].sum())
            add(shares[order], ("constant", ""), constants / total)
    return shares


def add(sums, key, value):
    """Add to one of several sums, which starts at 0."""
    sums[key] = sums.get(key, 0) + value


def study_saes(ioi, n_shown=12, n_read=5):                  # -> dict
    """Does the task survive the SAEs, and which features does it hang on?"""
    all_z = {layer: splice(sae) for layer, sae in ioi.saes.items()}
    all_mlps = {layer: splice_mlp(one) for layer, one in ioi.transcoders.items()}
    edits = {f"layer {layer}": ({layer: edit}, {}) for layer, edit in all_z.items()}
    edits["all SAEs"] = (all_z, {})
    if all_mlps:
        mlps = "transcoders of " + ",".join(map(str, all_mlps))
        edits[mlps] = ({}, all_mlps)
        edits[f"all SAEs, {mlps}"] = (all_z, all_mlps)
    spliced = {}
    for name, (edit_z, edit_mlp) in edits.items():
        spliced[name] = spliced_difference(ioi.model, ioi.batch, edit_z, edit_mlp).cpu().numpy()
    places = {place: study_place(ioi, place, n_shown, n_read) for place in ("S2", "end")}
    return {"spliced": spliced, "places": places}


def study_place(ioi, place, n_shown, n_read):               # -> dict
    """Every feature active at one place removed in turn; the strongest read by DFA and recursive
    DFA."""
    effects = {}
    errors = {}
    for layer, sae in ioi.saes.items():
        at = (ioi.model, sae, layer, ioi.batch, ioi.clean, place)
        effects[layer] = ablate_features(*at)
        errors[layer] = ablate_error(*at).cpu().numpy()
    ranked = rank_features(effects, ioi.batch.prompts, n_shown)
    for rank, of_feature in enumerate(ranked):
        layer = of_feature["layer"]
        i = of_feature["feature"]
        raised = token_effects(ioi.model, layer, ioi.saes[layer], i)
        of_feature["raises"] = ioi.study.tokenizer.decode([int(raised.argmax())])
        if rank < n_read:
            of_feature |= read_feature(ioi, layer, i, place)
    return {"n_removed": sum(len(e.row) for e in effects.values()), "features": ranked,
            "errors": errors}


def read_feature(ioi, layer, feature, place):               # -> dict
    """Where a feature reads, and who wrote there, in the prompts where it is most active."""
    sae = ioi.saes[layer]
    active = most_active_prompts(sae, layer, feature, ioi.batch, ioi.clean, place)
    reads = dfa_by_position(ioi.model, sae, ioi.batch, active)
    writers = writers_by_position(ioi.model, ioi.saes, ioi.transcoders, ioi.batch, active)
    strongest = {}
    for order, shares in writers.items():
        parts = [[name, writer, share] for (name, writer), share in shares.items() if writer]
        strongest[order] = sorted(parts, key=lambda part: -abs(part[2]))[:8]
    return {"reads": reads, "n_read": {order: len(rows) for order, rows in active.rows.items()},
            "reads_further": strongest}


# ---- the " and" signal (Fig. 5, 14) ----


def recovered(patched, clean, zero):                        # (N,) each -> value | None, interval
    """(LD_patched - LD_zero) / (LD_clean - LD_zero), a ratio of means, as a float, with its
    bootstrap interval over prompts; (None, None) unless the interval of the mean of LD_clean -
    LD_zero lies above 0. (Any run with all of a signal may stand for clean, and any without it for
    zero.)"""
    patched, clean, zero = (ld.cpu().double().numpy() for ld in (patched, clean, zero))
    _, (low, _) = mean_with_ci(clean - zero)
    if low <= 0:
        return None, None

    def ratio(drawn):
        return (patched[drawn] - zero[drawn]).mean() / (clean[drawn] - zero[drawn]).mean()

    return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))


def recovered_by_order(patched, clean, zero, batch):        # -> {"all" or order: (value, interval)}
    """`recovered` over all prompts, and over those of each order of names. Where there is nothing
    to recover over all, there is nothing in one order either: what is left there by chance is a
    small number to divide by."""
    found = {"all": recovered(patched, clean, zero)}
    for order in ORDERS:
        which = batch.has_order(order)
        found[order] = recovered(patched[which], clean[which], zero[which])
    if found["all"] == (None, None):
        found = dict.fromkeys(found, (None, None))
    return found


def baselines(model, batch, clean, layers):                 # -> {name: (N,) LD}
    """What is taken as no signal: zero at S2; at S2 the mean over these prompts; zero at all
    positions, as in the released code."""
    S2 = batch.pos["S2"]
    zero = {}
    mean = {}
    for layer in layers:
        z = z_at(clean.z[layer], batch, "S2")
        zero[layer] = patch_at(torch.zeros_like(z), S2)
        mean[layer] = patch_at(z.mean(0).expand_as(z), S2)
    everywhere = {layer: torch.zeros_like for layer in layers}
    return {"zero": logit_diff_with(model, clean, batch, zero, "S2"),
            "mean": logit_diff_with(model, clean, batch, mean, "S2"),
            "zero everywhere": logit_diff_with(model, clean, batch, everywhere, "BOS")}


def recovered_over(without, patched, clean, batch):         # -> {way: value, way_ci: interval}
    """`recovered` over zero at S2, for both orders of names as well, and over the other
    baselines."""
    ways = recovered_by_order(patched, clean, without["zero"], batch)
    ways["recovered"] = ways.pop("all")
    for name in ("mean", "zero everywhere"):
        ways[f"over {name}"] = recovered(patched, clean, without[name])
    found = {}
    for way, (value, interval) in ways.items():
        found |= {way: value, f"{way}_ci": interval}
    return found


def ci(values):                                             # (N,) -> [mean, [low, high]]
    """A mean over prompts with its 95% interval."""
    return mean_with_ci(values.cpu().numpy())


# Sources whose results are compared below.
OTHER_NAMES, FLIPPED = "other names", "other names, order flipped"
WITH_FILLER, WITH_FILLER_FLIPPED = "names and filler", "names, filler, order flipped"


def connectors_of_one_token(ioi, frequent):                 # -> {in quotes: connector}
    """The connectors other than " and", a frequent word among them, that are one token here."""
    encode = ioi.study.tokenizer.encode
    return {repr(connector.strip()): connector for connector in (*CONNECTORS[1:], frequent)
            if len(encode(connector)) == 1}


def source_prompts(ioi, frequent):                          # -> {name: list of Prompt}
    """The prompts whose z_cat at S2 is put into the clean run: the connectors with the prompt's own
    names, as in the paper, and with others."""
    prompts = ioi.batch.prompts
    others = ioi.others
    noisy = with_filler(others, ioi.seed)
    sources = {"itself": prompts, OTHER_NAMES: others, FLIPPED: flipped(others),
               WITH_FILLER: noisy, WITH_FILLER_FLIPPED: flipped(noisy)}
    for word, connector in connectors_of_one_token(ioi, frequent).items():
        sources[f"connector {word}"] = with_connector(prompts, connector)
        sources[f"{OTHER_NAMES}, {word}"] = with_connector(others, connector)
    return sources


def effects_of_order(ioi, ld, layers):                      # -> {from what: mean, interval}
    """What it costs to flip the order of names in the source: over all prompts, over those of each
    order, and with one of the layers patched alone."""
    effect = ld[OTHER_NAMES] - ld[FLIPPED]
    effects = {"other names": effect}
    for order in ORDERS:
        effects[f"other names, in {order}"] = effect[ioi.batch.has_order(order)]
    effects["other names and filler"] = ld[WITH_FILLER] - ld[WITH_FILLER_FLIPPED]
    for layer in layers:
        same = ioi.patch_S2_from(ioi.others, [layer])
        turned = ioi.patch_S2_from(flipped(ioi.others), [layer])
        effects[f"other names, layer {layer} alone"] = same - turned
    return {name: ci(values) for name, values in effects.items()}


def heads_with_order(ioi, layers, n_shown=8):               # -> [dict]
    """Which heads carry the order of names from S2 to the end.

    z_cat of the layers at S2 comes from prompts with other names; one head's z at the end is then
    what it is where their order is flipped. The logit difference that is lost is the head's part of
    the effect of order, directly or in all: `effects_of_heads`, with the other sign.
    """
    same = ioi.run_with_S2_from(ioi.others, layers)
    turned = ioi.run_with_S2_from(flipped(ioi.others), layers)
    runs = (ioi.model, same, ioi.batch, turned, ioi.batch)
    direct = -effects_of_heads(*runs, "end", is_direct=True)            # (N,L,H)
    in_all = -effects_of_heads(*runs, "end")
    size = np.abs(direct.mean(0)) + np.abs(in_all.mean(0))
    heads = []
    for i in np.argsort(-size, axis=None)[:n_shown]:
        layer, head = divmod(int(i), ioi.model.config.n_heads)
        heads.append({"head": f"{layer}.{head}", "direct": mean_with_ci(direct[:, layer, head]),
                      "in_all": mean_with_ci(in_all[:, layer, head])})
    return heads


def compare_connectors(ioi, ld, layers, frequent):          # -> {word: dict}
    """What another connector does to the effect of order, from prompts with other names.

    "kept": (LD_X - LD_flipped) / (LD_same - LD_flipped), where X has the connector, and the other
    two have " and"; over the base prompts of each order too, since in BABA the connector is the
    token after S1, and in ABBA it is not. "own": what flipping the order costs where both sources
    have the connector, LD_X - LD_{X, flipped}.
    """
    found = {}
    for word, connector in connectors_of_one_token(ioi, frequent).items():
        patched = ld[f"{OTHER_NAMES}, {word}"]
        kept = recovered_by_order(patched, ld[OTHER_NAMES], ld[FLIPPED], ioi.batch)
        turned = ioi.patch_S2_from(flipped(with_connector(ioi.others, connector)), layers)
        found[word] = {"kept": kept.pop("all"), **kept, "own": ci(patched - turned)}
    return found


@torch.no_grad()
def order_in_features(ioi, layer, n_tried=20, n_shown=5):   # -> dict
    """Which features of a layer carry the order of names.

    z_cat at S2 comes from prompts with other names. To flip the order there adds to z_cat
    sum_i (f_flipped_i - f_i) W_dec_i, and the change of the SAE's error. The effect of order of a
    part of this sum is the logit difference that is lost where that part alone is added. Tried are
    the features whose part is largest on average, and shown those with the largest effect.
    """
    sae = ioi.saes[layer]
    z = ioi.z_at_S2(ioi.others, [layer])[layer]
    z_flipped = ioi.z_at_S2(flipped(ioi.others), [layer])[layer]
    f = sae.encode(z)
    f_flipped = sae.encode(z_flipped)
    ld = ioi.patch_S2({layer: z})

    def effect(part):                                       # (N,D) -> (N,)
        return ld - ioi.patch_S2({layer: z + part})

    whole = z_flipped - z
    of_features = sae.decode(f_flipped) - sae.decode(f)
    parts = {"all": whole, "all features": of_features, "SAE error": whole - of_features}
    change = f_flipped - f
    sizes = change.abs().mean(0) * sae.W_dec.norm(dim=-1)
    tried = sizes.topk(min(n_tried, sae.d_sae)).indices.tolist()
    effects = {i: effect(change[:, i, None] * sae.W_dec[i]) for i in tried}
    strongest = sorted(effects, key=lambda i: -abs(float(effects[i].mean())))[:n_shown]
    return {"parts": {name: ci(effect(part)) for name, part in parts.items()},
            "n_tried": len(tried),
            "features": [order_in_feature(ioi, layer, i, f[:, i], f_flipped[:, i], effects[i])
                         for i in strongest]}


def order_in_feature(ioi, layer, feature, f, f_flipped, effect):        # (N,) x 3 -> dict
    """One feature: its activation in sources of either order; what it reads in the order in which
    it is more active, in prompts with their own names; and what it costs to flip its part, also in
    prompts of either order alone."""
    is_ABBA = ioi.batch.has_order("ABBA")
    # f is of sources in the order of their prompts, f_flipped of sources in the other order
    in_ABBA = float(torch.where(is_ABBA, f, f_flipped).mean())
    in_BABA = float(torch.where(is_ABBA, f_flipped, f).mean())
    order = "ABBA" if in_ABBA > in_BABA else "BABA"
    sae = ioi.saes[layer]
    active = most_active_prompts(sae, layer, feature, ioi.batch, ioi.clean, "S2")
    active = active._replace(rows={order: active.rows[order]})
    reads = dfa_by_position(ioi.model, sae, ioi.batch, active)
    return {"feature": feature, "f_in_ABBA": in_ABBA, "f_in_BABA": in_BABA, "reads": reads,
            "effect": ci(effect), "ABBA": float(effect[is_ABBA].mean()),
            "BABA": float(effect[~is_ABBA].mean())}


def side_and_position(ioi, layers):                         # -> {cell or effect: [mean, interval]}
    """Side of the connector crossed with S1's position, from prompts with other names: logit
    differences, and effects as differences of two. Both get fillers, the prompts that are patched
    too, so that their clean run is another. Empty if no filler of this vocabulary grows by two
    tokens.

    The other side is the other order, so only at "same" does S1 stand at one position on both
    sides. At "2 tokens" it moves in opposite directions, and at "a sentence" it is two tokens
    apart.
    """
    prompts = ioi.batch.prompts

    def n_tokens(text):
        return len(ioi.study.tokenizer.encode(" " + text))

    fits = [filler for filler in FILLERS if n_tokens(longer(filler)) == n_tokens(filler) + 2]
    if not fits:
        return {}
    rng = random.Random(f"fillers {ioi.seed}")
    fillers = [rng.choice(fits) for _ in prompts]
    batch, clean = ioi.run(placed(prompts, fillers, "same"))
    with_fillers = ioi._replace(batch=batch, clean=clean)

    ld = {}
    for side, sources in (("same side", ioi.others), ("other side", flipped(ioi.others))):
        for position in POSITIONS:
            ld[side, position] = with_fillers.patch_S2_from(placed(sources, fillers, position),
                                                            layers)
    cells = {"clean, with fillers": clean.ld}
    cells |= {f"{side}, {position}": patched for (side, position), patched in ld.items()}
    for p in POSITIONS:
        cells[f"effect of side, at position: {p}"] = ld["same side", p] - ld["other side", p]
    for side in ("same side", "other side"):
        for p in POSITIONS[1:]:
            cells[f"effect of position: {p}, on the {side}"] = ld[side, "same"] - ld[side, p]
    return {cell: ci(values) for cell, values in cells.items()}


def study_signal(ioi, layers, frequent):                    # -> dict
    """What z_cat at S2 tells the later layers: noising, connectors, side and position."""
    clean = ioi.clean
    without_signal = baselines(ioi.model, ioi.batch, clean, layers)
    ld = {name: ioi.patch_S2_from(prompts, layers)
          for name, prompts in source_prompts(ioi, frequent).items()}
    sources = {}
    for name, patched in ld.items():
        sources[name] = {"patched": ci(patched), "change": ci(patched - clean.ld)}
        sources[name] |= recovered_over(without_signal, patched, clean.ld, ioi.batch)
    means = {name: ci(of_prompts)
             for name, of_prompts in {"clean": clean.ld, **without_signal}.items()}
    return {"n_prompts": len(clean.ld), "layers": layers, "frequent_word": frequent,
            "effect_of_order": effects_of_order(ioi, ld, layers),
            "heads": heads_with_order(ioi, layers),
            "connectors": compare_connectors(ioi, ld, layers, frequent),
            "features": {layer: order_in_features(ioi, layer)
                         for layer in layers if layer in ioi.saes},
            "sources": sources, "side_and_position": side_and_position(ioi, layers), **means}


# ---- why there ----


@torch.no_grad()
def why_io(model, saes, transcoders, layer, head, batch, n):
    """The score of IO less that of S1 from the end, for one head, as a sum over pairs of writers:
    mean over the first n prompts, strongest first -> score, [(query, key, value)]."""
    sums = {}
    score = 0.0
    for row in range(n):
        end, io, s1 = (int(batch.pos[place][row]) for place in ("end", "IO", "S1"))
        traced = trace_prompt(model, saes, batch.tokens[row, :end + 1], transcoders)
        why = qk(traced, layer, head, end, io, against=s1)
        score += why.score / n
        for a, values in zip(why.query, why.pairs.tolist()):
            for b, value in zip(why.key, values):
                add(sums, (a.name(), b.name()), value / n)
    pairs = [(*pair, value) for pair, value in sums.items()]
    return score, sorted(pairs, key=lambda pair: -abs(pair[2]))


def sees_both_names(ioi, layer):
    """Whether a layer sees IO and S1 from the end of every prompt."""
    positions = zip(*(ioi.batch.pos[name].tolist() for name in ("end", "IO", "S1")))
    for end, io, s1 in positions:
        keys = seen_keys(ioi.model, layer, end)
        if io not in keys or s1 not in keys:
            return False
    return True


def study_qk(ioi, movers):                                  # -> {head: dict}
    """Why the name movers look at IO and not at S1, in the first prompts."""
    n = min(24, len(ioi.batch.prompts))
    why = {}
    for layer, head in movers:
        if not sees_both_names(ioi, layer):
            print(f"note: the window of layer {layer} ends before the names; why head "
                  f"{layer}.{head} looks where it looks is left out")
            continue
        score, pairs = why_io(ioi.model, ioi.saes, ioi.transcoders, layer, head, ioi.batch, n)
        why[f"{layer}.{head}"] = {"n_prompts": n, "score": score, "pairs": pairs[:20]}
    return why


# ---- the program ----


@dataclass(frozen=True)
class IOIConfig(StudyConfig):
    n_prompts: int = field(200, "prompts, half of them ABBA and half BABA")
    names: str = field(",".join(HELD_OUT_NAMES), "names, each one token with a space before it")
    corpus: str = field("python", "text in which the frequency of words is counted: see train.py")
    signal_layers: tuple[int, ...] = field((), "layers whose z_cat at S2 carries the signal; if "
                                           "not given, the two that act most there (paper: 5,6)")


def main():
    config = parse_flags(IOIConfig, __doc__)
    study = begin(config, "ioi")
    study.model.check_layers(config.signal_layers)
    ioi, frequent = prepare(study)
    circuit = study_circuit(ioi)
    report_circuit(ioi, circuit)
    through_saes = study_saes(ioi)
    report_saes(ioi, through_saes)
    half = ioi.pick(circuit["signal_rows"])
    signal = study_signal(half, circuit["signal_layers"], frequent)
    report_signal(half, signal)
    why = study_qk(ioi, circuit["movers"])
    report_qk(ioi, why)
    finish(study)


def prepare(study):                                         # -> IOI, a word as frequent as " and"
    """The prompts and the clean run. Raises UserError if the model cannot take them."""
    config = study.config
    tokenizer = study.tokenizer
    if config.n_prompts < 20:
        raise UserError(f"--n-prompts must be 20 or more for intervals, not {config.n_prompts}.")
    names = names_of_one_token([name.strip() for name in config.names.split(",")], tokenizer)
    prompts = draw_prompts(config.n_prompts, names, tokenizer, config.seed)
    # the longest prompts of the study
    longest_filler = max(FILLERS, key=lambda filler: len(tokenizer.encode(" " + filler)))
    longest = placed(prompts, [longest_filler] * len(prompts), "a sentence")
    T = tokenise(longest, tokenizer).tokens.shape[1]
    if T > study.model.config.n_ctx:
        raise UserError(f"IOI prompts of {T} tokens do not fit this model, which takes 1 to "
                        f"{study.model.config.n_ctx}; name one of longer context with --model.")
    text = held_out_rows(study, 512, at_least=1)
    batch = tokenise(prompts, tokenizer, study.device)
    ioi = IOI(study, names, batch, run_prompts(study.model, batch))
    return ioi, frequent_word(text, tokenizer, CONNECTORS)


def frequent_word(rows, tokenizer, taken):
    """A word about as frequent as " and" in the text: the token that is a space and letters, and
    not among those taken, with the nearest count."""
    counts = torch.bincount(rows.flatten().cpu(), minlength=tokenizer.n_vocab)
    distance = (counts - counts[tokenizer.single(" and")]).abs()
    for token in distance.argsort(stable=True).tolist():
        word = tokenizer.decode([token])
        if word[:1] == " " and word[1:].isalpha() and word not in taken:
            return word
    raise UserError("this vocabulary has no word besides the connectors: no token that is a space "
                    "and letters.")


# ---- the report ----


def mean_text(values, spec="+.2f"):                         # (N,) -> "mean [low, high]"
    """A mean over prompts with its 95% interval."""
    return format_ci(*mean_with_ci(values), spec)


def report_circuit(ioi, result):
    """The task, every head's effects and roles, and the layers that act at S2."""
    study = ioi.study
    batch = ioi.batch
    ld = result["ld"]
    source_ld = result["source_ld"]
    unit = result["unit"]
    spec = ".1%" if result["told_apart"] else ".2f"
    of_what = "part of clean - source" if result["told_apart"] else "logits"
    text = study.tokenizer.decode(batch.tokens[0][1:batch.pos["end"][0] + 1])
    print(f"{len(ld)} prompts, such as: {text!r}")
    for order in ORDERS:
        of_order = ld[batch.has_order(order).cpu().numpy()]
        n_right = int((of_order > 0).sum())
        right = format_ci(n_right / len(of_order), wilson(n_right, len(of_order)), ".1%")
        print(f"{order}  logit difference {mean_text(of_order)}, IO above S in {right}")
    _, (low, _) = mean_with_ci(ld)
    if low <= 0 or (ld > 0).mean() < 0.6:
        print("this model does not do the task; what follows describes its heads all the same")
    print(f"with the other name at S2: {mean_text(source_ld)}; effects: " + (
        f"parts of the difference, {unit:.2f}" if result["told_apart"] else
        "in logits, and no roles, since the other name at S2 does not clearly lower it"))

    effects = result["effects"]
    print_heads(result, spec)
    roles = dict(result["roles"])
    if result["told_apart"]:
        roles["no role"] = without_role(roles, effects)
    for role, heads in roles.items():
        print(f"{role:20} " + (" ".join(f"{layer}.{h}" for layer, h in heads) or "none"))
    print("whole layers patched at S2: " + "  ".join(
        f"{layer} {effect:+{spec}}" for layer, effect in enumerate(result["layer_effects"])))
    reported(study, "name movers 9.9 9.6 10.0, negative 10.7 11.10, S-inhibition 7.3 7.9 8.6 8.10, "
             "induction 5.5 6.9, duplicate token 0.1 3.0, previous token 2.2 4.11 (Wang et al.)")

    n_right = int((ld > 0).sum())
    write_json(study.folder / "circuit.json", {
        "logit_difference": mean_with_ci(ld), "source": mean_with_ci(source_ld),
        "accuracy": [n_right / len(ld), wilson(n_right, len(ld))], "roles": result["roles"],
        "attention": {pair: weight.tolist() for pair, weight in result["attention"].items()},
        "clean_less_source": unit if result["told_apart"] else None,
        "layers_at_S2": [effect * unit for effect in result["layer_effects"]],
        **{name: mean_with_ci(getattr(result["by_prompt"], name))
           for name in ("dla", "dla_io", "dla_s", *effects)}})
    plot_effects({"direct logit attribution": result["by_prompt"].dla.mean(0),
                  "patched at the end, directly": effects["direct"],
                  "patched at the end": effects["at_end"],
                  "patched at S2": effects["at_S2"]}, of_what, study.folder / "heads.png")
    if result["told_apart"]:
        plot_circuit(roles, effects["at_end"], effects["at_S2"], study.folder / "circuit.png")
    else:
        (study.folder / "circuit.png").unlink(missing_ok=True)      # of an earlier run


def print_heads(result, spec, n=12):
    """The heads with the largest effects: direct logits, patching, and what they look at. spec: the
    format of an effect."""
    print("direct logit attribution to IO and to S: less that to the mean name\n"
          "head   directly to IO      to S   patched at the end: directly   in all   "
          "patched at S2   looks at")
    effects = result["effects"]
    dla_io = result["by_prompt"].dla_io.mean(0)
    dla_s = result["by_prompt"].dla_s.mean(0)
    size = sum(np.abs(effect) for effect in effects.values())
    for i in np.argsort(-size, axis=None)[:n]:
        head = divmod(int(i), dla_io.shape[1])
        looks = ", ".join(f"{pair} {weight[head]:.2f}"
                          for pair, weight in result["attention"].items()
                          if weight[head] >= LOOKS_AT)
        name = f"{head[0]}.{head[1]}"
        print(f"{name:6} {dla_io[head]:+14.2f} {dla_s[head]:+9.2f} "
              f"{effects['direct'][head]:+30{spec}} {effects['at_end'][head]:+8{spec}} "
              f"{effects['at_S2'][head]:+15{spec}}   {looks}".rstrip())


def report_saes(ioi, result):
    """The logit difference through SAEs, and the features it hangs on."""
    clean = ioi.clean.ld.cpu().numpy()
    or_transcoders = ", or transcoders," if ioi.transcoders else ""
    print(f"\nlogit difference with SAEs{or_transcoders} spliced in (clean {mean_text(clean)})")
    width = max(map(len, result["spliced"]))
    for name, ld in result["spliced"].items():
        print(f"{name:{width}} {mean_text(ld)}, IO above S in {(ld > 0).mean():.1%}")
    places = {}
    for place, found in result["places"].items():
        report_place(place, found)
        errors = {layer: mean_with_ci(change) for layer, change in found["errors"].items()}
        places[place] = {"n_removed": found["n_removed"], "features": found["features"],
                         "error": errors}
    write_json(ioi.study.folder / "features.json", {
        "clean": mean_with_ci(clean), "places": places,
        "spliced": {name: mean_with_ci(ld) for name, ld in result["spliced"].items()}})
    plot_ablations(places, ioi.study.folder / "features.png")


def report_place(place, found):
    """The features that matter at one place, and what the strongest read."""
    print(f"\nat {place}: {found['n_removed']:,} removals of one feature; change of the logit "
          f"difference, mean over all prompts,\nby order of names, and over those where it is "
          f"active; ranked and measured on the same prompts\nfeature    active in   change"
          f"                     ABBA    BABA   where active   raises most")
    for one in found["features"]:
        change = format_ci(one["effect"], one["effect_ci"], "+.3f")
        name = f"{one['layer']}.{one['feature']}"
        print(f"{name:10} {one['n_active']:5}      {change}  "
              f"{one['ABBA']:+6.3f}  {one['BABA']:+6.3f} {one['where_active']:+11.2f}    "
              f"{one['raises']!r}")
    for layer, change in found["errors"].items():
        print(f"{f'SAE error {layer}':22}{mean_text(change, '+.3f')}")
    for one in found["features"]:
        if "reads" not in one:
            continue
        print(f"{one['layer']}.{one['feature']} reads, in shares of its activation (number of "
              f"prompts)")
        for order, shares in one["reads"].items():
            print(f"  {order} ({one['n_read'][order]})  {strongest_shares(shares)}")
            if shares:
                writers = "  ".join(f"{writer} at {name} {share:+.0%}"
                                    for name, writer, share in one["reads_further"][order][:4])
                print(f"        written by  {writers}")


def report_signal(ioi, result):
    """What z_cat at S2 from other prompts leaves of the logit difference, of the effect of order,
    and of what zero takes away."""
    study = ioi.study
    layers = result["layers"]
    print(f"\nz_cat of layers {' and '.join(map(str, layers))} at S2 from other prompts; "
          f"{result['n_prompts']} prompts" + (
              "" if study.config.signal_layers else
              ", the second half; the first chose the layers") + "\nlogit difference: " + ", ".join(
                  f"{name} {format_ci(*result[name], '+.2f')}"
                  for name in ("clean", "zero", "mean", "zero everywhere")))
    for name, effect in result["effect_of_order"].items():
        print(f"effect of order, {name}: {format_ci(*effect, '+.2f')}")
    print("\nheads that carry the order from S2 to the end: parts of the effect of order, other "
          "names\nhead   directly                 in all")
    for head in result["heads"]:
        print(f"{head['head']:6} {format_ci(*head['direct'], '+.3f'):23}  "
              f"{format_ci(*head['in_all'], '+.3f')}")
    print("\nsource                          patched             less clean")
    for name, r in result["sources"].items():
        print(f"{name:30} {format_ci(*r['patched'], '+.2f'):19} {format_ci(*r['change'], '+.2f')}")
    print(f"\nother connectors, from prompts with other names; {result['frequent_word']!r} is "
          f"about as frequent as \" and\"\n{'connector':13} {'effect of order kept':23}  "
          f"{'in ABBA':24} {'in BABA':24} its own effect of order")
    for word, r in result["connectors"].items():
        kept = format_ci(*r["kept"], ".1%")
        in_ABBA, in_BABA = (format_ci(*r[order], ".1%") for order in ("ABBA", "BABA"))
        print(f"{word:13} {kept:23}  {in_ABBA:24} {in_BABA:24} {format_ci(*r['own'], '+.2f')}")
    for layer, found in result["features"].items():
        report_order_in_features(layer, found)
    print("\nsource                         recovered                   ABBA     BABA   "
          "over mean   over zero everywhere")
    for name, r in result["sources"].items():
        shown = {way: "n/a" if r[way] is None else f"{r[way]:.1%}"
                 for way in ("ABBA", "BABA", "over mean", "over zero everywhere")}
        print(f"{name:30} {format_ci(r['recovered'], r['recovered_ci'], '.1%'):25} "
              f"{shown['ABBA']:>7}  {shown['BABA']:>7}   {shown['over mean']:>9}   "
              f"{shown['over zero everywhere']:>20}")
    reported(study, "layers 5 and 6: other names and filler, order around \" and\" kept: 93% "
             "recovered; \" alongside\": 43%")
    if result["side_and_position"]:
        print("\nside of the connector and position of S1, from prompts with other names and with "
              "fillers; logit difference")
        for cell, found in result["side_and_position"].items():
            print(f"{cell:50} {format_ci(*found, '+.2f')}")
    else:
        print("side and position: no filler of this vocabulary grows by two tokens; left out")
    write_json(study.folder / "signal.json", result)
    lines = {f"{name} there": result[name][0] - result["clean"][0] for name in ("zero", "mean")}
    plot_signal(result["sources"], lines, layers, study.folder / "signal.png")
    effects = {name: found for name, found in result["side_and_position"].items()
               if name.startswith("effect of")}
    plot_side_and_position(effects, study.folder / "side_and_position.png")


def report_order_in_features(layer, found):
    """The features that carry the order of names, and what they read."""
    print(f"\nlayer {layer} alone, feature by feature: z_cat at S2 from prompts with other names, "
          f"the order flipped in one\nfeature's part; of the {found['n_tried']} features that "
          f"change most, those with the largest effect\n"
          f"feature     f in ABBA   in BABA   effect of order         on ABBA  on BABA")
    for one in found["features"]:
        name = f"{layer}.{one['feature']}"
        print(f"{name:10} {one['f_in_ABBA']:10.2f} {one['f_in_BABA']:9.2f}   "
              f"{format_ci(*one['effect'], '+.3f'):23} {one['ABBA']:+7.3f}  {one['BABA']:+7.3f}")
        for order, shares in one["reads"].items():
            print(f"  reads in {order}  {strongest_shares(shares)}")
    for name, effect in found["parts"].items():
        print(f"{name:34} {format_ci(*effect, '+.3f')}")


def strongest_shares(shares, n=5):
    """"IO +53%  S1 +25%", of a feature's activation, or "never active"."""
    strongest = sorted(shares.items(), key=lambda item: -abs(item[1]))[:n]
    return "  ".join(f"{name} {share:+.0%}" for name, share in strongest) or "never active"


def report_qk(ioi, why):
    """The strongest pairs behind the scores of the name movers, or of the head that stands in for
    them."""
    for head, found in why.items():
        print(f"\nhead {head} scores IO {found['score']:+.2f} above S1 from the end, mean over "
              f"{found['n_prompts']} prompts; at the end x at IO and S1:")
        for a, b, value in found["pairs"][:8]:
            print(f"{value:+8.3f}   {a}  x  {b}")
    write_json(ioi.study.folder / "qk.json", why)


if __name__ == "__main__":
    run(main)
