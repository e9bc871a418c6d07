"""data/tiny/make.py: its scores against loops, a short training run, and what ships."""

import json
import shutil

import pytest
import torch

import data
import model as models
import train
from conftest import GPT2_SHAPES, random_gpt2
from data.tiny import make as make_tiny
from data.weights import TINY
from sae import load_saes, load_transcoders


def test_induction_score_equals_a_loop_over_queries_and_keys(tmp_path):
    random_gpt2(tmp_path, **GPT2_SHAPES["small"])
    model = models.load_model(tmp_path)
    # few: they repeat
    tokens = torch.randint(1, 7, (3, 30), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    _, cache = model(tokens, keep=range(3))
    for matched in (1, 2, 3):
        total, queries = torch.zeros(3, 4), 0
        for b in range(3):
            row = tokens[b].tolist()
            for q in range(30):
                keys = [k for k in range(2, q) if k - matched >= 1 and q - matched + 1 >= 1
                        and row[q - matched + 1:q + 1] == row[k - matched:k]]
                queries += bool(keys)
                for layer in range(3):
                    total[layer] += cache[layer].pattern[b, :, q, keys].sum(-1)
        scores, n = make_tiny.repeat_scores(model, tokens, 0, matched)
        assert n == queries, "which queries count?"
        assert torch.allclose(scores, total / queries, atol=1e-5)


def test_a_short_run_learns_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    config = make_tiny.TinyConfig(out=str(tmp_path), n_layers=1, n_heads=2, d_model=32, n_ctx=64,
                                  n_steps=12, batch_size=4, warmup=2, device="cpu")
    tokenizer = data.load_tokenizer("tiny")
    monkeypatch.setattr(make_tiny, "CHECKPOINT_EVERY", 8)
    monkeypatch.setattr(make_tiny, "quick_report", lambda model, tokenizer: {})
    kept = []
    save = make_tiny.save_checkpoint

    def save_and_keep(*args):
        save(*args)
        kept.append(shutil.copy(tmp_path / "training.checkpoint", tmp_path / f"copy {len(kept)}"))

    monkeypatch.setattr(make_tiny, "save_checkpoint", save_and_keep)
    whole = make_tiny.train(config, tokenizer, tmp_path)
    shutil.copy(kept[0], tmp_path / "training.checkpoint")                          # back to step 8
    resumed = make_tiny.train(config, tokenizer, tmp_path)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), f"{name} differs after going on from a checkpoint"
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] < 8.3 and log[1]["loss"] < log[0]["loss"]
    make_tiny.write_model(whole, tmp_path)
    loaded = models.load_model(tmp_path)
    tokens = torch.randint(4096, (2, 64))
    assert torch.allclose(loaded(tokens)[0], whole(tokens)[0].detach(), atol=0.02), \
        "float16 on disk, no more"


def test_the_shipped_model_does_what_its_report_says(tiny):
    """What the specimen is for: induction heads, also on real text, and indirect objects in both
    orders."""
    report = json.loads((TINY / "report.json").read_text())
    tokenizer = data.load_tokenizer("tiny")
    random, _ = make_tiny.repeat_scores(tiny, make_tiny.repeated_random_rows(tiny, 32),
                                        tokenizer.bos)
    assert (random >= 0.6).sum() >= 2
    for head, score in report["induction_repeated_random"].items():
        layer, number = map(int, head.split("."))
        assert abs(random[layer, number] - score) < 0.05, head
    real = report["induction_held_out_text"]["matched_2"]
    assert max(score for head, score in real.items() if head != "n_queries") >= 0.4
    prompts = make_tiny.held_out_prompts(200)
    difference, _ = make_tiny.indirect_objects(tiny, tokenizer, prompts)
    for order in ("ABBA", "BABA"):
        assert report["indirect_object"][order]["receiver_above_giver"] >= 0.95
        right = [d > 0 for d, p in zip(difference, prompts) if p.order == order]
        assert sum(right) / len(right) >= 0.9


def test_the_paper_s_example(tiny):
    tokenizer = data.load_tokenizer("tiny")
    text = "When Mary and John went to the store, John gave a drink to"
    logits, _ = tiny(torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]]))
    assert tokenizer.decode([logits[0, -1].argmax()]) == " Mary"


@pytest.mark.parametrize("reads", ["z_cat", "mlp"])
def test_what_ships_does_on_some_rows_what_its_metrics_say(tiny, reads):
    """Evaluated anew on 16 held-out rows; the stored metrics are of more."""
    load = load_saes if reads == "z_cat" else load_transcoders
    folder = TINY if reads == "z_cat" else TINY / "mlp"
    dictionaries = load(TINY, tiny)
    assert set(dictionaries) == set(range(tiny.config.n_layers))
    rows = next(data.rows("python", data.load_tokenizer("tiny"), "held-out", 128, 16))
    no_means = {layer: torch.zeros(one.d_out) for layer, one in dictionaries.items()}
    for layer, found in train.evaluate(tiny, dictionaries, rows, no_means).items():
        stored = json.loads((folder / f"L{layer}" / "metrics.json").read_text())
        assert found["l0"] == pytest.approx(stored["l0"], rel=0.25)
        assert stored["dead_fraction"] <= 0.15
        for measured, at_least in ((found, 0.75), (stored, 0.85)):      # few rows scatter
            recovered = measured["ce_recovered_zero"]
            assert recovered is None or recovered >= at_least
