"""The sparse autoencoder (SAE) of the paper, section 2, with its gradient worked out by hand.

    pre   = (z - b_dec) @ W_enc + b_enc
    f     = pre * (pre > threshold)                 threshold 0 is ReLU, the paper's; above 0 it is JumpReLU
    z_hat = f @ W_dec + b_dec                       rows of W_dec have unit norm

    loss  = sum_d (z_hat - z)^2 + l1 * sum_i f_i    sums over d_in and d_sae, then the mean over the batch

An SAE reads the z_cat of one attention layer, so d_in = D = H*d_head. Here are the two functions, the loss
with its gradient (`dense_step`, and the same in `sparse_step` at a fraction of the cost), what keeps the
decoder's rows at unit norm, how dead features are drawn anew, where features are active in text, the edits of
z_cat that use an SAE, and saving and loading.

Shapes: B batch (or any leading dimensions), d_in, d_sae; nnz entries (input, feature) of a batch that may be
active, of which some turn out not to be.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.common import UserError, atomic, fast_bfloat16
from data.keep import Entries
from data.sae_files import read_sae, sae_paths

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class SAE(nn.Module):
    """f = encode(z), z_hat = decode(f). Parameters: W_enc (d_in,d_sae), b_enc (d_sae), W_dec (d_sae,d_in),
    b_dec (d_in), and the constant threshold (d_sae)."""

    def __init__(self, d_in, d_sae, generator=None):
        super().__init__()
        W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
        W_enc = W_dec.T.contiguous()            # fused Adam walks through memory: no transposed view
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(torch.zeros(d_sae))
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))

    @property
    def d_in(self):
        return self.W_dec.shape[1]

    @property
    def d_sae(self):
        return self.W_dec.shape[0]

    def encode(self, z):                                                # (...,d_in) -> f (...,d_sae)
        """Feature activations, never negative where threshold >= 0."""
        pre = (z - self.b_dec) @ self.W_enc + self.b_enc
        return pre * (pre > self.threshold)

    def activation(self, z, features):              # (...,d_in), int or (m,) -> (...) or (...,m)
        """encode(z) at one feature or a few, for the price of these."""
        pre = (z - self.b_dec) @ self.W_enc[:, features] + self.b_enc[features]
        return pre * (pre > self.threshold[features])

    def decode(self, f):                                                # (...,d_sae) -> z_hat (...,d_in)
        """The reconstruction."""
        return f @ self.W_dec + self.b_dec

    def forward(self, z):                                               # (...,d_in) -> z_hat (...,d_in)
        return self.decode(self.encode(z))

    @torch.no_grad()
    def shift(self, c):
        """Make an SAE of z - c read z: b_dec += c, in place -> self. See model.value_bias for the c of folded
        weights."""
        self.b_dec += c
        return self

    @torch.no_grad()
    def rescale(self, s):
        """Make an SAE of z / s read z, with features s times as large: biases and threshold times s, in place
        -> self."""
        self.b_enc *= s
        self.b_dec *= s
        self.threshold *= s
        return self

    def save(self, path, dtype=torch.float32):
        """Write the five tensors to `path` (a .safetensors file) in `dtype`; the same SAE gives the same
        bytes."""
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name,
                   tensor in self.state_dict().items()}
        with atomic(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path, device="cpu"):
        """Read what `save` wrote, or an SAE that others published, in the formats of data/sae_files.py.

        Raises UserError if a file is missing or damaged, or if a tensor is missing, has another shape or is
        not finite.
        """
        tensors = read_sae(path)
        with torch.device("meta"):
            sae = cls(*tensors["W_enc"].shape)
        sae.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, assign=True)
        return sae.requires_grad_(False)


def load_all(where, model, layers=None, device="cpu"):
    """The SAEs of several layers of a model -> {layer: SAE}.

    where: a folder with L<layer>/ in it, as train.py writes (out/tiny); or a published set: "kissane" (the
    paper's, GPT-2 Small) or "gemma-scope" (Gemma 2 2B, width 16k, L0 about 100). The paper's SAEs, in a
    folder too, are shifted to read z of plain weights. layers: all that are there if not given. Raises
    UserError if one is missing or does not fit the model.
    """
    model.check_layers(layers or ())
    d_in, saes = model.config.n_heads * model.config.d_head, {}
    for layer, path in sae_paths(where, layers, model.config.n_layers).items():
        saes[layer] = SAE.load(path, device)
        if saes[layer].d_in != d_in:
            raise UserError(f"--saes {where}: the SAE of layer {layer} reads {saes[layer].d_in} numbers and "
                            f"this model's z_cat has {d_in}; they do not belong together.")
        if path.suffix == ".pt":        # the paper's, trained on z that lacks value_bias
            saes[layer].shift(model.value_bias(layer).to(device))
    return saes


def check_feature(saes, layer, feature):
    """Raise UserError where there is no such SAE or feature."""
    if layer not in saes:
        raise UserError(f"layer {layer} has no SAE; it has one on layers {', '.join(map(str, saes))}.")
    if not 0 <= feature < saes[layer].d_sae:
        raise UserError(f"feature {feature} is out of range: this SAE has features 0 to "
                        f"{saes[layer].d_sae - 1}.")


# ---- the loss and its gradient ----
#
# With x = z - b_dec, e = z_hat - z, and every sum over the batch carrying 1/B:
#     dL/dz_hat = 2 e / B                      =: g
#     dL/df     = g @ W_dec^T + l1 / B
#     dL/dpre   = dL/df where the feature is active, else 0
#     dL/dW_dec = f^T @ g                      dL/dW_enc = x^T @ dL/dpre
#     dL/db_enc = sum_b dL/dpre                dL/db_dec = sum_b g  -  W_enc @ (sum_b dL/dpre)
# b_dec enters twice: it is added to z_hat, and subtracted from z in x.


class Step(NamedTuple):
    """One batch's loss and gradients."""
    mse: Tensor             # sum over d_in, mean over B
    sparsity: Tensor        # sum_i f_i, mean over B: the loss is mse + l1 * sparsity
    fired: Tensor           # (d_sae,) int64, inputs on which each feature was active; their sum over B is L0
    gradients: dict         # {"W_enc": (d_in,d_sae), "b_enc": ..., "W_dec": ..., "b_dec": ...}


@torch.no_grad()
def dense_step(sae, z, l1):                                             # (B,d_in) -> Step
    """Loss and gradient by five dense matrix products of B * d_in * d_sae multiplications each."""
    x = z - sae.b_dec
    pre = x @ sae.W_enc + sae.b_enc
    active = pre > sae.threshold
    f = pre * active
    e = f @ sae.W_dec + sae.b_dec - z
    g = 2 * e / len(z)
    d_pre = (g @ sae.W_dec.T + l1 / len(z)) * active
    d_b_enc = d_pre.sum(0)
    gradients = {"W_enc": x.T @ d_pre, "b_enc": d_b_enc, "W_dec": f.T @ g,
                 "b_dec": g.sum(0) - sae.W_enc @ d_b_enc}
    return Step(e.square().sum() / len(z), f.sum() / len(z), active.sum(0), gradients)


@torch.no_grad()
def sparse_step(sae, z, l1):                                            # (B,d_in) -> Step
    """The same to float precision, at the price of one low-precision product: the rest touches nnz entries.

    The entries of a batch that may be active are a list, row by row: entry j is feature cols[j] in row
    rows[j], and the entries of row b begin at crow[b]. Products with such a matrix are weighted sums of a few
    rows (`embedding_bag`); the values of a dense product at its entries alone are `sampled_addmm`.
    """
    B = len(z)
    x = z - sae.b_dec
    rows, cols, crow, pre = pre_activations(sae, x)
    active = pre > sae.threshold[cols]
    f = pre * active                                                    # (nnz,)
    e = weighted_rows(crow, cols, f, sae.W_dec) + sae.b_dec - z         # (B,d_in)
    g = 2 * e / B
    d_pre = (product_at(crow, cols, g, sae.W_dec) + l1 / B) * active    # (nnz,)

    order = by_feature(cols, sae.d_sae)                                 # the same entries, feature by feature
    ccol, rows = starts(cols[order], sae.d_sae), rows[order]
    d_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, cols, d_pre)
    gradients = {"W_enc": weighted_rows(ccol, rows, d_pre[order], x).T.contiguous(), "b_enc": d_b_enc,
                 "W_dec": weighted_rows(ccol, rows, f[order], g), "b_dec": g.sum(0) - sae.W_enc @ d_b_enc}
    fired = torch.zeros(sae.d_sae, dtype=torch.int64).index_add_(0, cols, active.long())
    return Step(e.square().sum() / B, f.sum() / B, fired, gradients)


def pre_activations(sae, x):                    # (B,d_in) -> rows, cols (nnz,), crow (B+1,), pre (nnz,)
    """The pre-activations of all entries that may be active, in float32, as a list row by row."""
    W = sae.W_enc.T.contiguous()                        # a feature's weights side by side
    rows, cols = candidates(x, W, sae.b_enc - sae.threshold)
    crow = starts(rows, len(x))
    return rows, cols, crow, product_at(crow, cols, x, W) + sae.b_enc[cols]


def candidates(x, W, bias):                     # (B,d_in), (d_sae,d_in), (d_sae,) -> rows, cols (nnz,) each
    """Every entry of x @ W^T + bias that may be above 0, found by a bfloat16 product; some that are not come
    along.

    bfloat16 keeps 8 bits: rounding moves a number by at most u = 2^-8 of itself. With x' and w' rounded,
    x . w is moved by at most |x - x'| |w| + u |x'| |w| (Cauchy-Schwarz), and the float32 sum of d products by
    another d 2^-24 |x'| |w|. The bias rides along as one more dimension of x and W, and this margin as
    another, both made larger by what their own rounding can take: where the sum is not above 0, the exact
    value is not. Processors that only emulate bfloat16 take the product in float32, where u is 2^-24.
    """
    kind = torch.bfloat16 if fast_bfloat16(x.device) else torch.float32
    two_u, rounded, bias = torch.finfo(kind).eps, x.to(kind), bias[:, None]
    size = lambda rows: rows.norm(dim=1, keepdim=True)
    margin = size(x - rounded) + (two_u / 2 + (x.shape[1] + 2) * 2.0**-24) * size(x)            # (B,1)
    left = torch.cat([x, torch.ones_like(margin), (1 + 3 * two_u) * margin], 1)             # (B,d_in+2)
    right = torch.cat([W, bias + two_u * bias.abs(), size(W)], 1)                           # (d_sae,d_in+2)
    left, right, found = left.to(kind), right.to(kind).T, []
    for first in range(0, len(x), 512):         # small enough to be in the cache still when read
        product = left[first:first + 512] @ right                                             # (512,d_sae)
        # a number is above 0 if its bits, read as an integer, are; numpy looks much faster than torch
        bits = product.view(torch.int16 if kind == torch.bfloat16 else torch.int32).numpy()
        found.append(np.flatnonzero(bits > 0) + first * len(W))
    rows, cols = np.divmod(np.concatenate([*found, np.empty(0, np.int64)]), len(W))
    return torch.from_numpy(rows), torch.from_numpy(cols)


def starts(ascending, n):                                               # (nnz,) -> (n+1,)
    """Where in an ascending list of numbers below n the 0s, 1s, ... begin; the last is where the list
    ends."""
    return torch.searchsorted(ascending, torch.arange(n + 1))


def product_at(crow, cols, x, W):                               # (B,d), (d_sae,d) -> (nnz,)
    """The entries (row, cols) of x @ W^T, and no others."""
    where = torch.sparse_csr_tensor(crow, cols, x.new_zeros(len(cols)), (len(x), len(W)),
                                    check_invariants=False)
    return torch.sparse.sampled_addmm(where, x, W.T, beta=0).values()


def weighted_rows(start, index, weight, table):                 # (n+1,), (nnz,), (nnz,), (m,d) -> (n,d)
    """Row i is the sum of weight[j] * table[index[j]] over j from start[i] to start[i+1]."""
    return F.embedding_bag(index, table, start[:-1], per_sample_weights=weight, mode="sum")


def by_feature(cols, d_sae):                                            # (nnz,) -> order (nnz,)
    """The order that puts entries of one feature together, row by row."""
    short = cols.numpy().astype(np.uint16 if d_sae <= 2**16 else np.int64)      # 16 bits: sorted by radix
    return torch.from_numpy(np.argsort(short, kind="stable"))


# ---- what training does besides gradient steps ----


@torch.no_grad()
def project_decoder_gradient(sae, gradient):                            # (d_sae,d_in), in place
    """Remove from each row of W_dec's gradient the part along that row, which only changes its norm."""
    gradient.addcmul_(sae.W_dec, torch.einsum("id,id->i", gradient, sae.W_dec)[:, None], value=-1)


@torch.no_grad()
def normalise_decoder(sae):
    """Bring the rows of W_dec back to unit norm, in place: after the optimiser's step, so that what is saved
    has unit norm."""
    sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def resample(sae, optimizer, dead, z, generator):
    """Give each dead feature a new direction, taken from an input that is badly reconstructed (Bricken et al.
    2023), in place.

    dead: (d_sae,) bool; nothing is done if none or all are. z: (B,d_in) inputs to draw from, with replacement
    and with probability ~ (squared error)^2. W_dec's row is the input less b_dec, normalised; W_enc's column
    the same direction at 0.2 times the mean norm of live columns; b_enc is 0. In Adam (`optimizer.state[p]`,
    for p the parameter), "exp_avg" is 0 and "exp_avg_sq" the element-wise mean over live features. Adam
    divides the second moment by 1 - beta2^step, with the step of the whole run, so that one begun anew at 0
    would be far too small and the first update up to 1 / sqrt(1 - beta2) = 100 times the learning rate.
    generator: for the draw, on the CPU.
    """
    live = ~dead
    if not dead.any() or not live.any():
        return
    error = (sae(z) - z).square().sum(-1).cpu().double()
    drawn = torch.multinomial(error.square(), int(dead.sum()), replacement=True,
                              generator=generator).to(z.device)
    direction = F.normalize(z[drawn] - sae.b_dec, dim=-1)
    sae.W_dec[dead] = direction
    sae.W_enc[:, dead] = 0.2 * sae.W_enc[:, live].norm(dim=0).mean() * direction.T
    sae.b_enc[dead] = 0.0
    for parameter, feature_dim in ((sae.W_enc, 1), (sae.W_dec, 0), (sae.b_enc, 0)):
        state = optimizer.state[parameter]
        mean = state["exp_avg_sq"].index_select(feature_dim,
                                                live.nonzero()[:, 0]).mean(feature_dim, keepdim=True)
        index = (slice(None), dead) if feature_dim == 1 else dead
        state["exp_avg"][index] = 0.0
        state["exp_avg_sq"][index] = mean.expand_as(state["exp_avg_sq"][index])


# ---- where features are active ----


@torch.no_grad()
def active_entries(model, saes, tokens, say=lambda done: None):
    """Yields (layer, Entries) for blocks of rows, position 0 left out; `row` counts through all of tokens
    (R,T)."""
    first = 0
    for part in tokens.split(32):
        for layer, z in model.z_cat_at(part, list(saes)).items():
            row, q, feature, f = active(saes[layer], z[:, 1:])
            yield layer, Entries(row + first, q + 1, feature, f)
        first += len(part)
        say(first)


@torch.no_grad()
def active(sae, z):                                     # (B,T,d_in) -> Entries
    """encode(z) without its zeros."""
    T = z.shape[1]
    z = z.flatten(0, 1).to(sae.b_dec.dtype)
    if z.device.type == "cpu" and z.dtype == torch.float32:     # no (B*T,d_sae) tensor in float32
        place, feature, _, f = pre_activations(sae, z - sae.b_dec)
        over = f > sae.threshold[feature]
        place, feature, f = place[over], feature[over], f[over]
    else:
        encoded = sae.encode(z)
        place, feature = encoded.nonzero(as_tuple=True)
        f = encoded[place, feature]
    return Entries(place // T, place % T, feature, f)


# ---- edits: functions from z_cat to z_cat, for model(tokens, edit_z={layer: edit}) ----


def splice(sae):
    """The edit that puts the reconstruction in place of z_cat, except at position 0 (BOS), which SAEs do not
    see. A model in bfloat16 gets its own type back."""
    return lambda z: torch.cat([z[:, :1], sae(z[:, 1:].to(sae.b_dec.dtype)).to(z.dtype)], 1)


def ablate(sae, feature, where):                                        # int or (B,), (B,T) bool
    """The edit that takes f_i * W_dec[i] out of z_cat where `where` holds, and leaves all else, the SAE's
    error and z_cat's type included. With a feature for each row of the batch, each row loses its own."""
    def edit(z):                                                        # (B,T,d_in) -> (B,T,d_in)
        i = torch.as_tensor(feature, device=z.device).expand(len(z))
        x = z.to(sae.b_dec.dtype) - sae.b_dec
        pre = torch.einsum("btd,bd->bt", x, sae.W_enc.T[i]) + sae.b_enc[i, None]
        f = pre * (pre > sae.threshold[i, None])                        # (B,T)
        removed = (f[..., None] * sae.W_dec[i, None]).to(z.dtype)
        return torch.where(where[..., None], z - removed, z)
    return edit
