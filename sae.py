"""The sparse autoencoder (SAE) of the paper, section 2, with its gradient worked out by hand.

    pre   = (z - b_dec) @ W_enc + b_enc
    f     = pre where pre > threshold, else 0       threshold 0 is ReLU, the paper's; in a TopK SAE
                                                    the k largest of these alone
    z_hat = f @ W_dec + b_dec                       rows of W_dec have unit norm

    loss  = sum_d (z_hat - z)^2 + l1 * sum_i f_i    the mean over the batch of both

An SAE reads z_cat of one attention layer: the outputs z of its H heads side by side, before W_O, so
that d_in = D = H*d_head. A transcoder (Dunefsky et al. 2024) is the same for an MLP: from what it
reads, x, it makes what it writes, y. The two differ in two places, the input and the target:

    pre   = x @ W_enc + b_enc
    y_hat = f @ W_dec + b_dec
    loss  = sum_d (y_hat - y)^2 + l1 * sum_i f_i

In this file: the SAE and the transcoder; their loss and gradient; what keeps the decoder at unit
norm and revives dead features; edits that use them; loading.

Shapes: B batch (or any leading dimensions), d_in, d_sae; d_out, which for an SAE is d_in.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from data.errors import UserError
from data.files import atomic
from data.sae_files import FOLDED_Z_CAT, MLP, Z_CAT, read_sae, sae_paths
from data.weights import digest


class SAE(nn.Module):
    """f = encode(z), z_hat = decode(f).

    Parameters: W_enc (d_in,d_sae), b_enc (d_sae,), W_dec (d_sae,d_in), b_dec (d_in,), and the
    constant threshold (d_sae,). `about` says what it is of (data/sae_files.py). Two entries of it
    matter here: `reads`, the input it takes, "z_cat"; and in a TopK SAE (Gao et al. 2024) `top_k`,
    the features that an input has at most. The paper's SAEs were trained on a z_cat without value
    biases and take "z_cat less value_bias", until `load_saes` converts them.
    """

    subtracts_b_dec = True      # from what the encoder reads

    def __init__(self, d_in, d_sae, generator=None, top_k=0):
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
        if top_k:
            self.about["top_k"] = top_k

    @property
    def reads(self):
        return self.about["reads"]

    @property
    def top_k(self):
        return self.about.get("top_k", 0)

    @property
    def d_in(self):
        return self.W_enc.shape[0]

    @property
    def d_sae(self):
        return self.W_dec.shape[0]

    @property
    def d_out(self):
        return self.W_dec.shape[1]

    def encoder_input(self, z):                 # (...,d_in) -> (...,d_in)
        """What W_enc is multiplied with: z - b_dec; in a transcoder z itself."""
        return z - self.b_dec if self.subtracts_b_dec else z

    def pre_activations(self, z):               # (...,d_in) -> (...,d_sae)
        return self.encoder_input(z) @ self.W_enc + self.b_enc

    def activate(self, pre):                    # (...,d_sae) -> (...,d_sae)
        """Feature activations from pre-activations: ReLU, or JumpReLU where threshold > 0; in a
        TopK SAE the largest of these alone.

        To try another activation function, change this function and nothing else, by these rules.
        Each entry of the result is the entry of `pre`, or 0: the gradient below passes where the
        result is not 0. An entry at or below its threshold must give 0 and must not affect the
        others: sparse.py does not compute such entries, and puts some other value at or below the
        threshold in their place. Each row (one z) is treated alone, since rows come in blocks of
        any size. A NaN stays one, so that training stops at it.
        """
        f = pre * (pre > self.threshold)
        return keep_largest(f, self.top_k) if self.top_k else f

    def encode(self, z):                        # (...,d_in) -> f (...,d_sae)
        """Feature activations."""
        return self.activate(self.pre_activations(z))

    def decode(self, f):                        # (...,d_sae) -> z_hat (...,d_out)
        """The reconstruction."""
        return f @ self.W_dec + self.b_dec

    def forward(self, z):                       # (...,d_in) -> z_hat (...,d_out)
        return self.decode(self.encode(z))

    @torch.no_grad()
    def shift(self, c):
        """Convert an SAE trained on z - c to take z. In place; returns self. `about` is left to the
        caller."""
        self.b_dec += c
        return self

    @torch.no_grad()
    def rescale(self, s, s_out=None):
        """Convert an SAE trained on z / s to take z; features become s times as large. In place;
        returns self.

        A transcoder trained from x / s to y / s_out is made one from x to y; features become s_out
        times as large.
        """
        if s_out is not None:
            self.W_enc *= s_out / s
            s = s_out
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
        d_in, d_sae = tensors["W_enc"].shape
        with torch.device("meta"):              # no memory yet: the tensors take their places
            if about["reads"] == MLP:
                sae = Transcoder(d_in, d_sae, tensors["W_dec"].shape[1])
            else:
                sae = cls(d_in, d_sae)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        sae.load_state_dict(tensors, assign=True)
        sae.about = about
        return sae.requires_grad_(False)


class Transcoder(SAE):
    """The same from what an MLP reads to what it writes: f = encode(x), y_hat = decode(f).

    x is the MLP's input, after the norm before it; y is what the MLP adds to the stream.
    Parameters: W_enc (d_in,d_sae), b_enc (d_sae,), W_dec (d_sae,d_out), b_dec (d_out,), threshold
    (d_sae,). b_dec is a vector of y's space, and has no place in the encoder.
    """

    subtracts_b_dec = False

    def __init__(self, d_in, d_sae, d_out, generator=None, top_k=0):
        super().__init__(d_in, d_sae, generator, top_k)     # of which W_enc and b_enc stay
        W_dec = F.normalize(torch.randn(d_sae, d_out, generator=generator), dim=-1)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.about["reads"] = MLP


def keep_largest(f, k):                         # (...,n) -> the same
    """The k largest entries of each row, all if it has fewer, and 0 in place of the others."""
    largest, index = f.topk(min(k, f.shape[-1]), dim=-1)
    return torch.zeros_like(f).scatter(-1, index, largest)


# ---- the loss and its gradient ----
#
# Let x be what W_enc is multiplied with, t the target, and t_hat = f @ W_dec + b_dec. An SAE has
# x = z - b_dec and t = z; a transcoder has the MLP's input and output. With e = t_hat - t, with
# g = dL/dt_hat, and the loss a mean over the batch (its 1/B is in g and dL/df, and the sums over b
# below are plain):
#     dL/dt_hat = 2 e / B
#     dL/df     = g @ W_dec^T + l1 / B
#     dL/dpre   = dL/df where the feature is active, else 0
#     dL/dW_dec = f^T @ g                      dL/dW_enc = x^T @ dL/dpre
#     dL/db_enc = sum_b dL/dpre                dL/db_dec = sum_b g  -  W_enc @ (sum_b dL/dpre)
# In an SAE b_dec enters twice: it is added to t_hat, and subtracted from z in x. In a transcoder it
# is only added, and dL/db_dec is sum_b g.


class LossAndGradients(NamedTuple):
    """One batch's loss, mse + l1 * sparsity, and its gradients."""
    mse: Tensor             # the squared error: sum over d_out, mean over B
    sparsity: Tensor        # sum_i f_i, mean over B
    fired: Tensor           # (d_sae,) int64, on how many inputs each feature is active
    gradients: dict         # {"W_enc": (d_in,d_sae), "b_enc": ..., "W_dec": ..., "b_dec": ...}


@torch.no_grad()
def dense_step(sae, z, l1, target=None):        # (B,d_in), _, (B,d_out) -> LossAndGradients
    """Loss and gradient by five matrix products of B * d_in * d_sae multiplications each. (It
    changes nothing: the step itself is Adam's, in train.py.)

    target: what a transcoder is to make of z; an SAE's is z itself. (On the CPU, sparse.py computes
    the same to float precision at a fraction of the cost.)
    """
    B = len(z)
    target = z if target is None else target
    x = sae.encoder_input(z)
    f = sae.encode(z)
    active = f != 0
    e = sae.decode(f) - target

    g = 2 * e / B
    d_pre = (g @ sae.W_dec.T + l1 / B) * active
    d_b_enc = d_pre.sum(0)
    gradients = {"W_enc": x.T @ d_pre,
                 "b_enc": d_b_enc,
                 "W_dec": f.T @ g,
                 "b_dec": gradient_of_b_dec(sae, g, d_b_enc)}
    return LossAndGradients(e.square().sum() / B, f.sum() / B, active.sum(0), gradients)


def gradient_of_b_dec(sae, g, d_b_enc):         # (B,d_out), (d_sae,) -> (d_out,)
    """dL/db_dec, from g = dL/dt_hat and d_b_enc = dL/db_enc: sum_b g, and in an SAE also what comes
    through the encoder's input."""
    d_b_dec = g.sum(0)
    if sae.subtracts_b_dec:
        d_b_dec = d_b_dec - sae.W_enc @ d_b_enc
    return d_b_dec


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
def resample(sae, optimizer, dead, z, generator, target=None, mean_in=None):
    """Give each dead feature a new direction, taken from an input that is badly reconstructed
    (Bricken et al. 2023), in place.

    dead: (d_sae,) bool; nothing is done if none or all are. z: (B,d_in), inputs to draw from, and
    target (B,d_out), what a transcoder is to make of them. generator: for the draw, on the CPU.

    The new row of W_dec is the target less b_dec, normalised. The column of W_enc is the input less
    a centre, normalised, times 0.2 times the mean norm of live columns. The centre is b_dec in an
    SAE, whatever mean_in is, and mean_in (d_in,) in a transcoder. b_enc is such that an input at
    the centre gives the pre-activation 0: 0 in an SAE, which subtracts the centre itself. What Adam
    knows of these features is reset in all three.
    """
    live = ~dead
    if not dead.any() or not live.any():
        return
    target = z if target is None else target
    drawn = draw_badly_reconstructed(sae, z, target, int(dead.sum()), generator)
    centre = sae.b_dec if sae.subtracts_b_dec else mean_in
    columns = F.normalize(z[drawn] - centre, dim=-1).T                  # (d_in,n_dead)
    columns = 0.2 * sae.W_enc[:, live].norm(dim=0).mean() * columns
    sae.W_dec[dead] = F.normalize(target[drawn] - sae.b_dec, dim=-1)
    sae.W_enc[:, dead] = columns
    sae.b_enc[dead] = 0.0
    if not sae.subtracts_b_dec:                             # then the centre is still in the input
        sae.b_enc[dead] -= centre @ columns
    reset_adam(optimizer.state[sae.W_dec], dead, feature_dim=0)
    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)
    reset_adam(optimizer.state[sae.b_enc], dead, feature_dim=0)


def draw_badly_reconstructed(sae, z, target, n, generator):     # (B,d_in), (B,d_out) -> (n,)
    """n places of a batch, drawn with replacement and with probability ~ (squared error of the
    reconstruction)^2."""
    error = (sae(z) - target).square().sum(-1).cpu().double()           # (B,)
    drawn = torch.multinomial(error.square(), n, replacement=True, generator=generator)
    return drawn.to(z.device)


def reset_adam(state, dead, feature_dim):
    """Adam's moments of new features, in place: the first is 0, the second the element-wise mean
    over live features.

    state: what Adam knows of one parameter, a dict with "exp_avg" and "exp_avg_sq" of its shape,
    and "step", which stays. dead: (d_sae,) bool. feature_dim: the dimension along which features
    lie, 1 in W_enc, 0 in W_dec and b_enc.

    Why the second is not 0 too: Adam divides it by 1 - beta2^step, to make up for its start at 0.
    That knows only the parameter's step: a moment set to 0 at step t counts as t steps old, and is
    far too small. The first update would be sqrt((1 - beta2^t) / (1 - beta2)) times the learning
    rate: with train.py's beta1 = 0 and beta2 = 0.9999, 18 times at step 350, and up to 100 times.
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


def splice_mlp(transcoder):
    """The same for an MLP, for model(tokens, edit_mlp={layer: edit}): what the transcoder makes of
    the MLP's input in place of its output, except at position 0."""
    def edit(mlp_in, mlp_out):                              # (B,T,d_model) x 2 -> (B,T,d_model)
        y_hat = transcoder(mlp_in[:, 1:].to(transcoder.b_dec.dtype)).to(mlp_out.dtype)
        return torch.cat([mlp_out[:, :1], y_hat], 1)
    return edit


def ablate(sae, feature, where):
    """The edit that takes f_i * W_dec[i] out of z_cat where `where` holds. All else stays, the
    SAE's error and z_cat's type included.

    feature: a number, or one for each row of the batch (B,). where: (B,T) bool.
    """
    return clamp(sae, feature, 0.0, where)


def clamp(sae, feature, value, where=None):
    """The edit that makes f_i `value` where `where` holds: (value - f_i) * W_dec[i] is added to
    z_cat, and all else stays, the SAE's error and z_cat's type included. So features steer a model.

    feature: a number, or one for each row of the batch (B,). where: (B,T) bool; if not given, every
    position but 0 (BOS), however long the text is.
    """
    def edit(z):                                            # (B,T,d_in) -> (B,T,d_in)
        return put_in(sae, feature, value, all_but_bos(z) if where is None else where, z, z)
    return edit


def ablate_mlp(transcoder, feature, where):
    """`ablate` for an MLP, for edit_mlp: f_i * W_dec[i] out of what it writes."""
    return clamp_mlp(transcoder, feature, 0.0, where)


def clamp_mlp(transcoder, feature, value, where=None):
    """`clamp` for an MLP, for edit_mlp."""
    def edit(mlp_in, mlp_out):                              # (B,T,d_model) x 2 -> (B,T,d_model)
        here = all_but_bos(mlp_in) if where is None else where
        return put_in(transcoder, feature, value, here, mlp_in, mlp_out)
    return edit


def all_but_bos(z):                                         # (B,T,d_in) -> (B,T) bool
    """Every position but 0."""
    where = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    where[:, 0] = False
    return where


def put_in(sae, feature, value, where, read, written):  # (B,T,d_in), (B,T,d_out) -> (B,T,d_out)
    """What is written plus (value - f_i) * W_dec[i] at some places, f_i being what the feature
    makes of what is read there; as a new tensor, of the type of what is written.

    feature, where: as in `clamp`. What is read is taken to the SAE's type before it is encoded.
    """
    row, _ = where.nonzero(as_tuple=True)                   # (n,) of each position to edit
    feature_of_row = torch.as_tensor(feature, device=read.device).expand(len(read))     # (B,)
    i = feature_of_row[row]                                 # (n,) the feature that goes there
    f = sae.encode(read[where].to(sae.b_dec.dtype))         # (n,d_sae)
    f_i = f.gather(1, i[:, None])                           # (n,1)
    edited = written.clone()
    edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)
    return edited


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
    saes = {}
    for layer, path in sae_paths(where, layers, model.config.n_layers).items():
        sae = SAE.load(path, device)
        check_belongs(sae, layer, model, where, (Z_CAT, FOLDED_Z_CAT), model.config.d_z_cat)
        if sae.reads == FOLDED_Z_CAT:
            sae.shift(model.value_bias(layer).to(device))
            sae.about["reads"] = Z_CAT
        saes[layer] = sae
    print_doubts(saes, digest(model), where)
    return saes


def load_transcoders(where, model, layers=None, device="cpu"):
    """The transcoders beside some SAEs, in where/mlp/L<layer>/, as train.py --reads mlp writes them
    -> {layer: Transcoder}.

    layers: all that are there if not given. Raises UserError as `load_saes` does.
    """
    model.check_layers(layers or ())
    folder = Path(where) / MLP
    transcoders = {}
    for layer, path in sae_paths(folder, layers, model.config.n_layers).items():
        transcoders[layer] = SAE.load(path, device)
        check_belongs(transcoders[layer], layer, model, folder, (MLP,), model.config.d_model)
    print_doubts(transcoders, digest(model), folder)
    return transcoders


def check_belongs(sae, layer, model, where, reads, width):
    """Raise UserError for an SAE of another site, layer or architecture, or of another width."""
    architecture = model.architecture()
    if sae.reads not in reads:
        raise UserError(f"--saes {where}: the SAE of layer {layer} reads {sae.reads}, and "
                        f"{reads[0]} is what this program has for it.")
    if sae.about.get("layer", layer) != layer:
        raise UserError(f"--saes {where}: the SAE in the place of layer {layer} is of layer "
                        f"{sae.about['layer']}; put it where it belongs.")
    if sae.about.get("architecture", architecture) != architecture:
        raise UserError(f"--saes {where}: the SAE of layer {layer} is of another model, a "
                        f"{sae.about['architecture']}; this one is a {architecture}.")
    for verb, its_width in (("reads", sae.d_in), ("writes", sae.d_out)):
        if its_width != width:
            raise UserError(f"--saes {where}: the SAE of layer {layer} {verb} {its_width} numbers "
                            f"and this model's {sae.reads} has {width}; they do not belong "
                            f"together.")


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


def check_feature(saes, layer, feature, kind="feature"):
    """Raise UserError where there is no such SAE or feature; kind: "MLP feature" where these are
    transcoders."""
    name = "transcoder" if kind == "MLP feature" else "SAE"
    if layer not in saes:
        raise UserError(f"layer {layer} has no {name}; there are {name}s for layers "
                        f"{', '.join(map(str, saes)) or 'none'}.")
    last = saes[layer].d_sae - 1
    if not 0 <= feature <= last:
        raise UserError(f"feature {feature} is out of range: this {name} has features 0 to "
                        f"{last}.")
