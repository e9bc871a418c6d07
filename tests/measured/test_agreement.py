"""tests/measured/agreement.py against a loop."""

import pytest
import torch
from conftest import ROOT

import direct as A
import sae as S
from agreement import head_agreement


def test_agreement_of_heads_equals_a_loop(tiny):
    saes = {2: S.SAE.load(ROOT / "data" / "tiny" / "L2")}
    rows = torch.randint(4000, (3, 40), generator=torch.Generator().manual_seed(0))
    found = head_agreement(tiny, saes[2], 2, rows)
    sae, by_feature = saes[2], {}
    _, cache = tiny(rows, keep=(2,))
    f, v = sae.encode(cache[2].z_cat), A.values_minus_bias(tiny, 2, cache[2].v)
    for b in range(3):
        for q in range(1, 40):
            for i in f[b, q].nonzero()[:, 0].tolist():
                one = A.dfa(cache[2].pattern[b:b + 1], v[b:b + 1], sae.W_enc[:, i])[0, :, q].sum(-1)
                whole = one.sum() + A.constant_part(tiny, 2, sae)[i]
                assert whole == pytest.approx(float(f[b, q, i]), abs=1e-4)
                by_feature.setdefault(i, []).append(one)
    top1 = [int(torch.stack(all_).mean(0).argmax() == A.head_weights(sae.W_dec, 4)[i].argmax())
            for i, all_ in by_feature.items()]
    assert found["n_fired"] == len(by_feature) and found["n_fired"] + found["n_silent"] == sae.d_sae
    assert found["top1"] == pytest.approx(sum(top1) / len(top1), abs=2 / len(top1))
    assert found["rank_ci"][0] <= found["rank"] <= found["rank_ci"][1]
