"""The indirect-object-identification (IOI) study (the paper, Fig. 5, 14 and 16; the task: Wang et al. 2022).

    When Mary and John went to the store, John gave a drink to  ->  Mary
         IO   and S1                      S2               end      logit difference = logit[IO] - logit[S]

ABBA is this order of names; BABA has S before the connector, IO after it.

    circuit     direct logit attribution, attention, and activation patching of every head; their roles
    features    with SAEs spliced in, is the task still done? With the SAE error kept, which features, at S2
                and at the end, does it depend on, and what do they look at?
    signal      what do the layers that act at S2 tell the rest: where S1 was, or on which side of " and"?
                z_cat at S2 is replaced by another prompt's
    qk          why do the name movers look at IO rather than at S?

    python ioi.py                           all four on the shipped model, as tables, JSON and figures in
                                            <out>/<model>/ioi/

A *source* prompt differs from its base prompt in what is stated. Patching puts the source's z_cat at a place
of its own into the base run at the corresponding place, row by row. Recovered = (LD_patched - LD_zero) /
(LD_clean - LD_zero), a ratio of means over prompts; LD_zero has z_cat = 0 there, in the model's own weights.

Shapes: N prompts, T positions, H heads, D = H*d_head, d_sae; L layers.
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from attribution import (KINDS, children, constants, dfa, head_logits, name_part, qk, token_effects,
                         trace_run, varying)
from data import common
from data.bpe import Tokenizer
from data.common import (Progress, UserError, bootstrap, field, mean_of, parse_flags, wilson, with_interval,
                         write_json)
from data.figures import plot_ablations, plot_cells, plot_circuit, plot_effects, plot_signal
from data.stories import HELD_OUT_NAMES, OBJECTS, PLACES
from data.study import StudyConfig, begin, finish, reported
from sae import ablate, splice

# ---- prompts ----

# (opening, what the two did, what the giver did). The stories that tiny was trained on never join these verbs
# with this text between the names.
TEMPLATES = (("When", " went to the {place},", " gave a {object} to"),
             ("After", " got to the {place},", " presented a {object} to"),
             ("While", " were working at the {place},", " rolled a {object} to"),
             ("Once", " came back from the {place},", " delivered the {object} to"),
             ("Because", " left the {place},", " slid a {object} to"),
             ("Then", " met at the {place}.", " pushed the {object} to"),
             ("Yesterday", " looked around the {place}.", " awarded a {object} to"),
             ("At last", " sat down in the {place}.", " lowered the {object} to"),
             ("So", " cleaned the {place}.", " donated a {object} to"),
             ("Afterwards", " had lunch near the {place}.", " kicked a {object} to"))
FILLERS = ("the rain had stopped.", "it was a quiet morning.", "the dog was asleep.",
           "nobody else was there.", "the door was open.", "the sun was going down.")
CONNECTORS = (" and", " alongside", " or", " but", " with", " plus", ",")
ORDERS = ("ABBA", "BABA")
NAMED_POSITIONS = ("IO", "S1", "S1+1", "connector", "S2", "end")


@dataclass(frozen=True)
class Prompt:
    """One prompt in words. dataclasses.replace makes the flips."""
    template: int           # of TEMPLATES
    order: str              # ABBA: IO, connector, S; BABA: S, connector, IO
    io: str
    s: str
    place: str
    object: str
    connector: str = " and"
    front: str = ""         # a sentence before the prompt
    middle: str = ""        # a sentence before S2


class Prompts(NamedTuple):
    """Prompts as tokens. What stands after the end of a shorter one is BOS and changes nothing before it."""
    tokens: Tensor          # (N,T)
    pos: dict               # {named position: (N,)}
    io: Tensor              # (N,) token
    s: Tensor               # (N,) token
    words: list             # (N,) Prompt

    def pick(self, which):
        words = [self.words[i] for i in which.tolist()]
        return Prompts(self.tokens[which], {name: at[which] for name, at in self.pos.items()}, self.io[which],
                       self.s[which], words)


def draw_prompts(n, names, tokenizer, seed=0):                          # -> list of Prompt
    """n prompts, ABBA and BABA in turn, templates in turn, everything else at random; two different names.

    Places and objects are those that are one token in this vocabulary. Raises UserError for a name that is
    not, and for fewer than four names.
    """
    if len(set(names)) < 4 or "" in names:
        raise UserError("--names takes four different names or more, with commas between them.")
    for name in names:
        tokenizer.single(" " + name)
    places, objects = ([word for word in words if len(tokenizer.encode(" " + word)) == 1]
                       for words in (PLACES, OBJECTS))
    if not places or not objects:
        raise UserError("no place or no object of the templates is one token in this model's vocabulary; the "
                        "study takes a model that knows such words.")
    rng, prompts = random.Random(f"ioi {seed}"), []
    for i in range(n):
        io, s = rng.sample(sorted(set(names)), 2)
        prompts.append(Prompt(i // 2 % len(TEMPLATES), ORDERS[i % 2], io, s, rng.choice(places),
                              rng.choice(objects)))
    return prompts


def build(words, tokenizer, device="cpu"):                              # list of Prompt -> Prompts
    """Tokens, BOS first, and where everything stands."""
    rows, places = [], []
    for one in words:
        opening, scene, giving = TEMPLATES[one.template]
        first, second = (one.io, one.s) if one.order == "ABBA" else (one.s, one.io)
        scene, giving = (text.replace("{place}", one.place).replace("{object}", one.object)
                         for text in (scene, giving))
        front = one.front[:1].upper() + one.front[1:]
        middle = one.middle if scene.endswith(",") else one.middle[:1].upper() + one.middle[1:]
        pieces = {"front": front, "opening": " " * bool(front) + opening, "first": " " + first,
                  "connector": one.connector, "second": " " + second, "scene": scene,
                  "middle": " " * bool(middle) + middle, "S2": " " + one.s, "giving": giving}
        ids, at = [tokenizer.bos], {}
        for name, text in pieces.items():
            at[name] = len(ids)
            ids += tokenizer.encode(text)
        io, s1 = (at["first"], at["second"])[:: 1 if one.order == "ABBA" else -1]
        rows.append(ids)
        places.append((io, s1, s1 + 1, at["connector"], at["S2"], len(ids) - 1))
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.bos)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = torch.tensor(ids)
    pos = dict(zip(NAMED_POSITIONS, torch.tensor(places).T.to(device)))
    single = lambda names: torch.tensor([tokenizer.single(" " + name) for name in names]).to(device)
    io, s = single(one.io for one in words), single(one.s for one in words)
    return Prompts(tokens.to(device), pos, io, s, words)


def with_other_names(words, names, seed=0):
    """The same prompts with two other names, none of them in the prompt before."""
    rng, others = random.Random(f"other names {seed}"), []
    for one in words:
        io, s = rng.sample([name for name in sorted(set(names)) if name not in (one.io, one.s)], 2)
        others.append(dataclasses.replace(one, io=io, s=s))
    return others


def with_filler(words, seed=0):
    """The same prompts with a sentence in front, and another before S2."""
    rng, changed = random.Random(f"filler {seed}"), []
    for one in words:
        a, b = rng.sample(FILLERS, 2)
        changed.append(dataclasses.replace(one, front=a, middle=b))
    return changed


def flipped(words):
    """The same names in the same roles, in the other order: ABBA <-> BABA."""
    return [dataclasses.replace(one, order=ORDERS[one.order == "ABBA"]) for one in words]


def other_giver(words):
    """The same text but for S2, which is the other name: roles and order both change."""
    return [dataclasses.replace(one, io=one.s, s=one.io) for one in flipped(words)]


# ---- runs and patches ----


class Base(NamedTuple):
    """A run of the model on the prompts, with what patches start from."""
    resid: list             # per layer (N,T,d_model): the stream before it
    z: list                 # per layer (N,T,D)
    ld: Tensor              # (N,) logit difference at the end


@torch.no_grad()
def base_run(model, prompts):                                           # -> Base
    """The run without an edit, layer by layer."""
    x, resid, z = model.embed(prompts.tokens), [], []
    for layer in range(model.config.n_layers):
        resid.append(x)
        # an edit that only looks: the run is then, bit for bit, the one that `edited` changes
        x, _ = model.through(x, {layer: lambda z_cat: z.append(z_cat) or z_cat}, layers=(layer,))
    return Base(resid, z, logit_difference(model, x, prompts))


def logit_difference(model, final, prompts):                            # (N,T,d_model) -> (N,)
    """logit[IO] - logit[S] at the end."""
    at = torch.arange(len(final), device=final.device)
    logits = model.unembed(final[at, prompts.pos["end"]]).float()
    return logits[at, prompts.io] - logits[at, prompts.s]


@torch.no_grad()
def edited(model, base, prompts, edit_z):                               # {layer: edit} -> (N,)
    """Logit difference with edits of z_cat, run from the first layer that is edited."""
    first = min(edit_z, default=0)
    final, _ = model.through(base.resid[first], edit_z, layers=range(first, model.config.n_layers))
    return logit_difference(model, final, prompts)


def put(values, at):                                                    # (N,D), (N,) -> edit
    """The edit that puts values[i] at position at[i] of row i, and leaves all else as it is."""
    def edit(z):
        z = z.clone()
        z[torch.arange(len(z), device=z.device), at] = values.to(z.dtype)
        return z
    return edit


def at_place(z, prompts, place):                                        # (N,T,D) -> (N,D)
    """z at a named position, which is each prompt's own."""
    return z[torch.arange(len(z), device=z.device), prompts.pos[place]]


def one_head(base_z, source_z, head, n_heads):                          # (N,D), (N,D) -> (N,D)
    """The base's z_cat with one head's part from the source."""
    z = base_z.unflatten(-1, (n_heads, -1)).clone()
    z[:, head] = source_z.unflatten(-1, (n_heads, -1))[:, head]
    return z.flatten(-2)


# ---- the circuit ----


class Circuit(NamedTuple):
    """What every head does; (N,L,H) each, logit differences for effects. `attention` has the keys that a role
    asks for, such as "end -> IO"."""
    attention: dict
    dla: np.ndarray         # direct logit attribution at the end: its part of the logit difference
    direct: np.ndarray      # change of LD if it is patched at the end, later layers' z_cat there frozen
    at_end: np.ndarray      # change of LD if it is patched at the end
    at_S2: np.ndarray       # change of LD if it is patched at S2


LOOKS = (("end", "IO"), ("end", "S1"), ("end", "S2"), ("S2", "S1"), ("S2", "S1+1"), ("S1+1", "S1"))
ANYWHERE = "each -> the one before"


@torch.no_grad()
def circuit(model, prompts, source, base, source_run, say=lambda done: None):
    """Attention and effects of every head. Source: the prompts with the other giver (`other_giver`); the
    effects are of putting the source's z of a head, at S2 or at the end, into the base run."""
    L, H = model.config.n_layers, model.config.n_heads
    rows, end = torch.arange(len(prompts.tokens), device=prompts.tokens.device), prompts.pos["end"]
    attention, before, gathered = {look: [] for look in LOOKS}, [], []
    queries = torch.arange(1, prompts.tokens.shape[1], device=end.device)
    counted = ((queries > 1) & (queries <= end[:, None])).to(base.ld.dtype)     # (N,T-1); BOS is not counted
    for _, kept in model.layer_by_layer(prompts.tokens):
        for q, k in LOOKS:
            attention[q, k].append(kept.pattern[rows, :, prompts.pos[q], prompts.pos[k]])
        to_before = kept.pattern.diagonal(-1, 2, 3)                                            # (N,H,T-1)
        before.append((to_before * counted[:, None]).sum(-1) / counted.sum(-1, keepdim=True))
        scale = kept.scales["attn_out"][rows, end] if "attn_out" in kept.scales else 1.0
        gathered.append((kept.z_cat[rows, end], scale))
    final = (kept.resid_pre + kept.attn_out + kept.mlp_out)[rows, end]
    direction = model.logit_directions(prompts.io) - model.logit_directions(prompts.s)
    direction = direction / model.final_scale(final)
    dla = [head_logits(z, model.head_matrices(layer), direction, scale) for layer, (z, scale) in
           enumerate(gathered)]
    effects = {"direct": [], "end": [], "S2": []}
    for layer in range(L):
        later = {l: put(at_place(base.z[l], prompts, "end"), end) for l in range(layer + 1, L)}
        for place in ("S2", "end"):
            mine, theirs = (at_place(run.z[layer], one, place)
                            for run, one in ((base, prompts), (source_run, source)))
            for h in range(H):
                patch = {layer: put(one_head(mine, theirs, h, H), prompts.pos[place])}
                effects[place].append(edited(model, base, prompts, patch) - base.ld)
                if place == "end":
                    effects["direct"].append(edited(model, base, prompts, patch | later) - base.ld)
        say(layer + 1)
    stack = lambda found: torch.stack(found, 1).unflatten(1, (L, H)).cpu().numpy()
    attention = {f"{q} -> {k}": found for (q, k), found in attention.items()} | {ANYWHERE: before}
    attention = {look: torch.stack(found, 1).cpu().numpy() for look, found in attention.items()}
    dla = torch.stack(dla, 1).cpu().numpy()
    return Circuit(attention, dla, stack(effects["direct"]), stack(effects["end"]), stack(effects["S2"]))


ROLES = ("name mover", "negative name mover", "S-inhibition", "duplicate token", "induction",
         "previous token")
ATTENDS, MATTERS = 0.2, 0.05    # least attention, and least effect as a part of LD_clean - LD_source


def roles(attention, direct, at_end, at_S2):            # {look: (L,H)}, (L,H) x 3 -> {role: [(layer, head)]}
    """Roles by rule, from means over prompts. Effects are changes as parts of LD_clean - LD_source, so a head
    that helps has a negative one.

    name mover           looks from the end at IO, and its direct effect is 5% of the difference or more
    negative name mover  the same with the opposite sign
    S-inhibition         looks from the end at S2, and in all has 5% more than directly: through later heads
    duplicate token      looks from S2 at S1, and patched at S2 has 5% or more
    induction            looks from S2 at S1+1, and patched at S2 has 5% or more
    previous token       looks from S1+1 at S1, and from all tokens at the one before: by attention alone,
                         since the patch cannot reach it
    To look is an attention of 0.2 or more, on average.
    """
    looks = {look: at >= ATTENDS for look, at in attention.items()}
    found = {"name mover": looks["end -> IO"] & (direct <= -MATTERS),
             "negative name mover": looks["end -> IO"] & (direct >= MATTERS),
             "S-inhibition": looks["end -> S2"] & (at_end - direct <= -MATTERS),
             "duplicate token": looks["S2 -> S1"] & (np.abs(at_S2) >= MATTERS),
             "induction": looks["S2 -> S1+1"] & (np.abs(at_S2) >= MATTERS),
             "previous token": looks["S1+1 -> S1"] & looks[ANYWHERE]}
    return {role: [tuple(map(int, head)) for head in np.argwhere(heads)] for role, heads in found.items()}


# ---- through SAEs (Fig. 16) ----


class FeatureEffects(NamedTuple):
    """What happens to LD when a feature is removed at one place of each prompt; one entry for each prompt in
    which it is active there. In the other prompts nothing happens."""
    row: Tensor             # (n,)
    feature: Tensor         # (n,)
    f: Tensor               # (n,) activation
    change: Tensor          # (n,) of LD


@torch.no_grad()
def remove_features(model, sae, layer, prompts, base, place):           # -> FeatureEffects
    """Each feature that is active at the place, removed in turn at each prompt's own, SAE error kept."""
    f = sae.encode(at_place(base.z[layer], prompts, place))
    row, feature = f.nonzero(as_tuple=True)
    change = []
    for part in torch.arange(len(row), device=row.device).split(256):
        some = prompts.pick(row[part])
        where = torch.arange(some.tokens.shape[1], device=row.device) == some.pos[place][:, None]
        edit = {layer: ablate(sae, feature[part], where)}
        x, later = base.resid[layer][row[part]], range(layer, model.config.n_layers)
        final, _ = model.through(x, edit, layers=later)
        change.append(logit_difference(model, final, some) - base.ld[row[part]])
    change = torch.cat(change) if change else f.new_zeros(0)
    return FeatureEffects(row, feature, f[row, feature], change)


@torch.no_grad()
def remove_error(model, sae, layer, prompts, base, place):              # -> (N,) change of LD
    """The SAE's error removed at the place: z_hat instead of z_cat."""
    z_hat = sae(at_place(base.z[layer], prompts, place))
    return edited(model, base, prompts, {layer: put(z_hat, prompts.pos[place])}) - base.ld


def rank_features(effects, prompts, n_top):                             # {layer: FeatureEffects} -> [dict]
    """The features with the largest mean effect over all prompts, with intervals, and by order of names."""
    N, ranked = len(prompts.words), []
    is_abba = np.array([one.order == "ABBA" for one in prompts.words])
    of_template = np.array([one.template for one in prompts.words])
    for layer, e in effects.items():
        total = e.change.new_zeros(int(e.feature.max()) + 1 if len(e.feature) else 0)
        total.index_add_(0, e.feature, e.change)
        ranked += [(abs(float(total[i])), layer, i) for i in e.feature.unique().tolist()]
    found = []
    for _, layer, i in sorted(ranked, reverse=True)[:n_top]:
        e, change = effects[layer], np.zeros(N)
        mine = e.feature == i
        change[e.row[mine].cpu().numpy()] = e.change[mine].cpu().numpy()
        mean, interval = mean_of(change)
        by_order = {order: float(change[is_abba == (order == "ABBA")].mean()) for order in ORDERS}
        by_template = {t: float(change[of_template == t].mean()) for t in np.unique(of_template).tolist()}
        found.append({"layer": layer, "feature": i, "n_active": int(mine.sum()), "effect": mean,
                      "effect_ci": interval, "where_active": float(e.change[mine].mean()), **by_order,
                      "by_template": by_template})
    return found


def role_of(k, pos, row):
    """What stands at position k of a prompt: a place of interest, BOS, or something else."""
    if k == 0:
        return "BOS"
    for name in ("connector", "IO", "S1", "S1+1", "S2", "end"):         # in BABA, S1+1 is the connector
        if int(pos[name][row]) == k:
            return name
    return "else"


def most_active(sae, layer, feature, prompts, base, place, n=8):        # -> {order: (m,) prompts}, f (N,)
    """The prompts of each order in which a feature is most active at the place, n of them at most."""
    f, found = sae.encode(at_place(base.z[layer], prompts, place))[:, feature], {}
    for order in ORDERS:
        mine = torch.tensor([one.order == order for one in prompts.words], device=f.device)
        rows = torch.where(mine, f, 0).argsort(descending=True)[:n]
        found[order] = rows[(f * mine)[rows] > 0]
    return found, f


@torch.no_grad()
def reads(model, sae, layer, feature, prompts, base, place):            # -> {order: {role: share}}
    """DFA of a feature by what stands at the source, in the prompts of each order where it is most active:
    sum over prompts, as a share of the sum of its activations.

    With "constant" (attribution.constants) the shares sum to 1.
    """
    found, (rows_of, f) = {}, most_active(sae, layer, feature, prompts, base, place)
    w, constant = sae.W_enc[:, feature], float(constants(model, layer, sae)[feature])
    for order, rows in rows_of.items():
        sums = {}
        if len(rows):
            for _, kept in model.layer_by_layer(prompts.tokens[rows], layer + 1):
                pass                                                    # the last one is the layer's
            moved = dfa(kept.pattern, varying(model, layer, kept.v), w)                           # (B,H,q,k)
            sums["constant"] = constant * len(rows) / float(f[rows].sum())
        for i, row in enumerate(rows.tolist()):
            q = int(prompts.pos[place][row])
            for k, value in enumerate(moved[i, :, q, :q + 1].sum(0).tolist()):
                role = role_of(k, prompts.pos, row)
                sums[role] = sums.get(role, 0) + value / float(f[rows].sum())
        found[order] = sums
    return found


@torch.no_grad()
def reads_further(model, saes, layer, feature, prompts, base, place):   # -> {order: {(role, writer): share}}
    """One step of recursive DFA, in the same prompts and units as `reads`: what was written at the sources,
    and by whom; the constants together are ("constant", "")."""
    found, (rows_of, f) = {}, most_active(saes[layer], layer, feature, prompts, base, place)
    for order, rows in rows_of.items():
        sums = {}
        for row in rows.tolist():
            run = trace_run(model, saes, prompts.tokens[row, :int(prompts.pos["end"][row]) + 1])
            below = children(run, layer, int(prompts.pos[place][row]), feature)
            columns = [column.tolist() for column in run.parts[:4]]     # kind, layer, position, feature
            for part, value in zip(below.part.tolist(), below.value.tolist()):
                key = "constant", ""
                if part >= 0:
                    kind, l, k, j = (column[part] for column in columns)
                    key = role_of(k, prompts.pos, row), name_part(KINDS[kind], l, j)
                sums[key] = sums.get(key, 0) + value / float(f[rows].sum())
        found[order] = sums
    return found


# ---- the " and" signal (Fig. 5, 14) ----


def recovered(patched, clean, zero):                                    # (N,) each -> value | None, interval
    """(LD_patched - LD_zero) / (LD_clean - LD_zero), a ratio of means, with its bootstrap interval over
    prompts; (None, None) unless the interval of the mean of LD_clean - LD_zero lies above 0."""
    patched, clean, zero = (x.cpu().double().numpy() for x in (patched, clean, zero))
    ratio = lambda i: (patched[i] - zero[i]).mean() / (clean[i] - zero[i]).mean()
    low, _ = mean_of(clean - zero)[1]
    if low <= 0:
        return None, None
    return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))


@torch.no_grad()
def patch_S2(model, prompts, base, source_run, source, layers):         # -> (N,) logit difference
    """z_cat of the layers at S2 from the source's S2."""
    values = {layer: at_place(source_run.z[layer], source, "S2") for layer in layers}
    return edited(model, base, prompts, {layer: put(z, prompts.pos["S2"]) for layer, z in values.items()})


def baselines(model, prompts, base, layers):                            # -> {name: (N,) LD}
    """What is taken as no signal: zero at S2; at S2 the mean over these prompts; zero at all positions, as in
    the released code."""
    at = {layer: at_place(base.z[layer], prompts, "S2") for layer in layers}
    S2 = prompts.pos["S2"]
    return {"zero": edited(model, base, prompts, {l: put(torch.zeros_like(z), S2) for l, z in at.items()}),
            "mean": edited(model, base, prompts, {l: put(z.mean(0).expand_as(z), S2) for l, z in at.items()}),
            "zero everywhere": edited(model, base, prompts, {l: torch.zeros_like for l in layers})}


def frequent_word(rows, tokenizer, taken):
    """A word about as frequent as " and" in the text: the token that is a space and letters, and not among
    those taken, with the nearest count."""
    counts = torch.bincount(rows.flatten().cpu(), minlength=tokenizer.n_vocab)
    order = (counts - counts[tokenizer.single(" and")]).abs().argsort(stable=True).tolist()
    return next(word for word in map(lambda i: tokenizer.decode([i]), order)
                if word[:1] == " " and word[1:].isalpha() and word not in taken)


def longer(filler):
    """The same sentence with two more words."""
    return filler[:-1] + " at last."


POSITIONS = ("same", "2 tokens", "a sentence")


def placed(words, fillers, position):
    """The prompts with fillers set so that S1 stands where `position` says. "same": at one position and one
    distance from S2 for both orders of names (S1 is two tokens later in ABBA, so BABA has two tokens more in
    front and two less in the middle). "2 tokens": these two the other way round, so that S1 moves on in one
    order and back in the other: a cell is a mean over both. "a sentence": all in the middle."""
    moved = []
    for one, short in zip(words, fillers):
        long = longer(short)
        front, middle = (short, long) if one.order == "ABBA" else (long, short)
        if position == "2 tokens":
            front, middle = middle, front
        elif position == "a sentence":
            front, middle = "", short + " " + long[0].upper() + long[1:]
        moved.append(dataclasses.replace(one, front=front, middle=middle))
    return moved


# ---- why there ----


@torch.no_grad()
def why_io(model, saes, head, prompts, n=24):           # -> score, [(at the end, at the key, value)]
    """The score of IO less that of S1 from the end, for one head, as a sum over (query part, key part): mean
    over n prompts, strongest first."""
    layer, h = head
    sums, score, n = {}, 0.0, min(n, len(prompts.words))
    for row in range(n):
        end, io, s1 = (int(prompts.pos[place][row]) for place in ("end", "IO", "S1"))
        why = qk(trace_run(model, saes, prompts.tokens[row, :end + 1]), layer, h, end, io, s1)
        score += why.score / n
        for name_a, values in zip(why.query, why.pairs.tolist()):
            for name_b, value in zip(why.key, values):
                pair = name_part(*name_a), name_part(*name_b)
                sums[pair] = sums.get(pair, 0) + value / n
    return score, sorted(((*pair, value) for pair, value in sums.items()), key=lambda one: -abs(one[2]))


# ---- the program ----

@dataclass(frozen=True)
class IOIConfig(StudyConfig):
    n_prompts: int = field(200, "prompts, half of them ABBA and half BABA")
    names: str = field(",".join(HELD_OUT_NAMES), "names, each one token with a space before it")
    corpus: str = field("python", "text in which the frequency of words is counted: see train.py")


@dataclass(frozen=True)
class Study:
    """What every part of the study needs."""
    config: IOIConfig
    model: torch.nn.Module
    tokenizer: Tokenizer
    names: list
    folder: Path
    prompts: Prompts
    base: Base

    def run(self, words):                                               # -> Prompts, Base
        """Other prompts, and the run on them."""
        prompts = build(words, self.tokenizer, self.prompts.tokens.device)
        return prompts, base_run(self.model, prompts)


def main():
    config = parse_flags(IOIConfig, __doc__)
    model, tokenizer, saes, folder = begin(config, "ioi")
    if config.n_prompts < 20:
        raise UserError(f"--n-prompts must be 20 or more for intervals, not {config.n_prompts}.")
    names = [name.strip() for name in config.names.split(",")]
    words = draw_prompts(config.n_prompts, names, tokenizer, config.seed)
    longest = max(FILLERS, key=lambda filler: len(tokenizer.encode(" " + filler)))
    longest = placed(words, [longest] * len(words), "a sentence")
    model.check_length(build(longest, tokenizer).tokens.shape[1])
    text = next(data.rows(config.corpus, tokenizer, "held-out", min(128, model.config.n_ctx), 512))
    prompts = build(words, tokenizer, next(model.parameters()).device)
    study = Study(config, model, tokenizer, names, folder, prompts, base_run(model, prompts))
    movers, layers = study_circuit(study)
    study_saes(study, saes)
    study_signal(study, layers, frequent_word(text, tokenizer, CONNECTORS))
    study_qk(study, saes, movers)
    finish(config, folder)


def in_words(values, form="+.2f"):                                      # (N,) -> "mean [low, high]"
    """A mean over prompts with its 95% interval."""
    return with_interval(*mean_of(values), form)


def study_circuit(study):                               # -> [(layer, head)], [layer]
    """Can the model do the task, which heads do it, and what are their roles? Gives the name movers and the
    layers that act at S2."""
    model, prompts, base, ld = study.model, study.prompts, study.base, study.base.ld.cpu().numpy()
    text = study.tokenizer.decode(prompts.tokens[0][1:prompts.pos["end"][0] + 1])
    print(f"{len(ld)} prompts, such as: {text!r}")
    for order in ORDERS:
        mine = np.array([one.order == order for one in prompts.words])
        right = with_interval((ld[mine] > 0).mean(), wilson(int((ld[mine] > 0).sum()), mine.sum()), ".1%")
        print(f"{order}  logit difference {in_words(ld[mine])}, IO above S in {right}")
    if mean_of(ld)[1][0] <= 0 or (ld > 0).mean() < 0.6:
        print("this model does not do the task; what follows describes its heads all the same")
    source, source_run = study.run(other_giver(prompts.words))
    source_ld = -source_run.ld.cpu().numpy()                            # IO and S have changed roles
    whole, told_apart = float(ld.mean() - source_ld.mean()), mean_of(ld - source_ld)[1][0] > 0
    form, unit = ".1%", "part of clean - source"
    if not told_apart:
        whole, form, unit = 1.0, ".2f", "logits"
    progress = Progress(model.config.n_layers, "layers")
    c = circuit(model, prompts, source, base, source_run, progress)
    share = {name: getattr(c, name).mean(0) / whole for name in ("direct", "at_end", "at_S2")}      # (L,H)
    attention = {look: at.mean(0) for look, at in c.attention.items()}
    found = roles(attention, **share) if told_apart else {role: [] for role in ROLES}
    print(f"with the other name at S2: {in_words(source_ld)}; effects: " + (
        f"parts of the difference, {whole:.2f}" if told_apart else "in logits, and no roles, since the two "
        "are not told apart"))
    print("head    direct logit   patched at the end: directly   in all   patched at S2   looks at")
    order = np.argsort(-sum(map(abs, share.values())), axis=None)[:12]
    for head in (divmod(int(i), model.config.n_heads) for i in order):
        looks = ", ".join(f"{look} {at[head]:.2f}" for look, at in attention.items() if at[head] >= ATTENDS)
        print(f"{head[0]}.{head[1]:<4} {c.dla.mean(0)[head]:+10.2f} {share['direct'][head]:+26{form}} "
              f"{share['at_end'][head]:+10{form}} {share['at_S2'][head]:+13{form}}   {looks}".rstrip())
    for role, heads in found.items():
        print(f"{role:20} " + (" ".join(f"{layer}.{h}" for layer, h in heads) or "none"))
    whole_layers = [patch_S2(model, prompts, base, source_run, source, [layer]) - base.ld
                    for layer in range(model.config.n_layers)]
    at_S2 = np.array([float(change.mean()) / whole for change in whole_layers])
    layers = sorted(np.argsort(-abs(at_S2), kind="stable")[:2].tolist())
    layers = [5, 6] if study.config.model == "gpt2" else layers
    print("whole layers patched at S2: " + "  ".join(f"{l} {x:+{form}}" for l, x in enumerate(at_S2)))
    reported(study.config, "name movers 9.9 9.6 10.0, negative 10.7 11.10, S-inhibition 7.3 7.9 8.6 8.10, "
             "induction 5.5 6.9, duplicate token 0.1 3.0, previous token 2.2 4.11 (Wang et al.)")
    write_json(study.folder / "circuit.json", {
        "logit_difference": mean_of(ld), "source": mean_of(source_ld),
        "accuracy": [float((ld > 0).mean()), wilson(int((ld > 0).sum()), len(ld))],
        "roles": found, "attention": {look: at.tolist() for look, at in attention.items()},
        "clean_less_source": whole if told_apart else None,
        "layers_at_S2_as_share": at_S2.tolist(),
        **{name: mean_of(getattr(c, name)) for name in ("dla", *share)}})
    plot_effects({"direct logit attribution": c.dla.mean(0), "patched at the end, directly": share["direct"],
                  "patched at the end": share["at_end"], "patched at S2": share["at_S2"]}, unit,
                 study.folder / "heads.png")
    plot_circuit(found, share["at_end"], share["at_S2"], study.folder / "circuit.png")
    most_direct = divmod(int(share["direct"].argmin()), model.config.n_heads)
    return sorted(found["name mover"] or [most_direct], key=lambda head: share["direct"][head])[:2], layers


def study_saes(study, saes):
    """Does the task survive the SAEs, and which features does it hang on?"""
    model, prompts, base = study.model, study.prompts, study.base
    print(f"\nlogit difference with SAEs spliced in (clean {in_words(base.ld.cpu().numpy())})")
    found = {"clean": mean_of(base.ld.cpu().numpy()), "spliced": {}, "places": {}}
    edits = {f"layer {layer}": {layer: splice(sae)} for layer, sae in saes.items()}
    edits["all layers"] = {layer: splice(sae) for layer, sae in saes.items()}
    for name, edit in edits.items():
        ld = edited(model, base, prompts, edit).cpu().numpy()
        print(f"{name:12} {in_words(ld)}, IO above S in {(ld > 0).mean():.1%}")
        found["spliced"][name] = mean_of(ld)
    for place in ("S2", "end"):
        found["places"][place] = study_place(study, saes, place)
    write_json(study.folder / "features.json", found)
    plot_ablations(found["places"], study.folder / "features.png")


def study_place(study, saes, place, n_shown=12, n_read=5):
    """Every feature active at one place removed in turn; the strongest read by DFA and recursive DFA."""
    model, prompts, base = study.model, study.prompts, study.base
    at = (prompts, base, place)
    effects = {layer: remove_features(model, sae, layer, *at) for layer, sae in saes.items()}
    errors = {layer: remove_error(model, sae, layer, *at).cpu().numpy() for layer, sae in saes.items()}
    ranked, n_removed = rank_features(effects, prompts, n_shown), sum(len(e.row) for e in effects.values())
    print(f"\nat {place}: {n_removed:,} removals of one feature; change of the logit difference, mean over "
          f"all prompts,\nby order of names, and over those where it is active; ranked and measured on the "
          f"same prompts\n"
          f"feature    active in   change                     ABBA    BABA   where active   raises most")
    for one in ranked:
        effects_on = token_effects(model, one["layer"], saes[one["layer"]], one["feature"])
        one["raises"] = study.tokenizer.decode([int(effects_on.argmax())])
        change = with_interval(one["effect"], one["effect_ci"], "+.3f")
        print(f"{one['layer']}.{one['feature']:<8} {one['n_active']:5}      {change}  {one['ABBA']:+6.3f}  "
              f"{one['BABA']:+6.3f} {one['where_active']:+11.2f}    {one['raises']!r}")
    for layer, change in errors.items():
        print(f"SAE error {layer}           {in_words(change, '+.3f')}")
    for one in ranked[:n_read]:
        layer, i = one["layer"], one["feature"]
        one["reads"] = reads(model, saes[layer], layer, i, *at)
        one["n_read"] = {order: len(rows) for order, rows in
                         most_active(saes[layer], layer, i, *at)[0].items()}
        further = reads_further(model, saes, layer, i, *at)
        one["reads_further"] = {order: sorted(([*key, x] for key, x in shares.items() if key[1]),
                                              key=lambda item: -abs(item[2]))[:8]
                                for order, shares in further.items()}
        print(f"{layer}.{i} reads, in shares of its activation (number of prompts)")
        for order, by_role in one["reads"].items():
            best = sorted(by_role.items(), key=lambda item: -abs(item[1]))[:5]
            print(f"  {order} ({one['n_read'][order]})  "
                  + ("  ".join(f"{role} {x:+.0%}" for role, x in best) or "never active"))
            if best:
                print("        written by  " + "  ".join(f"{writer} at {role} {x:+.0%}" for role, writer, x
                                                         in one["reads_further"][order][:4]))
    return {"n_removed": n_removed, "features": ranked,
            "error": {layer: mean_of(change) for layer, change in errors.items()}}


def study_signal(study, layers, frequent):
    """What z_cat at S2 tells the later layers: noising, connectors, side and position."""
    model, prompts, base, words = study.model, study.prompts, study.base, study.prompts.words
    connectors = [c for c in (*CONNECTORS[1:], frequent) if len(study.tokenizer.encode(c)) == 1]
    others = with_other_names(words, study.names, study.config.seed)
    noisy = with_filler(others, study.config.seed)
    sources = {"itself": words, "other names": others, "other names and filler": noisy,
               "other names, order flipped": flipped(others), "names, filler, order flipped": flipped(noisy)}
    sources |= {f"connector{c}": [dataclasses.replace(one, connector=c) for one in words] for c in connectors}
    zeros = baselines(model, prompts, base, layers)
    means = ", ".join(f"{name} {float(ld.mean()):.2f}" for name, ld in ({"clean": base.ld} | zeros).items())
    print(f"\nz_cat of layers {' and '.join(map(str, layers))} at S2 from other prompts; logit difference: "
          f"{means}\nthe word about as frequent as \" and\" is {frequent!r}")
    print("source                          patched   recovered                   ABBA     BABA   over mean   "
          "over zero everywhere")
    is_abba = torch.tensor([one.order == "ABBA" for one in words], device=base.ld.device)
    found = {}
    for name, source_words in sources.items():
        ld = patch_S2(model, prompts, base, *study.run(source_words)[::-1], layers)
        ways = {"recovered": recovered(ld, base.ld, zeros["zero"])}
        ways |= {order: recovered(ld[mine], base.ld[mine], zeros["zero"][mine])
                 for order, mine in (("ABBA", is_abba), ("BABA", ~is_abba))}
        ways |= {f"over {name}": recovered(ld, base.ld, zeros[name]) for name in ("mean", "zero everywhere")}
        found[name] = {"patched": float(ld.mean())}
        for way, (value, interval) in ways.items():
            found[name] |= {way: value, way + "_ci": interval}
        shown = ["n/a" if value is None else f"{value:.1%}" for value, _ in ways.values()]
        print(f"{name:30} {float(ld.mean()):8.2f}   {with_interval(*ways['recovered'], '.1%'):25} "
              f"{shown[1]:>7}  {shown[2]:>7}   {shown[3]:>9}   {shown[4]:>20}")
    reported(study.config, "layers 5 and 6: other names and filler, order around \" and\" kept: 93% "
             "recovered; \" alongside\": 43%")
    cells = side_and_position(study, layers, others)
    write_json(study.folder / "signal.json", {
        "layers": layers, "frequent_word": frequent, "sources": found, "side_and_position": cells,
        **{name: mean_of(ld.cpu().numpy()) for name, ld in ({"clean": base.ld} | zeros).items()}})
    plot_signal(found, layers, study.folder / "signal.png")
    plot_cells(cells, study.folder / "side_and_position.png")


def side_and_position(study, layers, others):           # -> {"side, position" or "effect of ...": {...}}
    """Side of the connector crossed with S1's position, from prompts with other names."""
    length = lambda text: len(study.tokenizer.encode(" " + text))
    fits = [filler for filler in FILLERS if length(longer(filler)) == length(filler) + 2]
    if not fits:
        print("side and position: no filler of this vocabulary grows by two tokens; left out")
        return {}
    rng = random.Random(f"fillers {study.config.seed}")
    fillers = [rng.choice(fits) for _ in others]
    prompts, base = study.run(placed(study.prompts.words, fillers, "same"))
    zero = baselines(study.model, prompts, base, layers)["zero"]
    ld, cells = {}, {}
    for side, change in (("same side", list), ("other side", flipped)):
        for position in POSITIONS:
            source, source_run = study.run(placed(change(others), fillers, position))
            ld[side, position] = patch_S2(study.model, prompts, base, source_run, source, layers)
            cells[f"{side}, {position}"] = recovered(ld[side, position], base.ld, zero)
    pairs = {f"effect of side, at position: {p}": (("same side", p), ("other side", p)) for p in POSITIONS}
    pairs |= {f"effect of position: {p}, on the {s}": ((s, "same"), (s, p))
              for s in ("same side", "other side") for p in POSITIONS[1:]}
    for name, (one, other) in pairs.items():
        # recovered is linear in the patched run, so this is the difference of two of them
        cells[name] = recovered(ld[one] - ld[other] + zero, base.ld, zero)
    print(f"\nside of the connector and position of S1, from prompts with other names\n{'':47}recovered")
    for name, (value, interval) in cells.items():
        print(f"{name:46} {with_interval(value, interval, '+.1%')}")
    return {name: {"recovered": value, "recovered_ci": interval} for name, (value, interval) in cells.items()}


def study_qk(study, saes, movers):
    """Why the name movers look at IO and not at S1."""
    found = {}
    for layer, h in movers:
        score, pairs = why_io(study.model, saes, (layer, h), study.prompts)
        found[f"{layer}.{h}"] = {"score": score, "pairs": pairs[:20]}
        print(f"\nhead {layer}.{h} scores IO {score:+.2f} above S1 from the end; at the end x at IO and S1:")
        for a, b, value in pairs[:8]:
            print(f"{value:+8.3f}   {a}  x  {b}")
    write_json(study.folder / "qk.json", found)


if __name__ == "__main__":
    common.run(main)
