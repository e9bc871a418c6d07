"""Writes the SAEs beside this file: what sae-lens saved in other years, and what it computed.

    python -m venv v && v/bin/pip install sae-lens==2.1.3 && v/bin/python tests/saelens/write.py

Each folder has the files of `save_model`, and in expected.safetensors an input z, its features,
the features once decoder rows are brought to unit norm (`fold_W_dec_norm`, as published dashboards
show them; 2.1.3 has no such function), and the reconstruction. All numbers are random.
"""

from pathlib import Path

import sae_lens
import torch
from safetensors.torch import save_file

N_HEADS, D_HEAD, D_SAE = 2, 3, 10
VERSION = sae_lens.__version__


def make(architecture):
    """An SAE of this version, standard or jumprelu."""
    common = {"d_in": N_HEADS * D_HEAD, "d_sae": D_SAE, "model_name": "gpt2-small",
              "dataset_path": "none", "context_size": 128, "prepend_bos": True, "device": "cpu"}
    if VERSION.startswith("2."):
        from sae_lens.training.config import LanguageModelSAERunnerConfig
        from sae_lens.training.sparse_autoencoder import SparseAutoencoder
        config = LanguageModelSAERunnerConfig(
            **common | {"d_sae": None, "expansion_factor": 2, "device": torch.device("cpu")},
            hook_point="blocks.1.attn.hook_z", hook_point_layer=1, dtype=torch.float32,
            normalize_sae_decoder=False, log_to_wandb=False)
        config.checkpoint_path = "checkpoints"              # without a random name
        return SparseAutoencoder(config)
    return sae_lens.SAE.from_dict(common | {
        "architecture": architecture, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "hook_name": "blocks.1.attn.hook_z", "hook_layer": 1,
        "hook_head_index": None, "dataset_trust_remote_code": True, "normalize_activations": "none",
        "dtype": "float32", "sae_lens_training_version": VERSION})


@torch.no_grad()
def write(architecture, folder):
    torch.manual_seed(0)
    sae = make(architecture)
    for name, parameter in sae.named_parameters():
        if name != "scaling_factor":
            parameter.copy_(torch.randn_like(parameter))
    if architecture == "jumprelu":
        sae.threshold.copy_(torch.rand(len(sae.threshold)))
    z = torch.randn(7, N_HEADS, D_HEAD)
    folder.mkdir(exist_ok=True)
    sae.save_model(str(folder))
    if VERSION.startswith("2."):
        z_cat = z.flatten(1)
        features = sae.encode(z_cat)
        expected = {"features": features, "z_hat": sae.decode(features)}
    else:
        features = sae.encode(z)
        expected = {"features": features, "z_hat": sae.decode(features).flatten(1)}
        sae.fold_W_dec_norm()
        expected["unit features"] = sae.encode(z)
    expected = {name: tensor.clone().contiguous() for name, tensor in expected.items()}
    save_file(expected | {"z": z.flatten(1).clone()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for kind in ["standard"] if VERSION < "4" else ["standard", "jumprelu"]:
        write(kind, Path(__file__).parent / f"{VERSION}-{kind}")
