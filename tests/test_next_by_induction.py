"""next_by_induction.py: literal texts with literal answers, features of hand-wired induction heads,
and whole runs."""

import copy

import numpy as np
import pytest
import torch

import next_by_induction as N
import sae as S
from conftest import Words
from data.strongest import Entries
from data.tokens import fuzzy_classes
from induction import random_rows
from test_induction import BOS, GAIN, TABLE, V, wired

# ---- the proxy ----


def test_the_proxy_by_hand():
    words = ["sk", " board", " Sk", "ate", " sk", "<bos>"]
    table = fuzzy_classes(Words(words))
    # BOS sk board ate Sk ate _sk sk
    tokens = torch.tensor([[5, 0, 1, 3, 2, 3, 4, 0]])
    board = lambda q: bool(
        N.followed_by(tokens, table[tokens], torch.tensor([0]), torch.tensor([q]), torch.tensor([1])
                      ))
    assert [board(q) for q in range(8)] == [False, False, False, False, True, False, True, True]
    everywhere = N.followed_everywhere(tokens, table[tokens], 1)
    assert everywhere.tolist() == [[False, False, False, True, False, True, True]]


def test_the_token_that_comes_by_following_itself():
    tokens = torch.tensor([[9, 3, 3, 3]])
    assert N.followed_everywhere(tokens, tokens, 3).tolist() == [[False, True, True]], \
        "k = q counts"


# ---- features ----


def wired_sae():
    """One feature for every token X that head 1.0 may see: f = 1 where it sees X, written back as
    it was."""
    d_in = 3 * (3 * V + 1)
    sae = S.SAE(d_in, V).double().requires_grad_(False)
    for parameter in sae.parameters():
        parameter.zero_()
    sae.W_enc[torch.arange(V), torch.arange(V)] = 1.0
    sae.W_dec[torch.arange(V), torch.arange(V)] = 1.0
    sae.b_enc.fill_(-0.5)
    return sae


def test_wired_induction_features_are_found_named_and_matter(monkeypatch):
    model = wired()
    monkeypatch.setattr(N, "MIN_ACTIVE", 4)
    tokens = random_rows(model, BOS, TABLE, 400, torch.Generator().manual_seed(3))
    tokens[:, 25:29] = tokens[:, 5:9]
    sae = wired_sae()
    naming = N.Text(tokens[:200], TABLE[tokens[:200]])
    measuring = N.Text(tokens[200:], TABLE[tokens[200:]])
    found, n_live, names = N.find_features(model, {1: sae}, naming, measuring)
    assert len(found) > 20, "most tokens are seen often enough"
    for one in found:
        assert one["X"] == one["feature"], "feature X fires where X is next by induction"
        assert one["share"] == pytest.approx(1, abs=1e-6)
    one = found[0]
    X = one["X"]
    d, = N.features_on_text(model, {1: sae}, [(1, X, X)], N.Text(tokens, TABLE[tokens]))
    assert N.precision_and_recall(d)[0]["precision"] == 1.0
    assert N.precision_and_recall(d)[0]["recall"] > 0.95
    after, = N.downstream(model, {1: sae}, [(1, X, X)], tokens, [d])
    assert after["rank_of_X"] == 1
    # f = 0.5 where the head sees X, written times GAIN: that much of X's logit, less the mean over
    # tokens
    assert after["direct_logit"] == pytest.approx(0.5 * GAIN * (1 - 1 / V), abs=0.02)
    assert after["loss_if_X"] > 0.2
    assert after["loss_if_not_X"] < 0


def test_what_features_do_equals_whole_runs(pair):
    """Removed from whole rows of a whole model, one row at a time; a silent one does nothing."""
    model = copy.deepcopy(pair[0]).double()
    g = torch.Generator().manual_seed(5)
    V, layer = model.config.d_vocab, model.config.n_layers - 2
    tokens = torch.randint(V, (40, 24), generator=g)
    sae = S.SAE(model.config.d_z_cat, 30, g).double().requires_grad_(False)
    sae.b_enc[7] = -1e9
    z = model.z_cat_at(tokens, [layer])[layer]
    wanted = [(layer, 3, 5), (layer, 7, 5)]
    on_texts = [N.OnText(sae.encode(z[:, 1:-1])[..., i], torch.zeros(40, 22, dtype=torch.bool))
                for _, i, _ in wanted]
    found, silent = N.downstream(model, {layer: sae}, wanted, tokens, on_texts, n_rows=25)
    rows = N.rows_where_active(on_texts[0], 25, 0)
    assert len(rows) == min(25, int((on_texts[0].f > 0).any(1).sum())) and len(rows) > 5
    changes, is_X = [], []
    for row in rows.tolist():
        one = tokens[row:row + 1]
        active = torch.zeros(1, 24, dtype=torch.bool)
        active[0, 1:-1] = on_texts[0].f[row] > 0

        def remove(z):
            z = z.clone()
            for q in active[0].nonzero()[:, 0].tolist():
                z[0, q] -= sae.encode(z[0, q])[3] * sae.W_dec[3]
            return z

        before, after = (model(one, edit)[0][0].log_softmax(-1) for edit in ({}, {layer: remove}))
        for q in active[0].nonzero()[:, 0].tolist():
            changes.append(float(before[q, one[0, q + 1]] - after[q, one[0, q + 1]]))
            is_X.append(int(one[0, q + 1]) == 5)
    other = [change for change, hit in zip(changes, is_X) if not hit]
    assert found["n_loss_if_X"] == sum(is_X) and found["n_loss_if_not_X"] == len(other)
    # logits are float32 where losses are taken
    assert found["loss_if_not_X"] == pytest.approx(np.mean(other), abs=1e-6)
    assert silent["n_rows"] == 0 and silent["loss_if_X"] is None and silent["direct_logit"] is None


class OneHot:
    """A model whose z_cat says which token is there, and whether token 0 followed it earlier."""

    class config:
        d_vocab = 12

    def z_cat_at(self, tokens, layers):
        here = torch.nn.functional.one_hot(tokens, 12).float()
        follows = torch.nn.functional.pad(N.followed_everywhere(tokens, tokens, 0), (1, 0))
        return {layer: torch.cat([here, follows[..., None].float()], -1) for layer in layers}


def test_a_feature_of_the_current_token_is_no_induction_feature():
    tokens = torch.randint(1, 11, (200, 60), generator=torch.Generator().manual_seed(0))
    often = torch.rand(200, 30, generator=torch.Generator().manual_seed(1)) < 0.6
    tokens[:, 1::2] = torch.where(often, 0, tokens[:, 1::2])            # 0 follows every token
    tokens[:, 0] = 11
    sae = S.SAE(13, 13).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(13))
    sae.W_dec.copy_(torch.eye(13))
    classes = torch.where(tokens == 11, -1, tokens)
    naming, every = tokens[:100], torch.arange(1, 11)
    f = sae.encode(OneHot().z_cat_at(naming, [0])[0][:, 1:])
    row, q, feature = f.nonzero(as_tuple=True)
    entries = Entries(row, q + 1, feature, f[row, q, feature])
    names = N.name_next(naming, classes[:100], entries, 13)
    assert names[12] == 0 and (names[1:11] == 0).all() and names[11] == -1
    text = N.Text(tokens, classes)
    shares = N.sum_where_followed(OneHot(), {0: sae}, text, {0: names})[0]
    expected = N.expected_shares(OneHot(), {0: sae}, {0: every}, {0: names[every]}, text, text)[0]
    torch.testing.assert_close(expected.double(), shares.share[every], rtol=1e-4, atol=1e-6)
    halves = [N.Text(tokens[rows], classes[rows]) for rows in (slice(100), slice(100, None))]
    found, _, _ = N.find_features(OneHot(), {0: sae}, *halves)
    assert (shares.n[1:11] > N.MIN_ACTIVE).all()
    assert shares.share[1:11].max() > N.MIN_SHARE
    assert [one["feature"] for one in found] == [12], \
        "the proxy is one, the current token alone is not"
    assert found[0]["share"] == 1.0


def test_a_feature_is_named_after_the_token_with_the_most_activation():
    tokens = torch.tensor([[9, 1, 4, 1, 5, 1], [9, 2, 6, 2, 0, 0]])
    entries = Entries(torch.tensor([0, 0, 1, 1]), torch.tensor([3, 5, 3, 1]),
                      torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.5, 3.0]))
    # feature 0: after an earlier 1 came 4 (from both 1s: 2.0) and 5 (1.0); after an earlier 2 came
    # 6 (1.5)
    assert N.name_next(tokens, tokens, entries, 3).tolist() == [4, -1, -1]
    special = torch.where(tokens == 4, -1, tokens)          # if 4 were BOS
    assert N.name_next(tokens, special, entries, 3).tolist() == [6, -1, -1]


def test_places_show_the_token_at_which_the_feature_is_active():
    words = [" a", " b", " c", " d", "<bos>"]
    tokens = torch.tensor([[4, 0, 1, 0, 2, 3, 3]])
    d = N.OnText(torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.0]]),
                 torch.tensor([[False, False, True, False, True]]))
    shown = N.show_places(d, tokens, Words(words))
    texts = {kind: [place["text"] for place in places] for kind, places in shown.items()}
    assert texts == {"active, X followed earlier": ["<bos> a b\u27e8 a\u27e9 c d d"],
                     "active, X did not follow earlier": ["<bos> a b a\u27e8 c\u27e9 d d"],
                     "silent, X followed earlier": ["<bos> a b a c\u27e8 d\u27e9 d"]}
    table = N.precision_and_recall(d, (0.0, 0.75))
    found = [(row["n_over"], row["precision"], row["recall"]) for row in table]
    assert found == [(2, 0.5, 0.5), (1, 1.0, 0.5)]
