"""The SAE's step and its encoding at a fraction of their cost. A first reading skips this file.

A few in a thousand features are active on an input. One matrix product, the encoder's, is needed to
find which; everything else in `sae.dense_step` can be done on active entries alone. Here

    candidates        finds the entries (input, feature) that may be active, by a product in
                      bfloat16 with a margin for its rounding: some that are not come along; in a
                      TopK SAE those alone that may be among the k largest
    sparse_step       is `sae.dense_step` over the candidates, to float precision
    encode_sparse     is `SAE.encode` over the candidates, as a list without zeros
    active_entries    does that for rows of text, a block of rows at a time

The candidates of a batch are a list, row by row: entry j is feature cols[j] of input rows[j], and
the entries of input b begin at crow[b]. Values, decoder and gradients are float32.

`sparse_step` takes features to be active as `SAE.activate` says, by a formula of its own for lists.
If that, or the loss, is changed, train.py notices on the first batch, and takes the dense step.
`encode_sparse` calls `SAE.activate`, and holds for every activation that keeps to its rules.

Shapes: B batch, d_in, d_sae; nnz candidates.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

from data.machine import fast_bfloat16
from data.sae_files import MLP
from data.strongest import Entries
from sae import LossAndGradients, gradient_of_b_dec, keep_largest

ROWS_AT_ONCE = 512      # a block of the encoder's product is then still cached when it is read


# ---- one training step ----


@torch.no_grad()
def sparse_step(sae, z, l1, target=None):       # (B,d_in), _, (B,d_out) -> LossAndGradients
    """Loss and gradients as `sae.dense_step` has them, to float precision, on the CPU.

    Of the products with the batch only the encoder's is dense, and it is in low precision; the rest
    touches the candidates.
    """
    B = len(z)
    d_sae = sae.d_sae
    target = z if target is None else target
    x = sae.encoder_input(z)
    rows, cols, crow, pre = candidate_pre_activations(sae, x, sae.top_k)
    f = activate_list(sae, rows, cols, crow, pre)                       # (nnz,)
    active = f != 0
    e = weighted_sums(crow, cols, f, sae.W_dec) + sae.b_dec - target    # (B,d_out)
    g = 2 * e / B
    d_pre = (sampled_product(crow, cols, g, sae.W_dec) + l1 / B) * active   # (nnz,)

    # the same entries, feature by feature: those of feature i begin at ccol[i]
    order = by_feature(cols, d_sae)
    ccol = row_pointers(cols[order], d_sae)
    rows_by_feature, f_by_feature, d_pre_by_feature = rows[order], f[order], d_pre[order]
    d_b_enc = torch.zeros_like(sae.b_enc).index_add_(0, cols, d_pre)
    gradients = {"W_enc": weighted_sums(ccol, rows_by_feature, d_pre_by_feature, x).T.contiguous(),
                 "b_enc": d_b_enc,
                 "W_dec": weighted_sums(ccol, rows_by_feature, f_by_feature, g),
                 "b_dec": gradient_of_b_dec(sae, g, d_b_enc)}
    fired = torch.zeros(d_sae, dtype=torch.int64).index_add_(0, cols, active.long())

    # The decoder of features that are no candidates is never read, and an encoder or an input with
    # a NaN may have no candidates: each would go unnoticed. This is 0, or NaN if a number in them
    # is NaN or infinite. (b_dec is in e.)
    nan_if_bad = 0 * sum(values.sum() for values in (x, sae.W_enc, sae.b_enc, sae.W_dec))
    mse = e.square().sum() / B + nan_if_bad
    return LossAndGradients(mse, f.sum() / B, fired, gradients)


def candidate_pre_activations(sae, x, top_k):
    """The pre-activations of all candidates, in float32: (B,d_in) -> rows, cols (nnz,), crow
    (B+1,), pre (nnz,)."""
    W = sae.W_enc.T.contiguous()                            # a feature's weights side by side
    # pre > threshold if and only if x @ W_enc + (b_enc - threshold) > 0
    rows, cols = candidates(x, W, sae.b_enc - sae.threshold, top_k)
    crow = row_pointers(rows, len(x))
    pre = sampled_product(crow, cols, x, W) + sae.b_enc[cols]
    return rows, cols, crow, pre


def activate_list(sae, rows, cols, crow, pre):              # -> f (nnz,)
    """`SAE.activate` for a list in which every active entry stands."""
    f = pre * (pre > sae.threshold[cols])
    if sae.top_k == 0:
        return f
    # one row of a table for each input, with zeros at its end
    place = torch.arange(len(f)) - crow[rows]
    table = f.new_zeros(len(crow) - 1, int(crow.diff().max()))
    table[rows, place] = f
    return keep_largest(table, sae.top_k)[rows, place]


def candidates(x, W, bias, top_k=0):        # (B,d_in), (d_sae,d_in), (d_sae,) -> rows, cols (nnz,)
    """Every entry of x @ W^T + bias that may be above 0, found by a bfloat16 product. With top_k,
    those alone that may be among the k largest of their row.

    Where that product is not above 0, the exact value is not. bfloat16 keeps 8 bits, 7 of them
    stored: rounding a number moves it by at most u = 2^-8 of itself. With x' and w' for x and w
    rounded, and |.| for norms, the product is off by at most

        |x - x'| |w| + u |x'| |w|               from rounding x and w (Cauchy-Schwarz)
        (d + 2) 2^-24 (|x'| |w'| + |bias|)      from a float32 sum of d + 2 terms

    and rounding the sum does not change its sign. So much is added: margin * |w|, and a little more
    bias. Bias and margin ride along as two more dimensions of x and W. They are rounded with these,
    and the code has |x| and |w| for |x'| and |w'|: 1 + 6u makes up for both (4u would do), and 2u
    |bias| for the rounding of the bias. Processors that only emulate bfloat16 take the product in
    float32, where u is 2^-24.
    """
    d_sae, d_in = W.shape
    kind = torch.bfloat16 if fast_bfloat16(x.device) else torch.float32
    u = torch.finfo(kind).eps / 2
    of_sum = (d_in + 2) * 2.0**-24
    bias = bias[:, None]                                                    # (d_sae,1)
    raised_bias = bias + (2 * u + of_sum) * bias.abs()
    rounding = (x - x.to(kind)).norm(dim=1, keepdim=True)                   # (B,1) |x - x'|
    size = x.norm(dim=1, keepdim=True)
    margin = rounding + (u + of_sum) * size                                 # times |w|
    W_norm = W.norm(dim=1, keepdim=True)
    left = torch.cat([x, torch.ones_like(margin), (1 + 6 * u) * margin], 1).to(kind)
    right = torch.cat([W, raised_bias, W_norm], 1).to(kind)
    # what was added to an entry is at most two of its margins, and a little for their rounding
    added = 3 * (margin * W_norm.max() + (2 * u + of_sum) * bias.abs().max())   # (B,1)

    found = []
    for first in range(0, len(x), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        product = left[here] @ right.T                                      # (512,d_sae)
        if top_k:
            product -= below_kth_largest(product, added[here], top_k, u)
        # numpy searches faster than torch but has no bfloat16. The bits of a number, read as an
        # integer, are above 0 where the number is.
        bits = product.view(torch.int16 if kind == torch.bfloat16 else torch.int32).numpy()
        found.append(np.flatnonzero(bits > 0) + first * d_sae)
    flat = np.concatenate([*found, np.empty(0, np.int64)])      # also for no rows
    rows, cols = np.divmod(flat, d_sae)
    return torch.from_numpy(rows), torch.from_numpy(cols)


def below_kth_largest(product, added, k, u):                # (n,d_sae), (n,1) -> (n,1)
    """A number that the k largest exact values of each row are above, or 0.

    The columns are dealt out to groups. Of the groups' largest entries k are not below the kth
    largest of these, so that the kth largest of all is not below it either; and an exact value is
    at most `added` below its entry.
    """
    d_sae = product.shape[1]
    in_group = max(1, d_sae // (8 * k))                     # 8k groups come close to the kth of all
    n_groups = d_sae // in_group
    largest = product[:, :n_groups * in_group].unflatten(1, (in_group, n_groups)).amax(1)
    kth = largest.float().topk(min(k, n_groups), dim=1).values[:, -1:]
    # 8u of it: for the rounding of the product, and of the number itself
    return (kth - 8 * u * kth.abs() - added).clamp_min(0).to(product.dtype)


def row_pointers(rows, n):                                  # (nnz,) ascending -> (n+1,)
    """Where the entries of row 0, 1, ... begin; the last is where the list ends."""
    return torch.searchsorted(rows, torch.arange(n + 1))


def sampled_product(crow, cols, x, W):      # (B+1,), (nnz,), (B,d), (m,d) -> (nnz,)
    """The entries (row, cols) of x @ W^T, and no others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        where = torch.sparse_csr_tensor(crow, cols, x.new_zeros(len(cols)), (len(x), len(W)),
                                        check_invariants=False)     # its values are not read
    return torch.sparse.sampled_addmm(where, x, W.T, beta=0).values()


def weighted_sums(start, index, weight, table):             # (n+1,), (nnz,), (nnz,), (m,d) -> (n,d)
    """A sparse matrix times a table: row i is the sum of weight[j] * table[index[j]] over j from
    start[i] to start[i+1]."""
    return F.embedding_bag(index, table, start[:-1], per_sample_weights=weight, mode="sum")


def by_feature(cols, d_sae):                                # (nnz,) -> order (nnz,)
    """The order that puts the entries of one feature together, row by row."""
    kind = np.uint16 if d_sae <= 2**16 else np.int64        # 16 bits are sorted faster, by radix
    return torch.from_numpy(np.argsort(cols.numpy().astype(kind), kind="stable"))


def knows_activation(sae):
    """Whether `SAE.activate` is what `activate_list` takes it to be, tried on random
    pre-activations of which half are above their thresholds."""
    n, d_sae = 16, sae.d_sae
    generator = torch.Generator().manual_seed(0)
    pre = sae.threshold + torch.randn(n, d_sae, generator=generator)
    rows = torch.arange(n).repeat_interleave(d_sae)
    cols = torch.arange(d_sae).repeat(n)
    f = activate_list(sae, rows, cols, row_pointers(rows, n), pre.flatten()).view_as(pre)
    return torch.equal(sae.activate(pre), f)


# ---- where features are active ----


@torch.no_grad()
def encode_sparse(sae, z):                                  # (B,T,d_in) -> Entries
    """encode(z) without its zeros. On the CPU, in float32, only candidates are computed to full
    precision."""
    T = z.shape[1]
    z = z.flatten(0, 1).to(sae.b_dec.dtype)         # (B*T,d_in): place = row * T + position
    if z.device.type == "cpu" and z.dtype == torch.float32:
        place, feature, f = activate_candidates(sae, z)
    else:
        encoded = sae.encode(z)
        place, feature = encoded.nonzero(as_tuple=True)
        f = encoded[place, feature]
    return Entries(row=place // T, q=place % T, feature=feature, f=f)


def activate_candidates(sae, z):                            # (n,d_in) -> place, feature, f (nnz,)
    """Pre-activations of the candidates, put through `SAE.activate`: in whole rows, since an
    activation such as TopK compares the features of a row."""
    top_k = sae.top_k if knows_activation(sae) else 0
    place, feature, crow, pre = candidate_pre_activations(sae, sae.encoder_input(z), top_k)
    # What is no candidate is at or below its threshold, where by the rules of `SAE.activate` one
    # value is as good as another: 0, or the threshold itself if that is negative.
    filling = sae.threshold.clamp_max(0)
    f = []
    for first in range(0, len(z), ROWS_AT_ONCE):
        n_rows = min(ROWS_AT_ONCE, len(z) - first)
        here = slice(crow[first], crow[first + n_rows])
        row, column = place[here] - first, feature[here]
        dense = filling.repeat(n_rows, 1)                               # (512,d_sae)
        dense[row, column] = pre[here]
        f.append(sae.activate(dense)[row, column])
    f = torch.cat(f)
    active = f != 0
    return place[active], feature[active], f[active]


def inputs_of(model, saes, tokens):                         # (b,T) -> {layer: (b,T,d_in)}
    """What the SAEs of some layers read, or what transcoders read. All are of one kind."""
    if any(sae.reads == MLP for sae in saes.values()):
        return {layer: after.mlp_in for layer, after in model.mlp_at(tokens, list(saes)).items()}
    return model.z_cat_at(tokens, list(saes))


@torch.no_grad()
def active_entries(model, saes, tokens, progress=lambda rows_done: None):
    """Yields (layer, Entries) for blocks of rows of `tokens` (R,T), position 0 (BOS) left out.

    `row` counts through all of tokens.
    """
    first = 0
    for part in tokens.split(32):
        for layer, z in inputs_of(model, saes, part).items():
            entries = encode_sparse(saes[layer], z[:, 1:])
            # counted through all of tokens, and from BOS, which was cut off
            yield layer, entries._replace(row=entries.row + first, q=entries.q + 1)
        first += len(part)
        progress(first)
