"""The sparse autoencoder (SAE) of the paper, section 2, with its gradient worked out by hand.

    pre   = (z - b_dec) @ W_enc + b_enc
    f     = pre where pre > threshold, else 0       threshold 0 is ReLU, the paper's
    z_hat = f @ W_dec + b_dec                       rows of W_dec have unit norm

    loss  = sum_d (z_hat - z)^2 + l1 * sum_i f_i    the mean over the batch of both

An SAE reads z_cat of one attention layer: the outputs z of its H heads side by side, before W_O, so
that d_in = D = H*d_head. In this file: the SAE; its loss and gradient; what keeps the decoder at
unit norm and revives dead features; edits of z_cat that use an SAE; loading.

Shapes: B batch (or any leading dimensions), d_in, d_sae.
"""

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.errors import UserError
from data.files import atomic
from data.sae_files import FOLDED_Z_CAT, Z_CAT, read_sae, sae_paths
from data.weights import digest


class SAE(nn.Module):
    """f = encode(z), z_hat = decode(f).

    Parameters: W_enc (d_in,d_sae), b_enc (d_sae,), W_dec (d_sae,d_in), b_dec (d_in,), and the
    constant threshold (d_sae,). `about` says what it is of (data/sae_files.py), and `reads`, which
    is in it, the input it takes: "z_cat". The paper's SAEs were trained on a z_cat without value
    biases and take "z_cat less value_bias", until `load_saes` converts them.
    """

    def __init__(self, d_in, d_sae, generator=None):
        super().__init__()
        W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
        # a copy, also of one row (which `contiguous` gives back): a view would tie the two
        W_enc = W_dec.T.clone(memory_format=torch.contiguous_format)
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))
        self.about = {"reads": Z_CAT}

    @property
    def reads(self):
        return self.about["reads"]

    @property
    def d_in(self):
        return self.W_dec.shape[1]

    @property
    def d_sae(self):
        return self.W_dec.shape[0]

    def pre_activations(self, z):               # (...,d_in) -> (...,d_sae)
        return (z - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre):                    # (...,d_sae) -> (...,d_sae)
        """Feature activations from pre-activations: ReLU, or JumpReLU where threshold > 0.

        To try another activation function, such as TopK, change this function and nothing else, by
        these rules. Each entry of the result is the entry of `pre`, or 0: the gradient below passes
        where the result is not 0. An entry at or below its threshold must give 0 and must not
        affect the others: sparse.py does not compute such entries, and puts some other value at or
        below the threshold in their place. So TopK chooses among those above the threshold. Each
        row (one z) is treated alone, since rows come in blocks of any size.
        """
        return pre * (pre > self.threshold)

    def encode(self, z):                        # (...,d_in) -> f (...,d_sae)
        """Feature activations."""
        return self.activate(self.pre_activations(z))

    def decode(self, f):                        # (...,d_sae) -> z_hat (...,d_in)
        """The reconstruction."""
        return f @ self.W_dec + self.b_dec

    def forward(self, z):                       # (...,d_in) -> z_hat (...,d_in)
        return self.decode(self.encode(z))

    @torch.no_grad()
    def shift(self, c):
        """Convert an SAE trained on z - c to take z. In place; returns self. `about` is left to the
        caller."""
        self.b_dec += c
        return self

    @torch.no_grad()
    def rescale(self, s):
        """Convert an SAE trained on z / s to take z; features become s times as large. In place;
        returns self."""
        self.b_enc *= s
        self.b_dec *= s
        self.threshold *= s
        return self

    def save(self, path, dtype=torch.float32):
        """Write the five tensors to `path` (a .safetensors file), and `about` into its header; the
        same SAE gives the same bytes."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"about": json.dumps(self.about)})

    @classmethod
    def load(cls, path, device="cpu"):
        """Read what `save` wrote, or an SAE that others published (formats: data/sae_files.py).

        Raises UserError if a file is missing or damaged, or if a tensor is missing, has another
        shape or is not finite.
        """
        tensors, about = read_sae(path)
        with torch.device("meta"):              # no memory yet: the tensors take their places
            sae = cls(*tensors["W_enc"].shape)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        sae.load_state_dict(tensors, assign=True)
        sae.about = about
        return sae.requires_grad_(False)


# ---- the loss and its gradient ----
#
# With x = z - b_dec, e = z_hat - z, and the loss a mean over the batch (its 1/B is in dL/dz_hat and
# dL/df, and the sums over b below are plain):
#     dL/dz_hat = 2 e / B                      =: g
#     dL/df     = g @ W_dec^T + l1 / B
#     dL/dpre   = dL/df where the feature is active, else 0
#     dL/dW_dec = f^T @ g                      dL/dW_enc = x^T @ dL/dpre
#     dL/db_enc = sum_b dL/dpre                dL/db_dec = sum_b g  -  W_enc @ (sum_b dL/dpre)
# b_dec enters twice: it is added to z_hat, and subtracted from z in x.


class LossAndGradients(NamedTuple):
    """One batch's loss, mse + l1 * sparsity, and its gradients."""
    mse: Tensor             # sum over d_in, mean over B
    sparsity: Tensor        # sum_i f_i, mean over B
    fired: Tensor           # (d_sae,) int64, on how many inputs each feature is active
    gradients: dict         # {"W_enc": (d_in,d_sae), "b_enc": ..., "W_dec": ..., "b_dec": ...}


@torch.no_grad()
def dense_step(sae, z, l1):                     # (B,d_in) -> LossAndGradients
    """Loss and gradient by five matrix products of B * d_in * d_sae multiplications each.

    (On the CPU, sparse.py computes the same to float precision at a fraction of the cost.)
    """
    B = len(z)
    f = sae.encode(z)
    active = f != 0
    e = sae.decode(f) - z

    g = 2 * e / B
    d_pre = (g @ sae.W_dec.T + l1 / B) * active
    d_b_enc = d_pre.sum(0)
    gradients = {"W_enc": (z - sae.b_dec).T @ d_pre,
                 "b_enc": d_b_enc,
                 "W_dec": f.T @ g,
                 "b_dec": g.sum(0) - sae.W_enc @ d_b_enc}
    return LossAndGradients(e.square().sum() / B, f.sum() / B, active.sum(0), gradients)


# ---- what training does besides gradient steps ----


@torch.no_grad()
def project_decoder_gradient(sae, gradient):                # (d_sae,d_in), in place
    """From each gradient row g remove its component along the matching unit row w: g - (g.w) w.

    To first order that component only changes the row's norm, which `normalise_decoder` undoes.
    Left in, it would enter Adam's second moment and shrink the rest of the step.
    """
    along = torch.einsum("id,id->i", gradient, sae.W_dec)
    gradient.addcmul_(sae.W_dec, along[:, None], value=-1)


@torch.no_grad()
def normalise_decoder(sae):
    """Bring the rows of W_dec back to unit norm, in place. It comes after the optimiser's step, so
    that what is saved has unit norm."""
    sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def resample(sae, optimizer, dead, z, generator):
    """Give each dead feature a new direction, taken from an input that is badly reconstructed
    (Bricken et al. 2023), in place.

    dead: (d_sae,) bool; nothing is done if none or all are. z: (B,d_in), inputs to draw from, with
    replacement and with probability ~ (squared error)^2. The new row of W_dec is the input less
    b_dec, normalised; the column of W_enc is the same direction at 0.2 times the mean norm of live
    columns; b_enc is 0. generator: for the draw, on the CPU.
    """
    live = ~dead
    if not dead.any() or not live.any():
        return
    error = (sae(z) - z).square().sum(-1).cpu().double()                # (B,)
    drawn = torch.multinomial(error.square(), int(dead.sum()), replacement=True,
                              generator=generator)
    direction = F.normalize(z[drawn.to(z.device)] - sae.b_dec, dim=-1)  # (n_dead,d_in)
    sae.W_dec[dead] = direction
    sae.W_enc[:, dead] = 0.2 * sae.W_enc[:, live].norm(dim=0).mean() * direction.T
    sae.b_enc[dead] = 0.0
    reset_adam(optimizer.state[sae.W_dec], dead, feature_dim=0)
    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)
    reset_adam(optimizer.state[sae.b_enc], dead, feature_dim=0)


def reset_adam(state, dead, feature_dim):
    """Adam's moments of new features: the first is 0, the second the element-wise mean over live
    features.

    Why the second is not 0 too: Adam divides it by 1 - beta2^step, to make up for its start at 0.
    Late in a run that is nearly 1, so a moment that starts at 0 again would be far too small, and
    the first update too large: sqrt((1 - beta2^step) / (1 - beta2)) times the learning rate. With
    train.py's beta1 = 0 and beta2 = 0.9999 these are 16 times at step 250, and up to 100 times.
    """
    live = (~dead).nonzero()[:, 0]
    index = (slice(None), dead) if feature_dim == 1 else dead
    mean = state["exp_avg_sq"].index_select(feature_dim, live).mean(feature_dim, keepdim=True)
    state["exp_avg"][index] = 0.0
    state["exp_avg_sq"][index] = mean.expand_as(state["exp_avg_sq"][index])


# ---- edits: functions from z_cat to z_cat, for model(tokens, edit_z={layer: edit}) ----


def splice(sae):
    """The edit that puts the reconstruction in place of z_cat, except at position 0 (BOS), which
    SAEs do not see. A model in bfloat16 gets its own type back."""
    def edit(z):                                            # (B,T,d_in) -> (B,T,d_in)
        z_hat = sae(z[:, 1:].to(sae.b_dec.dtype)).to(z.dtype)
        return torch.cat([z[:, :1], z_hat], 1)
    return edit


def ablate(sae, feature, where):
    """The edit that takes f_i * W_dec[i] out of z_cat where `where` holds. All else stays, the
    SAE's error and z_cat's type included.

    feature: a number, or one for each row of the batch (B,). where: (B,T) bool.
    """
    def edit(z):                                            # (B,T,d_in) -> (B,T,d_in)
        row, _ = where.nonzero(as_tuple=True)               # (n,) of each position to edit
        feature_of_row = torch.as_tensor(feature, device=z.device).expand(len(z))   # (B,)
        i = feature_of_row[row]                             # (n,) the feature that goes there
        f = sae.encode(z[where].to(sae.b_dec.dtype))        # (n,d_sae)
        f_i = f.gather(1, i[:, None])                       # (n,1)
        edited = z.clone()
        edited[where] -= (f_i * sae.W_dec[i]).to(z.dtype)
        return edited
    return edit


# ---- the SAEs of a model ----


def load_saes(where, model, layers=None, device="cpu"):
    """The SAEs of several layers of a model -> {layer: SAE}.

    where: a folder with L<layer>/ in it, as train.py writes (out/tiny); or a published set:
    "kissane" (the paper's, GPT-2 Small) or "gemma-scope" (Gemma 2 2B, width 16k, L0 about 100).
    layers: all that are there if not given. Raises UserError if one is missing, or is of another
    architecture, layer or width; prints a line if they are of other weights, or do not say of
    which.

    The paper trained on a model whose value biases had been folded into b_O, so that its z_cat
    lacks model.value_bias. Such SAEs are shifted to take z_cat itself.
    """
    model.check_layers(layers or ())
    D = model.config.d_z_cat
    architecture, weights = model.architecture(), digest(model)
    saes = {}
    for layer, path in sae_paths(where, layers, model.config.n_layers).items():
        sae = SAE.load(path, device)
        if sae.reads not in (Z_CAT, FOLDED_Z_CAT):
            raise UserError(f"--saes {where}: the SAE of layer {layer} reads {sae.reads}, and "
                            f"{Z_CAT} is what this program has for it.")
        if sae.about.get("layer", layer) != layer:
            raise UserError(f"--saes {where}: the SAE in the place of layer {layer} is of layer "
                            f"{sae.about['layer']}; put it where it belongs.")
        if sae.about.get("architecture", architecture) != architecture:
            raise UserError(f"--saes {where}: the SAE of layer {layer} is of another model, a "
                            f"{sae.about['architecture']}; this one is a {architecture}.")
        if sae.d_in != D:
            raise UserError(f"--saes {where}: the SAE of layer {layer} reads {sae.d_in} numbers "
                            f"and this model's z_cat has {D}; they do not belong together.")
        if sae.reads == FOLDED_Z_CAT:
            sae.shift(model.value_bias(layer).to(device))
            sae.about["reads"] = Z_CAT
        saes[layer] = sae
    print_doubts(saes, weights, where)
    return saes


def print_doubts(saes, weights, where):
    """Print a line on SAEs of other weights than these, and one on those that do not say of which
    they are. (The same model in another number type may have other weights.)"""
    other = [layer for layer, sae in saes.items() if sae.about.get("weights", weights) != weights]
    silent = [layer for layer, sae in saes.items() if "weights" not in sae.about]
    if other:
        print(f"note: SAEs of layers {', '.join(map(str, other))} in {where} were trained on other "
              f"weights, those of {saes[other[0]].about.get('model')}")
    if silent:
        print(f"note: SAEs of layers {', '.join(map(str, silent))} in {where} do not say which "
              f"weights they were trained on")


def check_feature(saes, layer, feature):
    """Raise UserError where there is no such SAE or feature."""
    if layer not in saes:
        raise UserError(f"layer {layer} has no SAE; there are SAEs for layers "
                        f"{', '.join(map(str, saes))}.")
    last = saes[layer].d_sae - 1
    if not 0 <= feature <= last:
        raise UserError(f"feature {feature} is out of range: this SAE has features 0 to {last}.")
