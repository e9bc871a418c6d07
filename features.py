"""What every SAE feature does: a dashboard for each, and its family. The paper assigns families by
eye; this file uses a fixed rule.

    python features.py                      all features: of your SAEs in out/tiny, or those that
                                            ship
    python features.py --layers 2 --n-tokens 1e6
    python features.py --sample 30          30 live features of each layer, to judge by eye
    python features.py --reads mlp          features of the transcoders that lie beside the SAEs

Collection. One pass over held-out text keeps, for every feature, how often and how strongly it is
active, its strongest places (`top`), places from each tenth of its range (`spread`), and 200 places
drawn in proportion to activation (`sample`, which is not the flag --sample). `weight` says how much
of the feature's activation each of these stands for: the same for most; for the strongest, which
are always kept, their own activation. A second pass asks what was read at these places; and, at
random cuts of the rows, how much context the feature needs. All this is stored, and heads.py reads
it too.

Families. A place is a (row, position) at which the feature is active. Its source is the earlier
token, position 0 (BOS) left out, with the largest DFA (signed, summed over heads). The first of
these that fits is the feature's family:

    too rare        active at fewer than 20 places
    after a copy    at least half of the activation is at places whose source stands right after an
                    earlier copy of the current token; and this share of the activation is
                    at least three times what chance gives (`share_by_chance`). These are the
                    paper's induction features, recognised by what they read;
                    next_by_induction.py finds "X is next" by text instead

The others go by the context they need: what is left of the activation if only BOS and the last n
tokens, the current one included, can be read? Tried are n = 1, 2, 4, 8, 16 and 32 (`CONTEXTS`); a
feature needs the smallest n from which on at least half is left at every length:

    too rare        active fewer than 20 times at the random cuts, whichever n is tried
    unstable        half was left at some smaller n too, and then again less
    current token   needs n = 1
    short-range     needs n = 2 to 8
    long-range      needs n > 8, or more than was tried

Dashboards. One page for all features, index.html, in <out>/<model>/features/. MLP features read no
heads and no other place: what has to do with these is left out, and no feature is after a copy.
Their pages are in <out>/<model>/mlp/features/.

Two tokens are copies if they are equal but for one leading space and case
(data.tokens.fuzzy_classes). A row is documents end to end. The BOS between them can be a source,
but it is no copy of anything, and no source "after a copy".

Shapes: R rows, T positions (q query, k key/source), H heads, D = H*d_head, d_sae; n places, m
places of one row, or features asked about; V tokens of the vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import data
from data import pages
from data.errors import UserError, run
from data.figures import plot_families
from data.files import atomic, write_json, write_text
from data.flags import field, parse_flags
from data.progress import Progress
from data.sae_files import MLP, Z_CAT
from data.strongest import Collected, Collector, feature_token_mass, rank_in_group
from data.tokens import fuzzy_classes, is_after_copy, text_around
from data.weights import digest
from direct import (dfa_at_positions, head_weights, token_directions, token_effects,
                    values_minus_bias)
from sparse import active_entries, inputs_of
from study import StudyConfig, begin, finish

BEFORE, AFTER = 10, 5               # tokens shown around a place
N_SOURCES = 8                       # sources shown of each example
CONTEXTS = (1, 2, 4, 8, 16, 32)     # context lengths n that are tried, current token included
CUTS_PER_ROW = 6                    # at which it is measured how much context features need
ROWS_AT_ONCE = 32


# ---- the collection: where features are active ----


def collect_places(model, saes, stream, n_rows, n_places=200, seed=0, progress=lambda rows: None):
    """-> tokens (R,T) int32, {layer: Collected}. Reads at most n_rows rows of a stream of (b,T)
    tensors. Memory grows with the number of features, and by 4 bytes a token."""
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    collectors = {layer: Collector(sae.d_sae, n_places) for layer, sae in saes.items()}
    blocks = []
    n_read = 0
    for block in stream:
        block = block[:n_rows - n_read]
        # for each place a number in (0,1]: priority sampling keeps the largest f / u
        # (data/strongest.py)
        u = 1 - torch.rand(block.shape, generator=random)
        for layer, entries in active_entries(model, saes, block.to(device)):
            entries = entries.cpu()
            in_text = entries._replace(row=entries.row + n_read)    # rows counted from the first
            collectors[layer].add(in_text, u[entries.row, entries.q])
        blocks.append(block.int())
        n_read += len(block)
        progress(n_read)
        if n_read >= n_rows:
            break
    return torch.cat(blocks), {layer: c.result() for layer, c in collectors.items()}


# ---- the collection: what was read there, and how much context is needed ----


class Reads(NamedTuple):
    """Where the activation at n places was read from."""
    source: Tensor          # (n,) strongest source 0 < k < q, of all heads together; -1 if q = 1
    head_source: Tensor     # (n,H) strongest source 0 < k <= q of each head
    head_value: Tensor      # (n,H) its DFA


class ExampleDfa(NamedTuple):
    """What a dashboard shows of n places."""
    window: Tensor          # (n,BEFORE+1+AFTER) activations around q; NaN at 0 and off the row
    sources: Tensor         # (n,N_SOURCES) strongest k <= q by |DFA|, since pages show negative
                            # ones too; BOS is allowed; -1 where q has no more sources
    by_head: Tensor         # (n,N_SOURCES,H) their DFA
    total: Tensor           # (n,H) DFA over all sources


class ContextKept(NamedTuple):
    """What is left of each feature when only BOS and the last n tokens can be read."""
    share: Tensor           # (d_sae,contexts) of its activation; NaN where it was never active, and
                            # for an n that was not tried
    n_active: Tensor        # (d_sae,contexts) places behind it


class LayerCollection(NamedTuple):
    """All that is known of one layer's features."""
    collected: Collected
    reads: Reads            # of collected.sample
    top: ExampleDfa         # of collected.top
    spread: ExampleDfa      # of collected.spread
    context: ContextKept


@torch.no_grad()
def read_places(model, saes, tokens, collected, seed=0, progress=lambda rows: None):
    """The second pass: DFA at the places that were collected, and the context that features need
    -> {layer: LayerCollection}."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    by_row = {layer: [PlacesByRow(places, len(tokens)) for places in (c.sample, c.top, c.spread)]
              for layer, c in collected.items()}
    context = {layer: ContextSums(sae.d_sae) for layer, sae in saes.items()}
    for first in range(0, len(tokens), ROWS_AT_ONCE):
        rows = tokens[first:first + ROWS_AT_ONCE].long().to(device)
        inputs = {}
        for layer, cache in model.layer_caches(rows, saes):
            inputs[layer], pattern, v = what_is_read(model, layer, saes[layer], cache)
            for i in range(len(rows)):
                attribute_row(saes[layer], pattern[i], v[i], inputs[layer][i], *by_row[layer],
                              row=first + i)
        cut_rows(model, saes, rows, inputs, context, generator)
        progress(first + len(rows))
    found = {}
    for layer, (sample, top, spread) in by_row.items():
        found[layer] = LayerCollection(collected[layer], Reads(*sample.results()),
                                       ExampleDfa(*top.results()), ExampleDfa(*spread.results()),
                                       context[layer].result())
    return found


def what_is_read(model, layer, sae, cache):     # -> (b,T,d_in), (b,H,q,k), (b,k,H,d_head)
    """What an SAE reads, and the patterns and values by which heads brought it. A transcoder has no
    heads: H = 0."""
    if sae.reads == MLP:
        return cache.mlp_in, cache.pattern[:, :0], cache.v[:, :, :0]
    # Without the value bias: every source has it, so it says nothing about any one of them. (With
    # direct.constant_part, DFA sums to the pre-activation.)
    return cache.z_cat, cache.pattern, values_minus_bias(model, layer, cache.v)


class PlacesByRow:
    """Places of many rows, gone through row by row; results come back in the order of the places.

    `add` is called for every row in turn, also for one without places: its empty columns are what
    `results` has if there are no places at all.
    """

    def __init__(self, places, n_rows):
        self.places = places
        self.order = places.row.argsort(stable=True)
        self.start = torch.searchsorted(places.row[self.order], torch.arange(n_rows + 1)).tolist()
        self.parts = []

    def of_row(self, row):
        return self.places.pick(self.order[self.start[row]:self.start[row + 1]])

    def add(self, result):
        """The result of the next row: a tuple of tensors."""
        self.parts.append([column.cpu() for column in result])

    def results(self):
        """Every column of the results, over all places."""
        back = self.order.argsort()
        return [torch.cat(column)[back] for column in zip(*self.parts)]


def attribute_row(sae, pattern, v, z, sample, top, spread, row):
    """Add the DFA of one row's places to `sample`, `top` and `spread`, each a PlacesByRow. pattern
    (H,q,k), v (k,H,d_head), z (T,d_in)."""
    f = None
    for places, is_sample in ((sample, True), (top, False), (spread, False)):
        entries = places.of_row(row)
        feature, q = entries.feature.to(v.device), entries.q.to(v.device)
        if len(pattern):
            moved = dfa_at_positions(pattern, v, sae.W_enc.T[feature], q)               # (m,H,k)
        else:
            moved = z.new_zeros(len(feature), 0, len(z))                                # (m,0,k)
        if is_sample:
            places.add(strongest_sources(moved, q))
            continue
        if f is None and len(feature):      # a row without places to show is not encoded
            f = sae.encode(z)                                                           # (T,d_sae)
        activations = f[:, feature].T if len(feature) else z.new_zeros(0, len(z))       # (m,T)
        places.add(example_dfa(moved, activations, q))


def strongest_sources(moved, q):                            # (m,H,k), (m,) -> Reads
    """The strongest source of each place, and of each head, position 0 left out. A place's source
    is an earlier token, because "after a copy" asks what was fetched. A head may also read the
    current token, because heads.py asks what it reads."""
    k = torch.arange(moved.shape[2], device=q.device)
    before_q = (k > 0) & (k < q[:, None])                               # (m,k)
    up_to_q = (k > 0) & (k <= q[:, None])
    source = moved.sum(1).masked_fill(~before_q, -torch.inf).argmax(-1)
    has_source = before_q.any(-1) & (moved.shape[1] > 0)
    source = torch.where(has_source, source, -1)
    head_value, head_source = moved.masked_fill(~up_to_q[:, None], -torch.inf).max(-1)
    return Reads(source.short(), head_source.short(), head_value)


def example_dfa(moved, activations, q):                     # (m,H,k), (m,T), (m,) -> ExampleDfa
    """The activations around q, and the strongest sources. BOS may be among these, since `total`
    includes it."""
    T = activations.shape[1]
    around = q[:, None] + torch.arange(-BEFORE, AFTER + 1, device=q.device)
    window = activations.gather(1, around.clamp(0, T - 1))
    window = window.masked_fill((around < 1) | (around >= T), torch.nan)
    n_sources = min(N_SOURCES, T)
    sources = moved.sum(1).abs().topk(n_sources).indices                                # (m,8)
    of_source = sources[:, None].expand(-1, moved.shape[1], -1)
    by_head = moved.gather(2, of_source).transpose(1, 2)                                # (m,8,H)
    # an early q has fewer: topk took some k > q too, whose DFA is 0
    sources = torch.where(sources <= q[:, None], sources, -1)
    return ExampleDfa(window, sources.short(), by_head, moved.sum(-1))


def cut_rows(model, saes, rows, inputs, context, generator):    # (b,T), {layer: (b,T,d_in)}
    """Cut rows, and add what features keep to `context`, {layer: ContextSums}, for every n of
    CONTEXTS that is at most half a row.

    A row is cut before a random position: only BOS and the tokens from the cut on are kept. The
    n-th of these then sees BOS and n tokens, itself included, so one cut row measures every n at
    once. (What is kept also moves to the front of the row, which a model may notice.) A quarter of
    a row or more stands before each cut.
    """
    T = rows.shape[1]
    contexts = [n for n in CONTEXTS if n <= T // 2]
    longest = max(contexts)
    row = torch.arange(len(rows)).repeat_interleave(CUTS_PER_ROW)       # (cuts,)
    cut = torch.randint(max(1, T // 4), T - longest + 1, (len(row),), generator=generator)
    row, cut = row.to(rows.device), cut.to(rows.device)
    kept = cut[:, None] + torch.arange(longest, device=rows.device)     # (cuts,longest) positions
    shortened = torch.cat([rows[row, :1], rows[row[:, None], kept]], dim=1)
    short_inputs = inputs_of(model, saes, shortened)        # {layer: (cuts,1+longest,d_in)}
    for layer, sae in saes.items():
        for i, n in enumerate(contexts):
            f_whole = sae.encode(inputs[layer][row, cut + n - 1])       # (cuts,d_sae)
            f_short = sae.encode(short_inputs[layer][:, n])             # at the same token
            context[layer].add(i, f_whole, f_short)


class ContextSums:
    """Sums over places, (d_sae,contexts) each, so that strong activations count for more."""

    def __init__(self, d_sae):
        self.kept = torch.zeros(d_sae, len(CONTEXTS), dtype=torch.float64)
        self.had = self.kept.clone()
        self.n_active = self.kept.clone()

    def add(self, i, f_whole, f_short):                     # (places,d_sae) each
        # a feature that grows when its context goes has kept all it had, and no more
        self.kept[:, i] += torch.minimum(f_whole, f_short).sum(0).cpu()
        self.had[:, i] += f_whole.sum(0).cpu()
        self.n_active[:, i] += (f_whole > 0).sum(0).cpu()

    def result(self):                                       # -> ContextKept
        return ContextKept(self.kept / self.had, self.n_active)


# ---- the collection as a whole: made once, stored, read by heads.py ----


class Collection(NamedTuple):
    tokens: Tensor          # (R,T) int32, the text
    layers: dict            # {layer: LayerCollection}

    @property
    def n_tokens(self):
        """Tokens of text, position 0 left out."""
        return self.tokens[:, 1:].numel()


@dataclass(frozen=True)
class CollectionConfig(StudyConfig):
    n_tokens: int = field(500_000, "tokens of text (paper: 1e6)")
    n_places: int = field(200, "places of each feature, drawn in proportion to activation")


def load_or_collect(study):                                 # -> Collection
    """The collection stored in <out>/<model>/features/, if this model and these SAEs made it with
    these settings; else make it, and store it there.

    It does not notice a corpus that changed under the same name, nor that this code was edited:
    then delete <out>/<model>/features/collection.
    """
    folder = study.folder.parent / "features"
    settings = collection_settings(study)
    collection = load_collection(folder, study.saes, settings)
    if collection is not None:
        print(f"reading what was collected in {folder}/", flush=True)
        return collection
    collection = collect(study)
    save_collection(collection, folder, settings)
    (folder / "heads.js").unlink(missing_ok=True)           # of heads.py, from other features
    return collection


def collect(study):                                         # -> Collection
    """Two passes over held-out text. Raises UserError if there is too little of it."""
    config, model, saes = study.config, study.model, study.saes
    n_rows = config.n_tokens // (study.n_ctx - 1)
    if n_rows < 16:
        raise UserError(f"--n-tokens must be {16 * (study.n_ctx - 1)} or more, not "
                        f"{config.n_tokens}.")
    if config.n_places < 10:
        raise UserError(f"--n-places must be 10 or more, not {config.n_places}.")
    # unlike in training, no passage is repeated on purpose: copies are those that the text has
    stream = data.rows(config.corpus, study.tokenizer, "held-out", T=study.n_ctx, n=128,
                       seed=config.seed, repeat_share=0.0, held_out_share=config.held_out_share)
    print("reading text", flush=True)
    tokens, collected = collect_places(model, saes, stream, n_rows, config.n_places, config.seed,
                                       Progress(n_rows, "rows"))
    if len(tokens) < 16:
        raise UserError(f"--corpus {config.corpus} gave {len(tokens)} held-out rows, and 16 are "
                        f"needed; give more text.")
    print("what was read there, and how much context is needed", flush=True)
    return Collection(tokens, read_places(model, saes, tokens, collected, config.seed,
                                          Progress(len(tokens), "rows")))


def collection_settings(study):                             # -> {layer or "tokens": {name: text}}
    """What each file of a collection depends on: one layer's does not depend on other layers'
    SAEs."""
    config = study.config
    settings = {name: str(getattr(config, name))
                for name in ("model", "corpus", "held_out_share", "n_tokens", "n_places", "seed")}
    settings["constants"] = str((CONTEXTS, CUTS_PER_ROW, BEFORE, AFTER, N_SOURCES))
    settings["weights"] = digest(study.model)
    by_file = {"tokens": settings}
    for layer, sae in study.saes.items():
        by_file[layer] = settings | {"sae": digest(sae)}
    return by_file


def save_collection(collection, folder, settings):
    """collection/tokens.safetensors, and L<layer>.safetensors for every layer."""
    parts = {"tokens": {"tokens": collection.tokens}}
    parts |= {layer: flattened(of_layer) for layer, of_layer in collection.layers.items()}
    for part, tensors in parts.items():
        with atomic(collection_path(folder, part)) as temporary:
            save_file(tensors, temporary, metadata=settings[part])


def load_collection(folder, saes, settings):                # -> Collection | None
    """What `save_collection` wrote, if it is all there, can be read, and was made with these
    settings."""
    layers = {}
    try:
        for part in ("tokens", *saes):
            path = collection_path(folder, part)
            if not path.is_file():
                return None
            with safe_open(path, "pt") as file:
                if file.metadata() != settings[part]:
                    return None
        tokens = load_file(collection_path(folder, "tokens"))["tokens"]
        for layer in saes:
            layers[layer] = unflattened(LayerCollection, load_file(collection_path(folder, layer)))
    except (SafetensorError, OSError, KeyError):
        print(f"note: {path.parent} is damaged, and is made anew")
        return None
    return Collection(tokens, layers)


def collection_path(folder, part):                          # part: a layer, or "tokens"
    """The file of one part of a collection."""
    name = part if part == "tokens" else f"L{part}"
    return folder / "collection" / f"{name}.safetensors"


def flattened(record, prefix=""):                           # -> {name: tensor}
    """A NamedTuple of tensors and NamedTuples as one dict: "collected.top.row" and so on."""
    tensors = {}
    for name, value in record._asdict().items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value.contiguous()
        else:
            tensors |= flattened(value, f"{prefix}{name}.")
    return tensors


def unflattened(kind, tensors, prefix=""):                  # -> a NamedTuple of this kind
    """The reverse of `flattened`."""
    values = []
    for name, field_kind in kind.__annotations__.items():
        if field_kind is Tensor:
            values.append(tensors[prefix + name])
        else:
            values.append(unflattened(field_kind, tensors, f"{prefix}{name}."))
    return kind(*values)


# ---- families ----

FAMILIES = ("after a copy", "current token", "short-range", "long-range", "unstable", "too rare")
AFTER_COPY, CURRENT_TOKEN, SHORT_RANGE, LONG_RANGE, UNSTABLE, TOO_RARE = range(len(FAMILIES))
MIN_AFTER_COPY = 0.5        # share of activation at places whose source is after a copy
MIN_RATIO_TO_CHANCE = 3.0   # that share over the share by chance
MIN_KEPT = 0.5              # share of activation that counts as kept when context is cut off
LONGEST_SHORT = 8           # tokens of context of a short-range feature: one of CONTEXTS
MIN_PLACES = 20             # a feature measured at fewer places is too rare to be classed


class Families(NamedTuple):
    """One layer's features by what decides their family; NaN where there is nothing to tell."""
    after_copy: Tensor      # (d_sae,) share of activation at places whose source is after a copy
    chance: Tensor          # (d_sae,) the same share by chance: `share_by_chance`
    X: Tensor               # (d_sae,) the token read there with most of the activation; -1: none
    X_share: Tensor         # (d_sae,) its share of that activation
    context: ContextKept
    family: Tensor          # (d_sae,) index into FAMILIES; -1 for features that were never active


def find_families(of_layer, tokens, classes, seed=0):       # LayerCollection, (R,T) x 2 -> Families
    """The family of every feature of a layer. classes (R,T): of the text's tokens; copies share
    one."""
    share, chance, X, X_share = after_copy_shares(of_layer.collected, of_layer.reads, tokens,
                                                     classes, seed)
    family = classify(share, chance, of_layer.context, of_layer.collected.n)
    return Families(share, chance, X, X_share, of_layer.context, family)


def classify(after_copy, chance, context, n_in_text):       # -> (d_sae,) index into FAMILIES
    """The rule at the head of this file: what comes later here overrides what came before.
    n_in_text (d_sae,): places where each feature was active. A chance that could not be measured
    counts as 0."""
    needed_index, unstable = context_needed(context.share)
    is_short = needed_index <= CONTEXTS.index(LONGEST_SHORT)
    family = torch.where(is_short, SHORT_RANGE, LONG_RANGE)
    family[needed_index == 0] = CURRENT_TOKEN
    family[unstable] = UNSTABLE
    family[context.n_active.amax(1) < MIN_PLACES] = TOO_RARE    # too few to measure context
    above_chance = after_copy >= MIN_RATIO_TO_CHANCE * chance.nan_to_num(0.0)
    family[(after_copy >= MIN_AFTER_COPY) & above_chance] = AFTER_COPY
    family[n_in_text < MIN_PLACES] = TOO_RARE                   # too few to say anything
    family[n_in_text == 0] = -1
    return family


def context_needed(share):                                  # (d_sae,contexts) -> (d_sae,) x 2
    """needed_index: the index in CONTEXTS of the n that a feature needs; len(CONTEXTS) if more than
    was tried, -1 if it was never measured. unstable: whether a smaller n kept MIN_KEPT too. An n
    that was not measured (NaN) counts as the one before it, or as kept if it is the first."""
    lost = share < MIN_KEPT
    for i in range(1, len(CONTEXTS)):
        lost[:, i] |= lost[:, i - 1] & share[:, i].isnan()
    index = torch.arange(len(CONTEXTS))
    needed_index = (lost * (index + 1)).amax(1)             # one after the last that is lost
    unstable = (~lost & (index < needed_index[:, None])).any(1)
    needed_index[share.isnan().all(1)] = -1
    return needed_index, unstable


def after_copy_shares(collected, reads, tokens, classes, seed=0):
    """How much of each feature's activation is at places whose source stands after an earlier copy
    of the current token -> share, chance, X, X_share, (d_sae,) each, as in Families."""
    places = collected.sample
    d_sae = len(collected.n)
    source = reads.source.long()

    def stands_after_copy(row, q, k):
        return is_after_copy(classes, row, q, k)

    hit = stands_after_copy(places.row, places.q, source)
    share = activation_share(places.feature, collected.weight, hit, d_sae)
    hit_by_chance, tries = share_by_chance(places, source, stands_after_copy, seed)
    # places without a possible try say nothing about chance
    tried_weight = collected.weight * (tries > 0)
    chance = activation_share(places.feature, tried_weight, hit_by_chance, d_sae)

    read = tokens[places.row[hit], source[hit]].long()
    pair, mass = feature_token_mass(places.feature[hit], read, collected.weight[hit])
    first = rank_in_group(pair[:, 0]) == 0                  # pairs: largest mass of a feature first
    feature = pair[first, 0]
    total = torch.bincount(pair[:, 0], mass, minlength=d_sae)
    X = torch.full((d_sae,), -1)
    X_share = torch.full((d_sae,), torch.nan, dtype=torch.float64)
    X[feature] = pair[first, 1]
    X_share[feature] = mass[first] / total[feature]
    return share, chance, X, X_share


def activation_share(feature, weight, hit, d_sae):          # (n,), (n,), (n,) -> (d_sae,) float64
    """Each feature's share of activation that `hit` holds for: a mean of `hit`, numbers in [0,1],
    weighted by the activation that a place stands for. NaN for features without any."""
    weight = weight.double()
    total = torch.bincount(feature, weight, minlength=d_sae)
    return torch.bincount(feature, weight * hit, minlength=d_sae) / total


def share_by_chance(places, source, test, seed, n_tries=8):     # -> (n,) share of hits, (n,) tries
    """What chance gives. For each place, `n_tries` times: go to another place of the same feature,
    drawn at random; step back from it by this place's distance to its source; and ask
    `test(row, q, k)` there.

    This keeps the tokens at which the feature is active, and its distances, and breaks only which
    belongs to which. Not counted: tries that fall on position 0 or before the row, and those of
    places without a source or of features with one place alone.
    """
    generator = torch.Generator().manual_seed(seed)
    feature = places.feature                                # sorted
    index = torch.arange(len(feature))
    start = torch.searchsorted(feature, feature)            # the feature's first place
    count = torch.bincount(feature)[feature]                # how many it has
    hits = torch.zeros(len(feature))
    tries = torch.zeros(len(feature))
    for _ in range(n_tries):
        # 1 to count - 1 further in the feature's list, which wraps: never the place itself
        step = 1 + (torch.rand(len(feature), generator=generator) * (count - 1)).long()
        other = start + (index - start + step) % count
        row, q = places.row[other], places.q[other]
        k = q - (places.q - source)
        possible = (count > 1) & (source > 0) & (k > 0)
        hits += test(row, q, k) & possible
        tries += possible
    return hits / tries.clamp_min(1), tries


def count_families(families):                               # -> {family: number, "one X": number}
    """How many features are in each; one X: of those after a copy, the ones for which a single
    token X is half or more of what they read there."""
    family = families.family
    counts = torch.bincount(family[family >= 0], minlength=len(FAMILIES)).tolist()
    one_X = (family == AFTER_COPY) & (families.X_share >= 0.5)
    return dict(zip(FAMILIES, counts)) | {"one X": int(one_X.sum())}


# ---- every feature in plain numbers ----


def feature_records(model, sae, layer, of_layer, families, tokens):     # -> list of dicts
    """Every live feature."""
    collected = of_layer.collected
    live = (collected.n > 0).nonzero()[:, 0]
    raised, lowered = logit_effects(model, sae, layer, live)
    if sae.reads == MLP:
        weights = sae.W_dec[:, :0]                          # (d_sae,0): they lie in no head
    else:
        weights = head_weights(sae.W_dec, model.config.n_heads)     # (d_sae,H)
    needed_index, _ = context_needed(families.context.share)
    fires_on = commonest_tokens(collected, tokens)
    n_tokens = tokens[:, 1:].numel()
    records = []
    for place_in_live, i in enumerate(live.tolist()):
        records.append({
            "feature": i,
            "n": int(collected.n[i]),
            "frequency": float(collected.n[i]) / n_tokens,
            "mean": float(collected.mass[i] / collected.n[i]),
            "largest": float(f"{collected.largest[i]:.4g}"),
            "family": FAMILIES[int(families.family[i])],
            "after_copy": plain(families.after_copy[i]),
            "chance": plain(families.chance[i]),
            "X": int(families.X[i]),
            "X_share": plain(families.X_share[i]),
            # in CONTEXTS; len(CONTEXTS): more than was tried
            "context_index": int(needed_index[i]) if needed_index[i] >= 0 else None,
            "context_kept": [plain(x) for x in families.context.share[i]],
            "head_weights": [plain(x) for x in weights[i]],
            "fires_on": fires_on[i],
            "raises": raised[place_in_live], "lowers": lowered[place_in_live]})
    return records


def n_heads_of(model, sae):
    """Heads in which a feature may lie: none if it is a transcoder's."""
    return 0 if sae.reads == MLP else model.config.n_heads


def plain(x):
    """A number rounded to four decimals, None for NaN, which JSON lacks."""
    x = float(x)
    return None if x != x else round(x, 4)


def commonest_tokens(collected, tokens, n=3):               # -> {feature: [token, ...]}
    """The tokens at which each feature has most of its activation."""
    places = collected.sample
    token = tokens[places.row, places.q].long()
    pair, _ = feature_token_mass(places.feature, token, collected.weight)
    found = {}
    for i, token in pair[rank_in_group(pair[:, 0]) < n].tolist():
        found.setdefault(i, []).append(token)
    return found


def logit_effects(model, sae, layer, features, n=20):       # (m,) -> two lists of m lists
    """The tokens that each feature raises and lowers most, as [token, effect]
    (direct.token_effects)."""
    raised, lowered = [], []
    directions = token_directions(model)
    for part in features.to(sae.W_dec.device).split(256):
        effects = token_effects(model, layer, sae, part, directions)    # (m,V)
        for is_raised, found in ((True, raised), (False, lowered)):
            values, tokens = effects.topk(min(n, effects.shape[1]), largest=is_raised)
            for token_row, value_row in zip(tokens.tolist(), values.tolist()):
                found.append([[token, round(value, 3)]
                              for token, value in zip(token_row, value_row)])
    return raised, lowered


# ---- the program ----


@dataclass(frozen=True)
class FeaturesConfig(CollectionConfig):
    reads: str = field(Z_CAT, "z_cat: the features of SAEs; mlp: those of transcoders")
    sample: int = field(0, "live features of each layer to list, drawn at random, to judge by eye")
    pages: bool = field(True, "write the dashboards: 10 to 15 kB a feature")


def main():
    config = parse_flags(FeaturesConfig, __doc__)
    if config.sample < 0:
        raise UserError(f"--sample must be at least 0, not {config.sample}.")
    study = begin(config, "features")
    if config.reads not in (Z_CAT, MLP):
        raise UserError(f"--reads {config.reads} is neither {Z_CAT} nor {MLP}.")
    if config.reads == MLP:
        study = of_transcoders(study)
    collection = load_or_collect(study)
    tokens = collection.tokens
    classes = fuzzy_classes(study.tokenizer)[tokens.long()]
    families, records = {}, {}
    for layer, of_layer in collection.layers.items():
        families[layer] = find_families(of_layer, tokens, classes, config.seed)
        records[layer] = feature_records(study.model, study.saes[layer], layer, of_layer,
                                         families[layer], tokens)
    report_families(families, study.folder)
    for layer in records:
        write_json(study.folder / f"L{layer}" / "features.json",
                   {"sae": digest(study.saes[layer]), "n_tokens": collection.n_tokens,
                    "features": records[layer]})
    for old in study.folder.glob("L*/*.js"):                # of dashboards, from other features
        old.unlink()
    if config.pages:
        print("\nwriting the dashboards ...", flush=True)
        write_dashboards(study, collection, records)
    if config.sample:
        list_sample(study, collection, records)
    finish(study)


def of_transcoders(study):                                  # -> Study
    """The study of the transcoders beside the SAEs, in a folder of its own."""
    if not study.transcoders:
        raise UserError(f"there are no transcoders in {study.saes_from}/mlp; train some with "
                        f"python train.py --reads mlp.")
    return study._replace(saes=study.transcoders,
                          folder=study.folder.parent / MLP / study.folder.name)


# ---- the report ----


def report_families(families, folder):
    """Counts by layer, and the figure: context needed against share after a copy."""
    counts = {layer: count_families(of_layer) for layer, of_layer in families.items()}
    print("\nfeatures by family; one X: of those after a copy, with one token half or more of what "
          "they read")
    print("layer  " + "".join(f"{name:>15}" for name in FAMILIES) + "  one X")
    for layer, by_family in counts.items():
        print(f"{layer:5d}  " + "".join(f"{by_family[name]:15d}" for name in FAMILIES)
              + f"{by_family['one X']:7d}")
    write_json(folder / "families.json",
               {"min_after_copy": MIN_AFTER_COPY, "min_ratio_to_chance": MIN_RATIO_TO_CHANCE,
                "min_kept": MIN_KEPT, "contexts": CONTEXTS,
                "layers": {f"L{layer}": by_family for layer, by_family in counts.items()}})
    panels = {}
    for layer, of_layer in families.items():
        needed_index, _ = context_needed(of_layer.context.share)
        panels[layer] = {"context": needed_index.numpy(), "after_copy": of_layer.after_copy.numpy(),
                         "family": of_layer.family.numpy()}
    plot_families(panels, FAMILIES, CONTEXTS, folder / "families.png")


def write_dashboards(study, collection, records):
    """index.html, and files of 64 features each that it loads when one of them is opened."""
    for layer, of_layer in collection.layers.items():
        pages.write_features(study.folder, layer, collection.tokens, of_layer, records[layer],
                             BEFORE)
    vocabulary = {i: study.tokenizer.decode([i]) for i in tokens_shown(collection, records)}
    first_sae = next(iter(study.saes.values()))
    kind = "transcoders" if first_sae.reads == MLP else "SAEs"
    about = (f"Features of the {kind} of {study.config.model}, over {collection.n_tokens:,} tokens "
             f"of held-out text (--corpus {study.config.corpus}). ")
    if first_sae.reads != MLP:
        about += ("After a copy: share of the activation at places where the earlier token with "
                  "the largest DFA, the first left out, stands right after an earlier copy of the "
                  "current token. ")
    about += "Context: how many of the last tokens keep half of the activation."
    content = {"about": about, "families": FAMILIES, "contexts": CONTEXTS,
               "n_heads": n_heads_of(study.model, first_sae), "reads": first_sae.reads,
               "chunk": pages.CHUNK, "vocab": vocabulary,
               "features": {layer: page_columns(records[layer]) for layer in records}}
    pages.fill("dashboard.html", content, study.folder / "index.html")
    print(f"{study.folder}/index.html")


def tokens_shown(collection, records):                      # -> list of ids
    """Every token that a page may show: those of the text, and those that a feature raises or
    lowers most."""
    shown = set(collection.tokens.unique().tolist())
    for of_layer in records.values():
        for record in of_layer:
            shown |= {token for token, _ in record["raises"] + record["lowers"]}
    return sorted(shown)


def page_columns(records):
    """One layer's features for the page's table, column by column."""
    best_head = [int(np.argmax(r["head_weights"])) if r["head_weights"] else -1 for r in records]
    columns = {name: [r[name] for r in records]
               for name in ("feature", "largest", "after_copy", "context_index")}
    columns["family"] = [FAMILIES.index(r["family"]) for r in records]
    columns["frequency"] = [float(f"{r['frequency']:.3g}") for r in records]
    columns["head"] = best_head
    columns["weight"] = [r["head_weights"][h] if h >= 0 else None
                         for r, h in zip(records, best_head)]
    columns["fires"] = [r["fires_on"] for r in records]
    columns["logits"] = [[token for token, _ in r["raises"][:3]] for r in records]
    return columns


def list_sample(study, collection, records):
    """Live features drawn at random, each with its strongest example; the judgement is the
    reader's."""
    config = study.config
    lines = ["feature,page,clear (yes or no),what it means"]
    for layer, of_layer in collection.layers.items():
        live = records[layer]
        rng = np.random.default_rng([config.seed, layer])
        chosen = sorted(rng.choice(len(live), min(config.sample, len(live)), replace=False))
        print(f"\n{len(chosen)} of {len(live)} live features of layer {layer}, drawn with seed "
              f"{config.seed}")
        top = of_layer.collected.top                        # by feature, strongest first
        for record in (live[i] for i in chosen):
            strongest = int(torch.searchsorted(top.feature, record["feature"]))
            row = collection.tokens[top.row[strongest]]
            text = text_around(row, int(top.q[strongest]), study.tokenizer)
            name = f"{layer}.{record['feature']}"
            print(f"{name:8} {record['family']:14} {text}")
            lines.append(f"{name},index.html#{name},,")
    write_text(study.folder / "sample.csv", "\n".join(lines) + "\n")
    print(f"to fill in by eye: {study.folder}/sample.csv")


if __name__ == "__main__":
    run(main)
