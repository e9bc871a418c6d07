"""Direct attribution: which heads and source tokens an SAE feature reads from, and what heads and
features do to the logits (the paper, section 2).

Every sum is exact, with the attention pattern and the norms' scales taken as they are, but for
`token_effects`, which leaves scales out. (A scale is what a norm divides by: the root mean square
of its input, or the standard deviation.)

Shapes: B batch, T positions (q query, k key/source), H heads, d_head, D = H*d_head, d_sae.
"""

import torch

from data.sae_files import MLP

# ---- one layer: heads and sources ----
#
# With w = W_enc[:,i], and w^h its slice at head h, the pre-activation of feature i at query q is
#
#     pre_i(q) = sum_{h,k} pattern[h,q,k] * (v[h,k] . w^h)  +  b_enc[i] - b_dec . w
#
# The terms of the sum are direct feature attribution (DFA). All values of a head share a constant,
# `model.value_bias`. A head's pattern sums to 1, so it moves this constant wherever it looks, and
# the constant says nothing about sources. To compare sources, callers first subtract it
# (`values_minus_bias`), and count it with the feature's bias (`constant_part`).


def head_weights(W_dec, n_heads):                           # (...,D) -> (...,H)
    """Weight-based head attribution: the norm of a decoder row's slice at each head, over the sum
    of these norms. A row of zeros stays 0."""
    norms = W_dec.unflatten(-1, (n_heads, -1)).norm(dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)


def dfa(pattern, v, w_enc):                     # (B,H,q,k), (B,k,H,d_head), (D,) -> (B,H,q,k)
    """Direct feature attribution: the part of z_cat[q] . w_enc that head h moved from position
    k."""
    w = w_enc.unflatten(0, (v.shape[2], -1))                            # (H,d_head)
    return pattern * torch.einsum("bkhd,hd->bhk", v, w)[:, :, None]     # d_head is summed first


def feature_bias(sae):                                      # -> (d_sae,)
    """b_enc - b_dec @ W_enc: add it to the sum of DFA over heads and sources, of the raw values,
    and you get the pre-activation. (A transcoder does not subtract b_dec from what it reads.)"""
    if not sae.subtracts_b_dec:
        return sae.b_enc
    return sae.b_enc - sae.b_dec @ sae.W_enc


@torch.no_grad()
def values_minus_bias(model, layer, v):                     # (B,k,H,d_head) -> the same
    """Values minus value_bias, the part that all sources share."""
    return v - model.value_bias(layer).unflatten(0, v.shape[2:])


@torch.no_grad()
def constant_part(model, layer, sae):                       # -> (d_sae,)
    """Add this to the sum of DFA of `values_minus_bias`, and you get the pre-activation: the
    feature's bias, and what the values' common part gives wherever a head looks."""
    return feature_bias(sae) + model.value_bias(layer) @ sae.W_enc


def dfa_at_positions(pattern, v, w_enc, q):     # (H,q,k), (k,H,d_head), (m,D), (m,) -> (m,H,k)
    """DFA of m features (rows of W_enc^T), each at its own query, in one prompt."""
    w = w_enc.unflatten(1, (v.shape[1], -1))                            # (m,H,d_head)
    return pattern[:, q].transpose(0, 1) * torch.einsum("khd,mhd->mhk", v, w)


# ---- what heads and features do to the logits ----
#
# With
#
#     scaled_direction = model.logit_directions(token) / model.final_scale(final residual stream)
#
# the dot product of scaled_direction and what is written to the stream is what this adds to the
# token's logit (before a soft cap), less the mean over all tokens, the final norm's scale frozen:
# direct logit attribution.


def head_logits(z_cat, matrices, scaled_direction):         # (...,D), _, (...,d_model) -> (...,H)
    """What each head of a layer, having gathered z_cat, writes along a direction.

    scaled_direction: as above, divided by scales["attn_out"] too where the layer has one.
    """
    z = z_cat.unflatten(-1, matrices.b_V.shape)             # (...,H,d_head), as b_V is (H,d_head)
    return torch.einsum("...hd,hdm,...m->...h", z, matrices.W_O, scaled_direction)


@torch.no_grad()
def direct_logits(model, matrices, caches, position, direction, look=None):
    """Direct logit attribution of every head at one position of each row -> (B,layers,H).

    matrices: every layer's HeadMatrices. caches: every layer's (layer, LayerCache), of
    model.layer_caches or model.rerun_caches. position (B,): its place in the caches; in a rerun
    that is not the position in the text. direction (B,d_model): of model.logit_directions, or a
    difference of two; the final norm's scale is put in here. look: called with each layer's
    LayerCache, for what else a caller wants of this pass, such as attention.
    """
    row = torch.arange(len(position), device=position.device)
    gathered = []                                           # of every layer
    for layer, kept in caches:
        if look is not None:
            look(kept)
        scale = kept.scales["attn_out"][row, position] if "attn_out" in kept.scales else 1.0
        gathered.append((matrices[layer], kept.z_cat[row, position], scale))
    final = kept.resid_post[row, position]                  # after the last layer
    scaled_direction = direction / model.final_scale(final)
    by_layer = [head_logits(z, of_layer, scaled_direction / scale)
                for of_layer, z, scale in gathered]
    return torch.stack(by_layer, 1)


@torch.no_grad()
def token_effects(model, layer, sae, features, directions=None):    # int or (m,) -> (...,n_tokens)
    """W_dec[i] @ W_O @ unembedding: what a feature adds to every token's logit per unit of
    activation, less the mean over all tokens, with the scales of the final norm and of Gemma's
    post-norm taken as 1. (A transcoder writes to the stream itself: there it is without W_O.)

    directions: `token_directions` of the model, if it is at hand.
    """
    if directions is None:
        directions = token_directions(model)
    written = sae.W_dec[features]
    if sae.reads != MLP:
        written = written @ model.head_matrices(layer).W_O.flatten(0, 1)    # (D,d_model)
    return written @ directions.T


def token_directions(model):                                # -> (n_tokens,d_model)
    """model.logit_directions of all tokens. With a large vocabulary that is as large as the
    model."""
    device = next(model.parameters()).device
    return model.logit_directions(torch.arange(model.n_tokens, device=device))
