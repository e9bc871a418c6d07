"""A prompt as a circuit: what an SAE feature, or a logit, was made of, back to the tokens
(recursive DFA; the paper, section 2).

In reading order: the residual stream as a sum of components; what a reader reads, one step; the
tree of such steps; the strongest path; totals over all paths; removing features; QK, why a head
looks where it looks. explorer.py is the program that prints and draws all this for a prompt.

Words. A *component* is a vector that was written to the residual stream; its *place* says by what
writer and where: kind, layer, position, feature. A *reader* is a feature or a logit that is taken
apart. What it reads is a sum of *terms*: one for each component that reaches it, head by head, and
constants, which nobody wrote. A *leaf* is a component that is no feature, where paths back end.

What is frozen. Three things are taken as they are in this prompt: attention patterns, the scales by
which norms divide, and which features are active. (Scales, because a norm undoes most of what makes
its input larger: followed through it, the terms could not sum to what is read.) So are the leaves:
nothing is followed through an SAE's error, an output without SAE, or BOS. What is left is linear,
and every sum is exact. That is an identity, true of any SAE, since its error is one of the
components. It is not what removing a feature does, which changes everything that is computed
later: `ablation_effects` removes features, runs the model anew, and looks.

Shapes: B batch, T positions (q query, k key/source), H heads, d_head, D = H*d_head, d_sae.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.errors import UserError
from direct import feature_bias
from sae import ablate, ablate_mlp, check_feature

# ---- the residual stream as a sum of components ----
#
# Before a layer, the stream at a position is the sum of everything written there: embeddings, and
# for each earlier layer
#
#     attention   its features f_j * W_dec[j] @ W_O, biases b_dec @ W_O + b_O, and the SAE's error
#                 (z_cat - z_hat) @ W_O; in Gemma 2 and 3 divided by scales["attn_out"]
#     MLP         its features f_j * W_dec[j], bias b_dec, and the transcoder's error y - y_hat
#
# An output without SAE or transcoder is one component, and so is each at BOS, where features are
# set to 0.

# "feature", "bias", "error" and "attention" are those of attention layers. Components have a kind
# as a number, places as a word.
KINDS = ("embedding", "position", "feature", "bias", "error", "attention", "MLP feature",
         "MLP bias", "MLP error", "MLP")
(EMBEDDING, POSITION, FEATURE, BIAS, ERROR, ATTENTION, MLP_FEATURE, MLP_BIAS, MLP_ERROR,
 MLP) = range(len(KINDS))
FEATURES = ("feature", "MLP feature")       # the kinds that are taken apart


class Place(NamedTuple):
    """Something in the circuit, as a writer or as a reader."""
    kind: str               # one of KINDS, "logit" or "constant"
    layer: int              # -1 for embeddings and constants; of a logit: the number of layers
    position: int           # -1 for constants
    feature: int = -1       # of a logit: the token
    against: int = -1       # of a logit: the token whose logit is subtracted; -1: the mean over all

    def name(self):
        """In words, without the position."""
        number = f"{self.layer}.{self.feature}"
        return {"feature": f"feature {number}", "MLP feature": f"MLP feature {number}",
                "error": f"SAE error {self.layer}", "MLP error": f"MLP error {self.layer}",
                "bias": f"bias of layer {self.layer}", "MLP bias": f"bias of MLP {self.layer}",
                "attention": f"attention {self.layer}", "MLP": f"MLP {self.layer}",
                "embedding": "token", "position": "position", "constant": "constant",
                "logit": f"logit of token {self.feature}"}[self.kind]


# who "wrote" constants, such as the biases of values and of a feature, which are in no component
NOBODY = Place("constant", layer=-1, position=-1)


class Components(NamedTuple):
    """What was written to the residual stream of one prompt, one row for each writer and position.

    *attention* and *MLP* are outputs that are not taken apart: at BOS, and in layers without an SAE
    or a transcoder.
    """
    kind: Tensor            # (N,) index into KINDS
    layer: Tensor           # (N,) where it was written; -1 for embeddings
    position: Tensor        # (N,)
    feature: Tensor         # (N,) or -1
    vector: Tensor          # (N,d_model)

    def pick(self, which):
        return Components(*(column[which] for column in self))

    def place(self, row):                                   # -> Place
        return Place(KINDS[int(self.kind[row])], int(self.layer[row]), int(self.position[row]),
                     int(self.feature[row]))

    def is_feature(self):                                   # -> (N,) bool
        return (self.kind == FEATURE) | (self.kind == MLP_FEATURE)

    def is_error(self):
        return (self.kind == ERROR) | (self.kind == MLP_ERROR)

    def is_whole(self):
        """Outputs without SAE or transcoder. Those at BOS do not count: there they are the same in
        every prompt."""
        return ((self.kind == ATTENTION) | (self.kind == MLP)) & (self.position > 0)


class TracedPrompt(NamedTuple):
    """A model's run on one prompt, and what its SAEs and transcoders make of it."""
    model: nn.Module
    saes: dict              # {layer: SAE}
    transcoders: dict       # {layer: Transcoder}
    tokens: Tensor          # (T,)
    cache: dict             # {layer: LayerCache}, B = 1
    f: dict                 # {layer: (T,d_sae)} of SAEs, 0 at BOS
    f_mlp: dict             # {layer: (T,d_sae)} of transcoders, 0 at BOS
    components: Components  # in the order in which they are written
    n_before: list          # n_before[layer]: how many of them are in the stream that the layer
                            # reads; n_before[n_layers]: all
    n_mid: list             # n_mid[layer]: how many are in the stream that its MLP reads
    matrices: list          # each layer's head_matrices

    def activation(self, place):
        """How active a feature is at its position."""
        f = self.f if place.kind == "feature" else self.f_mlp
        return float(f[place.layer][place.position, place.feature])


@torch.no_grad()
def trace_prompt(model, saes, tokens, transcoders=None):    # (T,) or (1,T) -> TracedPrompt
    """Run the model on one prompt and cut everything written to its residual stream into
    components. The first token is taken to be BOS."""
    transcoders = transcoders or {}
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    assert len(tokens) == 1, "one prompt at a time"
    check_one_dtype(model, saes, transcoders)
    everywhere = torch.arange(tokens.shape[1], device=tokens.device)
    matrices = [model.head_matrices(layer) for layer in range(model.config.n_layers)]
    cache = dict(model.layer_caches(tokens))

    f = {}
    f_mlp = {}
    written = []            # Components
    n_before = []
    n_mid = []

    def n_written():
        return sum(len(part.kind) for part in written)

    for name, vectors in model.embed_parts(tokens).items():
        written.append(component(KINDS.index(name), -1, everywhere, vectors[0]))
    for layer, kept in cache.items():
        n_before.append(n_written())
        if layer in saes:
            f[layer] = encode_prompt(saes[layer], kept.z_cat[0])
            written += attention_components(layer, kept, saes[layer], f[layer], matrices[layer])
        else:
            written.append(component(ATTENTION, layer, everywhere, kept.attn_out[0]))
        n_mid.append(n_written())
        if layer in transcoders:
            f_mlp[layer] = encode_prompt(transcoders[layer], kept.mlp_in[0])
            written += mlp_components(layer, kept, transcoders[layer], f_mlp[layer])
        else:
            written.append(component(MLP, layer, everywhere, kept.mlp_out[0]))
    n_before.append(n_written())
    components = Components(*(torch.cat(column) for column in zip(*written)))
    return TracedPrompt(model, saes, transcoders, tokens[0], cache, f, f_mlp, components, n_before,
                        n_mid, matrices)


def check_one_dtype(model, saes, transcoders):
    """Raise UserError where a model and its SAEs are in different types, or in narrow ones."""
    modules = (model, *saes.values(), *transcoders.values())
    dtypes = {p.dtype for module in modules for p in module.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise UserError(f"the model and its SAEs are in {' and '.join(sorted(map(str, dtypes)))}; "
                        f"attribution takes float32 or float64, the same for both, such as "
                        f"load_model(..., dtype=torch.float32).")


def encode_prompt(sae, z):                                  # (T,d_in) -> (T,d_sae)
    """Feature activations, 0 at BOS."""
    f = sae.encode(z)
    f[0] = 0
    return f


def component(kind, layer, positions, vectors, features=None):      # -> Components
    """What one writer wrote at some positions (n,): vectors (n,d_model)."""
    if features is None:
        features = torch.full_like(positions, -1)
    return Components(torch.full_like(positions, kind), torch.full_like(positions, layer),
                      positions, features, vectors)


def attention_components(layer, kept, sae, f, matrices):    # -> list of Components
    """An attention layer's output in terms of its SAE; f: (T,d_sae)."""
    position = torch.arange(len(f), device=f.device)
    attn_out = kept.attn_out[0]                                         # (T,d_model)
    W_O = matrices.W_O.flatten(0, 1)                                    # (D,d_model)
    scale = torch.ones_like(attn_out[:, :1])                            # (T,1)
    if "attn_out" in kept.scales:
        scale = kept.scales["attn_out"][0]
    active_at, active = f.nonzero(as_tuple=True)
    by_feature = f[active_at, active, None] * (sae.W_dec[active] @ W_O) / scale[active_at]
    bias = (sae.b_dec @ W_O + matrices.b_O) / scale
    error = (kept.z_cat[0] - sae.decode(f)) @ W_O / scale
    return [component(ATTENTION, layer, position[:1], attn_out[:1]),
            component(FEATURE, layer, active_at, by_feature, active),
            component(BIAS, layer, position[1:], bias[1:]),
            component(ERROR, layer, position[1:], error[1:])]


def mlp_components(layer, kept, transcoder, f):             # -> list of Components
    """An MLP's output in terms of its transcoder; f: (T,d_sae)."""
    position = torch.arange(len(f), device=f.device)
    mlp_out = kept.mlp_out[0]                                           # (T,d_model)
    active_at, active = f.nonzero(as_tuple=True)
    by_feature = f[active_at, active, None] * transcoder.W_dec[active]
    bias = transcoder.b_dec.expand_as(mlp_out)
    error = mlp_out - transcoder.decode(f)
    return [component(MLP, layer, position[:1], mlp_out[:1]),
            component(MLP_FEATURE, layer, active_at, by_feature, active),
            component(MLP_BIAS, layer, position[1:], bias[1:]),
            component(MLP_ERROR, layer, position[1:], error[1:])]


# ---- recursive attribution: one step ----
#
# With patterns and norm scales frozen, what a head moves is linear in the stream at the source. So
# an attention feature's pre-activation is a sum over (head, component), and biases:
#
#     pre_i(q) = sum_{h,n} pattern[h,q,k_n] / scale[k_n] * (component_n @ W_V[h] . w^h)
#                + sum_h b_V[h] . w^h  +  b_enc[i] - b_dec . w
#
# where component n was written at position k_n, and scale[k] is scales["attn_in"] there. W_V and
# b_V are those of model.head_matrices: the norm's gain, centring and bias are in them. An MLP
# feature reads at its own position alone, and a logit does so too:
#
#     pre_i(q) = sum_n component_n . d / scale[q]  +  constant + b_enc[i]
#
# with scale of scales["mlp_in"] and d, constant of model.mlp_directions; for a logit, of the final
# norm and model.logit_directions.
#
# An active feature j among the components has f_j = pre_j (ReLU passes it unchanged), so what it
# contributes to a reader is a fixed multiple of pre_j; and pre_j is a sum by the same formulas,
# whose terms times that multiple are its children.


class Terms(NamedTuple):
    """The n terms of what a reader reads.

    Of an attention feature: one for each head and each component written at or before the query,
    head by head; then a constant for each head, from its value bias; then the feature's own bias.
    Of an MLP feature or a logit: one for each component written at the position, then a constant.
    """
    head: Tensor            # (n,) the head that reads the component, or whose values have the
                            # constant; -1 where there is none
    component: Tensor       # (n,) row of traced.components, or -1 for a constant
    value: Tensor           # (n,) they sum to pre
    pre: float              # the pre-activation, or the logit

    def over_heads(self):                                   # -> (m,), (m,)
        """Summed over heads, constants left out, strongest first: rows of traced.components,
        values."""
        is_written = self.component >= 0
        rows, index = self.component[is_written].unique(return_inverse=True)
        value = self.value.new_zeros(len(rows)).index_add_(0, index, self.value[is_written])
        order = value.abs().argsort(descending=True, stable=True)
        return rows[order], value[order]

    def by_head(self, row):                                 # -> {head: value}
        """How much of one component each head brings, strongest first; {} where none does."""
        of_row = self.component == row
        brought = {head: value for head, value in zip(self.head[of_row].tolist(),
                                                      self.value[of_row].tolist()) if head >= 0}
        return dict(sorted(brought.items(), key=lambda item: -abs(item[1])))


@torch.no_grad()
def read_terms(traced, reader):                             # Place -> Terms
    """What a reader reads, as the sum above."""
    if reader.kind == "feature":
        return attention_terms(traced, reader.layer, reader.position, reader.feature)
    if reader.kind == "MLP feature":
        return mlp_terms(traced, reader.layer, reader.position, reader.feature)
    return logit_terms(traced, reader)


def attention_terms(traced, layer, position, feature):      # -> Terms
    """What heads bring to a feature: the first formula above, term by term.

    For each head, every one of the first n_before[layer] components that was written at or before
    the position; then each head's constant; then `direct.feature_bias`, which has no head.
    """
    kept = traced.cache[layer]
    sae = traced.saes[layer]
    m = traced.matrices[layer]
    n_heads = traced.model.config.n_heads
    components = traced.components.pick(slice(traced.n_before[layer]))
    w = sae.W_enc[:, feature].unflatten(0, (n_heads, -1))               # (H,d_head)
    direction = torch.einsum("hmd,hd->hm", m.W_V, w)                    # (H,d_model) read per head

    # Rows of the S components written at or before the query; the same rows of traced.components,
    # since `components` is its beginning.
    seen = (components.position <= position).nonzero()[:, 0]            # (S,)
    k = components.position[seen]                                       # (S,) positions
    attention = kept.pattern[0, :, position, k]                         # (H,S)
    scale = kept.scales["attn_in"][0, k, 0]                             # (S,)
    brought = attention / scale * (direction @ components.vector[seen].T)   # (H,S)
    from_b_V = torch.einsum("hd,hd->h", m.b_V, w)                       # (H,)
    own_bias = feature_bias(sae)[feature, None]                         # (1,)

    heads = torch.arange(n_heads, device=k.device)
    nobody = k.new_full((n_heads + 1,), -1)
    head = torch.cat([heads.repeat_interleave(len(seen)), heads, nobody[:1]])
    component = torch.cat([seen.repeat(n_heads), nobody])
    value = torch.cat([brought.flatten(), from_b_V, own_bias])
    return Terms(head, component, value, float(value.sum()))


def mlp_terms(traced, layer, position, feature):            # -> Terms
    """What an MLP feature reads."""
    transcoder = traced.transcoders[layer]
    w = transcoder.W_enc[:, feature, None]                              # (d_model,1)
    direction, constant = traced.model.mlp_directions(layer, w)         # (d_model,1), (1,)
    scale = traced.cache[layer].scales["mlp_in"][0, position]           # (1,)
    return terms_at(traced, traced.n_mid[layer], position, direction[:, 0] / scale,
                    constant + feature_bias(transcoder)[feature])


def logit_terms(traced, reader):                            # -> Terms
    """What makes a logit, less another or less the mean over all tokens; before a soft cap."""
    direction, constant = scaled_logit_direction(traced, reader)
    return terms_at(traced, traced.n_before[-1], reader.position, direction, constant)


def scaled_logit_direction(traced, reader):                 # -> (d_model,), (1,)
    """`logit_direction` over the final norm's scale in this prompt."""
    model = traced.model
    direction, constant = logit_direction(model, reader)
    final = traced.cache[model.config.n_layers - 1].resid_post[0, reader.position]
    return direction / model.final_scale(final), constant


def logit_direction(model, reader):                         # -> (d_model,), (1,)
    """The direction of the normalised stream along which a logit grows, and its constant part."""
    tokens = [reader.feature] if reader.against < 0 else [reader.feature, reader.against]
    tokens = torch.tensor(tokens, device=next(model.parameters()).device)
    directions = model.logit_directions(tokens)
    constants = model.logit_constants(tokens)
    if reader.against < 0:
        return directions[0], constants
    return directions[0] - directions[1], constants[:1] - constants[1:]


def terms_at(traced, n_seen, position, direction, constant):    # (d_model,), (1,) -> Terms
    """What is read along a direction at one position, of the first n_seen components."""
    components = traced.components.pick(slice(n_seen))
    here = (components.position == position).nonzero()[:, 0]            # (n,)
    value = torch.cat([components.vector[here] @ direction, constant])
    rows = torch.cat([here, here.new_tensor([-1])])
    return Terms(torch.full_like(rows, -1), rows, value, float(value.sum()))


def upstream_features(traced, reader):                      # -> (n,), (n,)
    """The earlier features that a reader reads, summed over heads, strongest first -> rows of
    traced.components, values."""
    rows, value = read_terms(traced, reader).over_heads()
    is_feature = traced.components.is_feature()[rows]
    return rows[is_feature], value[is_feature]


def check_place(traced, place):
    """Raise UserError where a prompt has no such feature or logit to take apart."""
    last = len(traced.tokens) - 1
    first = 0 if place.kind == "logit" else 1               # no feature is active at BOS
    if place.kind != "logit":
        traced.model.check_layers([place.layer])
        dictionaries = traced.transcoders if place.kind == "MLP feature" else traced.saes
        check_feature(dictionaries, place.layer, place.feature, place.kind)
    if not first <= place.position <= last:
        raise UserError(f"position {place.position} is out of range: this prompt has positions "
                        f"{first} to {last}" + (" after BOS." if first else "."))
    if place.kind != "logit":
        return
    tokens = [place.feature] if place.against < 0 else [place.feature, place.against]
    for token in tokens:
        if not 0 <= token < traced.model.n_tokens:
            raise UserError(f"token {token} is out of range: this model has tokens 0 to "
                            f"{traced.model.n_tokens - 1}.")
    if place.feature == place.against:
        raise UserError(f"the logit of token {place.feature} less itself is 0; name another token.")


# ---- recursive attribution: the tree ----
#
# The circuit is a graph; the tree unrolls it. A feature that two heads read, or that is reached by
# two ways, stands in it twice, with what it contributes by either way. At every node that is taken
# apart
#
#     value = the values of its children + pruned
#
# A child's value is its term times C = d root / d pre, the factor with which the node's
# pre-activation enters the root: 1 at the root, and below it value / f.


class Node(NamedTuple):
    """One node of the tree."""
    place: Place
    head: int               # in the parent's layer, which reads it; -1: none does
    value: float            # what it contributes to the root; the root's own is its
                            # pre-activation, or the logit (less the mean, or less another)
    # About its children. A node that is not taken apart (no feature, or at the last level) keeps
    # these defaults.
    children: tuple = ()    # strongest first, those that are not pruned
    pruned: float = 0.0     # sum of the values, with their signs, of the children left out
    n_pruned: int = 0       # how many were left out that contribute something
    unexplained: float = 0.0    # sum of the values of those children, pruned ones too, that are
                                # errors or outputs that are not taken apart


def trace(traced, place, share=0.02, depth=3, breadth=8):   # -> Node
    """The tree of a feature, or of a logit: then a whole circuit is one tree.

    A child is shown if it contributes at least `share` of the root (and not 0) and is among the
    `breadth` strongest of its parent; features are taken apart down to `depth` levels. share=0 and
    breadth=None prune nothing.

    Raises UserError for a layer without SAE and for numbers out of range.
    """
    check_place(traced, place)
    terms = read_terms(traced, place)
    root = Node(place, head=-1, value=terms.pre)
    return expand(traced, root, terms, 1.0, share * abs(root.value), depth, breadth)


def expand(traced, node, terms, C, least, depth, breadth):  # -> the node with its children
    """The children of a node, from what it reads. C: as above. least: what a child that is shown
    contributes at least."""
    components = traced.components
    values = terms.value * C
    size = values.abs()
    by_size = size.argsort(descending=True, stable=True)
    is_large = (size >= least) & (values != 0)
    shown = by_size[is_large[by_size]][:breadth]            # the large ones, strongest first
    pruned = torch.ones_like(values, dtype=torch.bool)
    pruned[shown] = False

    children = []
    for i in shown.tolist():
        row = int(terms.component[i])
        place = NOBODY if row < 0 else components.place(row)
        child = Node(place, int(terms.head[i]), float(values[i]))
        if place.kind in FEATURES and depth > 1:
            below = read_terms(traced, place)
            C_below = child.value / traced.activation(place)
            child = expand(traced, child, below, C_below, least, depth - 1, breadth)
        children.append(child)

    # a constant's -1 takes the last component's entry, which the next line takes back
    is_unexplained = (components.is_error() | components.is_whole())[terms.component]
    is_unexplained &= terms.component >= 0
    return node._replace(children=tuple(children), pruned=float(values[pruned].sum()),
                         n_pruned=int((pruned & (values != 0)).sum()),
                         unexplained=float(values[is_unexplained].sum()))


def ratio(part, total):
    """A part of a total; 0 of a total that cancels to nothing."""
    return part / total if total else 0.0


# ---- the strongest path ----


class Step(NamedTuple):
    """One step of a path back."""
    reader: Place
    pre: float              # all that it reads
    row: int                # of traced.components: the component that contributes most
    value: float            # what it contributes to this reader, not to the root; over all heads
    by_head: dict           # {head: value}, strongest first; {} where no head reads it


def strongest_path(traced, place):                          # -> [Step]
    """From a reader back: at every step the component with the largest contribution above 0, over
    all heads, to what the step before found. Constants do not compete. It goes on while that is a
    feature, and ends at a leaf, or where nothing is above 0.

    The best step each time: the best whole path may be another.
    """
    path = []
    while place is not None:
        terms = read_terms(traced, place)
        rows, value = terms.over_heads()
        if not (value > 0).any():
            break
        best = int(value.argmax())
        row = int(rows[best])
        path.append(Step(place, terms.pre, row, float(value[best]), terms.by_head(row)))
        writer = traced.components.place(row)
        place = writer if writer.kind in FEATURES else None
    return path


# ---- totals over all paths ----
#
# Everything between the root and its leaves is linear while patterns, norm scales and the choice of
# active features are frozen. So what each component contributes over all paths takes one sweep,
# from the last writer to the first, and no tree, which would have as many nodes as there are paths.
# The sweep carries d root / d stream, one vector for each position:
#
#     component n, written at k       contributes vector_n . gradient[k]
#     feature j, active, written at k its pre-activation enters the root with the factor
#                                     C_j = contribution / f_j, so that what it reads adds
#                                     C_j d pre_j / d stream to the gradient
#
# At the root C is 1. Leaves are what is no feature: embeddings, biases, errors, and what is not
# taken apart; they and the constants sum to the root.


class Totals(NamedTuple):
    """What each component contributes to a root, over all paths; the root's own entry is 0."""
    contribution: Tensor    # (N,)
    constants: Tensor       # (m,) of biases that nobody wrote to the stream


@torch.no_grad()
def totals(traced, root):                                   # Place -> Totals
    """The contributions of all components to a feature or a logit."""
    components = traced.components
    gradient = torch.zeros_like(traced.cache[0].resid_pre[0])           # (T,d_model)
    contribution = gradient.new_zeros(len(components.kind))
    constants = []
    if root.kind == "logit":
        direction, constant = scaled_logit_direction(traced, root)
        gradient[root.position] = direction
        constants.append(constant)

    # Until the root is reached the gradient is 0, and so is what is written there.
    for kind, layer, rows in reversed(writers(traced)):
        written = components.pick(rows)
        contribution[rows] = (written.vector * gradient[written.position]).sum(-1)
        activations = {"feature": traced.f, "MLP feature": traced.f_mlp}.get(kind, {})
        if layer not in activations:                        # embeddings, and what is not cut
            continue
        f = activations[layer]
        is_feature = written.is_feature()
        at = (written.position[is_feature], written.feature[is_feature])
        C = torch.zeros_like(f)                                         # (T,d_sae)
        C[at] = contribution[rows][is_feature] / f[at]
        if (kind, layer) == (root.kind, root.layer):
            C[root.position, root.feature] = 1.0
        back = back_through_heads if kind == "feature" else back_through_mlp
        gradient, constant = back(traced, layer, C, gradient)
        constants.append(constant)
    return Totals(contribution, torch.cat(constants))


def writers(traced):                                        # -> [(kind, layer, slice)]
    """Who wrote which rows of the components, first to last: the embeddings, then attention and MLP
    of each layer, by the kind of their features."""
    found = [("embedding", -1, slice(traced.n_before[0]))]
    for layer, middle in enumerate(traced.n_mid):
        found.append(("feature", layer, slice(traced.n_before[layer], middle)))
        found.append(("MLP feature", layer, slice(middle, traced.n_before[layer + 1])))
    return found


def back_through_mlp(traced, layer, C, gradient):           # (T,d_sae), (T,d_model)
    """d root / d stream before an MLP (T,d_model), from that after it and from C, d root / d pre of
    each feature; and what their constants contribute (m,)."""
    transcoder = traced.transcoders[layer]
    directions, constants = traced.model.mlp_directions(layer, transcoder.W_enc)
    scale = traced.cache[layer].scales["mlp_in"][0]                     # (T,1)
    gradient = gradient + C @ directions.T / scale
    return gradient, (C * (constants + feature_bias(transcoder)))[C != 0]


def back_through_heads(traced, layer, C, gradient):         # (T,d_sae), (T,d_model)
    """The same of an attention layer."""
    kept = traced.cache[layer]
    sae = traced.saes[layer]
    m = traced.matrices[layer]
    w = (C @ sae.W_enc.T).unflatten(1, m.b_V.shape)                     # (q,H,d_head)
    direction = torch.einsum("qhd,hmd->qhm", w, m.W_V)                  # (q,H,d_model)
    to_source = torch.einsum("hqk,qhm->km", kept.pattern[0], direction)     # (T,d_model)
    gradient = gradient + to_source / kept.scales["attn_in"][0]
    constants = m.b_V.flatten() @ sae.W_enc + feature_bias(sae)     # (d_sae,): direct.constant_part
    return gradient, (C * constants)[C != 0]


def ends(traced, root):                                     # -> {what: (net, size)}
    """What all paths to a root end in: contributions summed with their signs, and by size. The nets
    sum to the root."""
    components = traced.components
    contribution, constants = totals(traced, root)
    at_bos = components.position == 0
    is_token = (components.kind == EMBEDDING) | (components.kind == POSITION)
    is_bias = (components.kind == BIAS) | (components.kind == MLP_BIAS)
    found = {"tokens and positions": contribution[is_token & ~at_bos],
             "what stands at BOS": contribution[at_bos],
             "biases written to the stream": contribution[is_bias],
             "constants of readers": constants,
             "errors": contribution[components.is_error()],
             "outputs not taken apart": contribution[components.is_whole()]}
    return {what: (float(values.sum()), float(values.abs().sum()))
            for what, values in found.items()}


def unexplained_share(found):                               # of `ends` -> float
    """The share of the ends, by size, that are errors or outputs not taken apart."""
    size = {what: size for what, (net, size) in found.items()}
    return ratio(size["errors"] + size["outputs not taken apart"], sum(size.values()))


# ---- removing features, nothing frozen ----


@torch.no_grad()
def ablation_effects(traced, upstream, reader):             # (n,), Place -> (n,)
    """Drop in what a reader reads when each upstream feature (a row of Components) is ablated where
    it was written.

    The error of its SAE or transcoder is kept there, and everything later is computed anew: nothing
    is frozen.
    """
    chosen = traced.components.pick(upstream)
    n = len(upstream)
    T = len(traced.tokens)
    at = torch.arange(T, device=upstream.device) == chosen.position[:, None]        # (n,T)
    edit_z = {}
    edit_mlp = {}
    # Each row of the batch loses one upstream feature, by the edit of that feature's layer. In the
    # edits of other layers that row's mask is empty, so the 0 put in for its feature is never used.
    sites = ((FEATURE, traced.saes, ablate, edit_z),
             (MLP_FEATURE, traced.transcoders, ablate_mlp, edit_mlp))
    for kind, dictionaries, make, edits in sites:
        for layer in chosen.layer[chosen.kind == kind].unique().tolist():
            is_here = (chosen.kind == kind) & (chosen.layer == layer)
            features = torch.where(is_here, chosen.feature, 0)
            edits[layer] = make(dictionaries[layer], features, at & is_here[:, None])
    clean = read_anew(traced, reader, traced.tokens[None], {}, {})
    return clean - read_anew(traced, reader, traced.tokens.expand(n, T), edit_z, edit_mlp)


def read_anew(traced, reader, tokens, edit_z, edit_mlp):    # (B,T) -> (B,)
    """What a reader reads in a run with edits."""
    model = traced.model
    layer = reader.layer
    if reader.kind == "feature":
        z = model.z_cat_at(tokens, [layer], edit_z, edit_mlp)[layer]
        pre = traced.saes[layer].pre_activations(z[:, reader.position])
        return pre[:, reader.feature]
    if reader.kind == "MLP feature":
        mlp_in = model.mlp_at(tokens, [layer], edit_z, edit_mlp)[layer].mlp_in
        pre = traced.transcoders[layer].pre_activations(mlp_in[:, reader.position])
        return pre[:, reader.feature]
    x, _ = model.run_layers(model.embed(tokens), edit_z, edit_mlp=edit_mlp)
    at_position = x[:, reader.position]                                 # (B,d_model)
    direction, constant = logit_direction(model, reader)
    return at_position @ direction / model.final_scale(at_position)[:, 0] + constant


# ---- QK: why a head looks there ----
#
# The score of a query and a key is score_scale * q . k, and q and k are linear in the stream once
# scales are frozen:
#
#     score[h,q,k] = sum_{a,b} score_scale * q_a . k_b
#
# where a runs over the components at position q and the query's bias, b over the components at
# position k and the key's bias; before soft cap, mask and softmax. What is the same at all keys
# cancels when two are compared.


class QK(NamedTuple):
    """A score, or a difference of scores, as a sum over pairs of writers."""
    # Places with position -1: each writer once, wherever it wrote
    query: list             # (a,) at the query
    key: list               # (b,) at the keys
    pairs: Tensor           # (a,b) contributions; they sum to score
    score: float            # before soft cap, mask and softmax


@torch.no_grad()
def qk(traced, layer, head, query, key, against=None):      # -> QK
    """Why head `head` at `query` looks at `key`: the score as a sum over pairs of writers.

    against: None for the score itself; "others" for the score less the mean over the other keys
    that the query sees, if there are any; a position for the score less that key's. Raises
    UserError for a layer, a head or a key that is not there to be seen.
    """
    check_score(traced, layer, head, query, key, against)
    # Scores are linear in the keys: a score less others is q . (k_key - their mean), so that each
    # key has a coefficient.
    coefficient = key_coefficients(traced, layer, query, key, against)  # (T,)
    position = torch.arange(len(traced.tokens), device=coefficient.device)
    q_writers, q_vectors, _ = qk_vectors(traced, layer, head, "q", position == query)
    k_writers, k_vectors, k_position = qk_vectors(traced, layer, head, "k", coefficient != 0)
    k_vectors = coefficient[k_position, None] * k_vectors
    scores = traced.model.config.score_scale * q_vectors @ k_vectors.T  # (a,n)

    # Each writer at any of these keys is one column: what it adds at the key (0 if it is not
    # there), less its mean over the keys that the key is compared with.
    column_of = {}
    for writer in k_writers:
        column_of.setdefault(writer, len(column_of))
    index = torch.tensor([column_of[writer] for writer in k_writers], device=scores.device)
    pairs = scores.new_zeros(len(q_writers), len(column_of)).index_add_(1, index, scores)
    return QK(q_writers, list(column_of), pairs, float(pairs.sum()))


def seen_keys(model, layer, query):                         # -> range
    """The keys that a query of this layer sees: none after it, none before its window."""
    windows = getattr(model.config, "windows", None)
    window = windows[layer] if windows else None
    first = 0 if window is None else max(0, query - window + 1)
    return range(first, query + 1)


def check_score(traced, layer, head, query, key, against):
    """Raise UserError where a prompt has no such score."""
    traced.model.check_layers([layer])
    last_head = traced.model.config.n_heads - 1
    if not 0 <= head <= last_head:
        raise UserError(f"head {layer}.{head} is out of range: this model has heads 0 to "
                        f"{last_head}.")
    last = len(traced.tokens) - 1
    if not 0 <= query <= last:
        raise UserError(f"query {query} is out of range: this prompt has positions 0 to {last}.")
    seen = seen_keys(traced.model, layer, query)
    for position in (key, against):
        if position not in (None, "others") and position not in seen:
            raise UserError(f"query {query} cannot attend to key {position}; it sees keys "
                            f"{seen[0]} to {seen[-1]}.")
    if against == key:
        raise UserError(f"key {key} against itself leaves nothing; name another key.")


def key_coefficients(traced, layer, query, key, against):   # -> (T,)
    """1 at the key, and -1/n at each of the n keys that it is compared with."""
    coefficient = traced.cache[layer].resid_pre.new_zeros(len(traced.tokens))
    if against == "others":
        others = [k for k in seen_keys(traced.model, layer, query) if k != key]
        coefficient[others] = -1 / max(len(others), 1)
    elif against is not None:
        coefficient[against] = -1
    coefficient[key] = 1
    return coefficient


def qk_vectors(traced, layer, head, side, where):           # -> writers, (n,d_head), (n,)
    """What is added to a head's queries (side "q") or keys ("k") at the positions `where`, (T,)
    bool.

    One entry for each component written there, and one for the bias at each of these positions:
    who wrote it, a Place without its position; what it adds; where.
    """
    kept = traced.cache[layer]
    m = traced.matrices[layer]
    W, b = (m.W_Q, m.b_Q) if side == "q" else (m.W_K, m.b_K)
    components = traced.components.pick(slice(traced.n_before[layer]))
    components = components.pick(where[components.position])
    bias_at = where.nonzero()[:, 0]
    positions = torch.cat([components.position, bias_at])
    normalised = components.vector / kept.scales["attn_in"][0, components.position]
    vectors = torch.cat([normalised @ W[head], b[head].expand(len(bias_at), -1)])
    if side in kept.scales:                                 # Gemma 3 normalises queries and keys
        vectors = vectors / kept.scales[side][0, positions, head]
    # entries stand where tokens would, each with its own position
    vectors = traced.model.rotate(vectors[None, :, None], layer, positions)[0, :, 0]
    columns = (components.kind.tolist(), components.layer.tolist(), components.feature.tolist())
    writers = [Place(KINDS[kind], written_in, -1, feature)
               for kind, written_in, feature in zip(*columns)]
    writers += [NOBODY] * len(bias_at)
    return writers, vectors, positions


def strongest_pairs(why, n):                                # QK -> [(writer, writer, value)]
    """The n pairs with the largest contributions to a score, of either sign."""
    flat = why.pairs.flatten()
    pairs = []
    for i in flat.abs().argsort(descending=True)[:n].tolist():
        a, b = divmod(i, len(why.key))
        pairs.append((why.query[a], why.key[b], float(flat[i])))
    return pairs
