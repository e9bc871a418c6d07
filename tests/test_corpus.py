"""data/corpus.py: documents from files, and what is said of files that cannot be read."""

import gzip
import json

import pytest
import torch

import data
from data.corpus import documents
from data.errors import UserError

DOCUMENTS = [f"Document {i} tells of {'cats and dogs ' * (3 + i % 7)}." for i in range(500)]


def write_corpus(folder, kind):
    """The same documents as .jsonl, .json.gz or .jsonl.gz in one file, or spread over a folder."""
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS))
    if kind == "folder":
        (folder / "sub").mkdir()
        (folder / "a.jsonl").write_text(lines[:lines.index('{"text": "Document 200 ')])
        (folder / "sub" / "b.jsonl").write_text(lines[lines.index('{"text": "Document 200 '):])
        (folder / "notes.md").write_text("not text for training")
        return folder
    path = folder / f"posts.{kind}"
    path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "jsonl.gz", "folder"])
def test_every_document_of_a_corpus_is_in_exactly_one_split(tmp_path, kind):
    path = write_corpus(tmp_path, kind)
    train, held_out = list(documents(str(path), "train")), list(documents(str(path), "held-out"))
    assert sorted(train + held_out) == sorted(DOCUMENTS), "documents were dropped or read twice"
    assert 5 < len(held_out) < 60, "one document in 20 is held out"


def test_rows_of_a_corpus_end_with_its_text_and_drop_less_than_a_row(tmp_path):
    tokenizer = data.load_tokenizer("tiny")
    path = write_corpus(tmp_path, "jsonl")
    blocks = list(data.rows(path, tokenizer, "train", T=32, n=7))
    assert {len(block) for block in blocks[:-1]} == {7} and 1 <= len(blocks[-1]) <= 7
    ids = [
        i for text in documents(str(path), "train")
        for i in tokenizer.encode(text) + [tokenizer.bos]
    ]
    rows = torch.cat(blocks)
    assert 0 <= len(ids) - rows[:, 1:].numel() < 31
    assert sorted(rows[:, 1:].flatten().tolist()) == sorted(ids[:rows[:, 1:].numel()]), \
        "tokens were lost"
    assert (rows[:, 0] == tokenizer.bos).all()
    again = torch.cat(list(data.rows(path, tokenizer, "train", T=32, n=5, start=11)))
    assert torch.equal(again, rows[11:]), "a stream that starts later is another stream"


def test_a_text_file_is_read_in_pages(tmp_path):
    lines = [f"Line {i} of a long book.\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pages = {
        split: list(documents(str(tmp_path / "book.txt"), split))
        for split in ("train", "held-out")
    }
    whole = sorted(pages["train"] + pages["held-out"], key=lambda page: int(page.split()[1]))
    assert "".join(whole) == "".join(lines), "text was lost between pages"
    assert all(3000 <= len(page) < 3100 for page in whole[:-1]) and pages["held-out"]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "fine"}\n{"text": 7}\n', ["a.jsonl, line 2", "text"]),
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', ["a.jsonl, line 3"]),
    ("a.jsonl", b"[1]\n", ["line 1"]),
    ("a.txt", b"caf\xe9 " * 1000, ["UTF-8"]),
    ("a.txt", b"", ["less than a row"]),
    ("a.txt", b"too short", ["less than a row of 128 tokens"]),
    ("a.json.gz", gzip.compress(
        b'{"text": "x"}\n' * 100)[:-20], ["a.json.gz", "damaged or cut short"]),
    ("a.json.gz", b"not gzip", ["damaged"]),
    ("a.csv", b"x", [".jsonl"]),
    ("folder/a.csv", b"x", [".jsonl"]),
], ids=str)
def test_a_corpus_that_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(data.rows(path.parent if "/" in name else path, data.load_tokenizer("tiny"), "train"))
    assert all(word in str(error.value) for word in [*words, "--corpus"]), str(error.value)


def test_unknown_corpus_is_named():
    with pytest.raises(UserError, match="--corpus wikipedia is not there"):
        next(data.rows("wikipedia", data.load_tokenizer("tiny")))
    with pytest.raises(AssertionError, match="split is train or held-out"):
        next(data.rows("python", data.load_tokenizer("tiny"), "validation"))
    with pytest.raises(UserError, match="does not end in"):
        next(data.rows("http://127.0.0.1:9/page.html", data.load_tokenizer("tiny")))
