"""Fixtures: small random models written by transformers, which are the reference for ours."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

GPT2_SHAPES = {
    "small": dict(n_layer=3, n_head=4, n_embd=32, vocab_size=101, n_positions=40),
    "wide heads, eps": dict(n_layer=2, n_head=2, n_embd=48, vocab_size=333, n_positions=64,
                            layer_norm_epsilon=1e-3),
    "n_inner, one head": dict(n_layer=4, n_head=1, n_embd=20, vocab_size=57, n_positions=30, n_inner=36),
}


def random_gpt2(folder, seed=0, **shape):
    """A transformers GPT-2 with random weights, large enough to matter, saved to `folder` -> the model, in
    eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # biases and norms too: zeros and ones would hide mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="session", params=GPT2_SHAPES, ids=lambda name: name.replace(" ", "_"))
def gpt2_pair(request, tmp_path_factory):
    """(ours, theirs) for each shape."""
    import model
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = random_gpt2(folder, **GPT2_SHAPES[request.param])
    return model.load(folder), theirs


@pytest.fixture(scope="session")
def tiny():
    """The shipped model."""
    import model
    return model.load("tiny")
