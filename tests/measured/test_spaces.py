"""tests/measured/spaces.py: matches by correlation."""

import json
import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT

import sae as S
import spaces


def test_matches_equal_numpys_correlations():
    g = torch.Generator().manual_seed(0)
    f, other = torch.rand(200, 7, generator=g), torch.rand(200, 5, generator=g)
    other[:, 3] = 2 * f[:, 1] + 0.1
    match, correlation = spaces.best_matches(f, other, chunk=3)
    table = np.corrcoef(f.numpy(), other.numpy(), rowvar=False)[:7, 7:]
    assert match.tolist() == table.argmax(1).tolist() and match[1] == 3
    np.testing.assert_allclose(correlation.numpy(), table.max(1), atol=1e-5)


def test_an_sae_seen_through_an_orthogonal_map_has_the_same_features():
    g = torch.Generator().manual_seed(0)
    one = S.SAE(16, 40, generator=g).requires_grad_(False)
    one.b_enc -= 0.5
    W_O = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q
    mapped, unlike = S.SAE(16, 40).requires_grad_(False), S.SAE(16, 40,
                                                                generator=g).requires_grad_(False)
    mapped.W_enc.copy_(W_O.T @ one.W_enc), mapped.W_dec.copy_(one.W_dec @ W_O), mapped.b_enc.copy_(
        one.b_enc)
    z = torch.randn(3000, 16, generator=g)
    four = dict(zip(spaces.SPACES, (one, mapped, unlike, unlike)))
    found = spaces.compare(four, z, W_O)
    for pair in ("z_cat in z_cat @ W_O", "z_cat @ W_O in z_cat"):
        same = found[pair]
        assert same["matched"] == 1 and same["cosine"] > 0.999 and same["n_features"] == 40
    for pair in ("z_cat in z_cat, other start", "z_cat @ W_O in z_cat @ W_O, other start"):
        assert found[pair]["matched"] < 0.5


def test_the_program_writes_its_table(tmp_path):
    small = ["--layers", "1", "--d-sae", "64", "--n-tokens", "4096", "--n-eval-rows", "8"]
    done = subprocess.run([sys.executable, "tests/measured/spaces.py", *small, "--out", tmp_path],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "z_cat @ W_O in z_cat" in done.stdout
    assert list(json.loads((tmp_path / "tiny" / "spaces.json").read_text())["layers"]) == ["L1"]
