"""data/text.py: rows of tokens, their splits, repeated passages."""

import itertools

import numpy as np
import pytest
import torch

import data
from data import text


def first_rows(n, **arguments):
    return next(data.rows("python", data.load_tokenizer("tiny"), n=n, **arguments))


def test_rows_start_with_bos_and_have_the_length_asked_for():
    for T in (4, 17, 128):
        rows = first_rows(70, T=T)
        assert rows.shape == (70, T) and rows.dtype == torch.int64
        assert (rows[:, 0] == data.load_tokenizer("tiny").bos).all()


def test_rows_depend_on_arguments_alone_and_can_start_anywhere():
    tokenizer = data.load_tokenizer("tiny")
    stream = data.rows("python", tokenizer, n=50, seed=3)
    whole = torch.cat([next(stream) for _ in range(30)])
    part = next(data.rows("python", tokenizer, n=100, seed=3, start=1100))
    assert torch.equal(part, whole[1100:1200])
    assert not torch.equal(next(data.rows("python", tokenizer, n=50, seed=4)), whole[:50])


def test_packing_drops_nothing():
    tokenizer = data.load_tokenizer("tiny")
    documents = text.python_pages()["held-out"][:40]
    packed = list(text.packed(iter(documents), tokenizer, 32))
    ids = np.concatenate([row[1:] for row in packed])
    expected = list(
        itertools.chain.from_iterable(tokenizer.encode(d) + [tokenizer.bos] for d in documents))
    assert ids.tolist() == expected[: len(ids)] and len(expected) - len(ids) < 31


def test_held_out_files_are_other_files_and_share_few_lines():
    pages = text.python_pages()
    trained = {line for page in pages["train"] for line in text.long_lines(page)}
    held_out = [line for page in pages["held-out"] for line in text.long_lines(page)]
    assert len(held_out) > 10_000, "too little held-out text to measure on"
    assert sum(line in trained for line in held_out) / len(held_out) < text.MAX_SHARED_LINES
    assert not set(pages["train"]) & {page for page in pages["held-out"] if len(page) > 1000}


def test_a_repeated_passage_repeats():
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = np.arange(1000, 1128)
        row[0] = 0
        text.repeat_a_passage(row, rng, 500, bos=499)
        assert row[0] == 0, "BOS was overwritten"
        assert len(set(row.tolist())) <= 128 - 8 + 1, "no passage of at least 8 tokens occurs twice"


@pytest.mark.parametrize("bos", [0, 2, 299])
def test_a_repeated_passage_has_no_bos_in_it_whichever_id_that_is(bos):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        row = np.full(128, 1000)
        row[0] = bos
        text.repeat_a_passage(row, rng, 300, bos)
        assert bos not in row[1:], "BOS stands inside a row"
        seen |= set(row[1:].tolist())
    assert seen >= set(range(300)) - {bos}, "a token is never drawn"


def test_held_out_python_is_read_once():
    """Or a study that asks for much would count a page twice, and name features on what it
    measures."""
    pages = text.python_pages()["held-out"]
    texts = list(text.python_documents("held-out", seed=0))
    assert len(texts) == len(set(texts)) and sorted(set(texts) & set(pages)) == sorted(set(pages))
