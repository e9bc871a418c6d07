"""The smallest of everything: a layer, a head, an SAE of one feature, contexts of 4, 20 and 64
tokens. Every program ends well, or says in a sentence what it lacks."""

import re
import shutil

import pytest
from conftest import program, random_gpt2

from data.weights import TINY

PROGRAMS = {
    "train": ["--d-sae", 1, "--n-tokens", 20_000, "--batch-size", 256, "--n-eval-rows", 16],
    "explorer": [], "features": ["--n-tokens", 2000], "heads": ["--n-tokens", 2000],
    "induction": ["--n-rows", 32, "--n-sequences", 20, "--heads", "0.0"], "ioi": ["--n-prompts", 20]}
# What does not fit: {tokens of context: {program: the sentence}}.
TOO_SHORT = {
    4: {"explorer": "a prompt of 15 tokens does not fit", "ioi": "IOI prompts of 33 tokens do not fit"},
    20: {"ioi": "IOI prompts of 33 tokens do not fit this model, which takes 1 to 20"},
    64: {}}


@pytest.mark.parametrize("n_ctx", TOO_SHORT)
def test_every_program_ends_well(tmp_path, n_ctx):
    random_gpt2(tmp_path / "m", n_layer=1, n_head=1, n_embd=8, vocab_size=4096, n_positions=n_ctx)
    shutil.copy(TINY / "vocab.json", tmp_path / "m")
    for name, arguments in PROGRAMS.items():
        of_train = ["--n-ctx", n_ctx] if name == "train" else []
        done = program(name, "--model", tmp_path / "m", "--out", tmp_path, *arguments, *of_train)
        if sentence := TOO_SHORT[n_ctx].get(name):
            assert done.returncode == 2 and sentence in done.stderr, done.stderr
        elif done.returncode:           # its one feature may be silent where it is asked about
            assert name == "explorer" and "is active at position" in done.stderr, done.stderr
        else:
            assert f"written to {tmp_path}" in done.stdout
        if name == "induction":
            left_out = "prefixes of 9 tokens take rows of 21 tokens" in done.stdout
            assert left_out == (n_ctx < 21)
            assert "attention before and after one token is replaced" in done.stdout
    names = {path.name for path in tmp_path.rglob("*")}
    assert len(names) > 10 and not [name for name in names if not re.fullmatch(r"[\w.-]+", name)], \
        "a name that some system does not take"
