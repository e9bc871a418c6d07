"""data/corpus.py: documents from files, and what is said of files that cannot be read."""

import gzip
import json

import pytest
import torch

import data
from data.corpus import documents, in_turn
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


def test_files_of_a_folder_are_read_in_turn(tmp_path):
    """Also where there are more than are open at once, and where they end at different times."""
    lengths = {"a": 3, "b": 1, "c": 5, "d": 2}
    for name, n in lengths.items():
        lines = [json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "empty.txt").write_text("")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    assert list(in_turn(paths)) == "a0 b0 c0 d0 a1 c1 d1 a2 c2 c3 c4".split()
    assert list(in_turn(paths, n_open=2)) == "a0 b0 a1 a2 c0 c1 d0 c2 d1 c3 c4".split()
    assert list(in_turn([])) == []


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
    (tmp_path / "page.txt").write_text("".join(whole[:2]))
    assert sorted(all_of(tmp_path / "page.txt")) == sorted(whole[:2]), "no empty page at the end"


def all_of(path):
    """Every document of a corpus."""
    return [*documents(str(path), "train"), *documents(str(path), "held-out")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nau lait\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "tea"}\r\n')
    assert sorted(all_of(tmp_path)) == ["caf\u00e9\nau lait\n", "tea"]


@pytest.mark.parametrize("name", ["A.TXT", "B.Jsonl", "C.JSON.GZ"])
def test_capitals_in_a_suffix_are_as_good(tmp_path, name):
    text = b"tea\n" if name == "A.TXT" else b'{"text": "tea\\n"}\n'
    (tmp_path / name).write_bytes(gzip.compress(text) if name == "C.JSON.GZ" else text)
    assert all_of(tmp_path) == all_of(tmp_path / name) == ["tea\n"]


def test_a_line_without_end_has_pages_in_both_splits(tmp_path):
    line = "".join(f"{i} caf\u00e9s, " for i in range(100_000))
    (tmp_path / "a.txt").write_text(line, encoding="utf8")
    train, held_out = (list(documents(str(tmp_path / "a.txt"), split))
                       for split in ("train", "held-out"))
    assert sorted("".join(train + held_out)) == sorted(line), "text was lost at a cut"
    assert held_out and len(train) > 10 * len(held_out)
    assert max(map(len, train + held_out)) <= 12_000 + 3000


@pytest.mark.parametrize("sign", [" ", "\n", "a", "\u00e9"])
def test_a_million_signs_without_a_word_are_read(tmp_path, sign):
    """tiktoken's own stack does not take a million blanks at once."""
    tokenizer = data.load_tokenizer("tiny")
    assert tokenizer.decode(tokenizer.encode(sign * 10**6)) == sign * 10**6
    assert len(tokenizer.encode_batch(["tea", sign * 10**6])[1]) > 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": sign * 10**6}) + "\n")
    split = "train" if list(documents(str(tmp_path / "a.jsonl"), "train")) else "held-out"
    assert len(next(data.rows(tmp_path / "a.jsonl", tokenizer, split, n=8))) == 8


def test_a_long_text_is_cut_where_no_token_changes():
    tokenizer = data.load_tokenizer("tiny")
    text = "".join(f"The {i}th cat's hat;  \n\n def f(x):\n\treturn {i}\n" for i in range(8000))
    assert len(text) > 3 * 100_000
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.parametrize("n_before", [0, 7, 11_999, 12_000, 50_000])
def test_the_place_of_a_byte_that_is_not_utf8_is_its_own(tmp_path, n_before):
    """Also after a byte order mark, and where a line is read in pieces."""
    good = (b"\xef\xbb\xbf" + "\u00e9".encode() * n_before)[:max(n_before, 3) // 3 * 3]
    good = good if n_before else b""
    good = good.decode("utf8", "ignore").encode()
    for name, rest in (("a.txt", b"\xe9 and more\n"), ("a.txt", b"\xe2\x82")):
        (tmp_path / name).write_bytes(good + rest)
        with pytest.raises(UserError, match=f"a.txt is not UTF-8 text: byte {len(good):,} "):
            all_of(tmp_path / name)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "tea"}\n{"text": "\xff"}\n'))
    with pytest.raises(UserError, match="not UTF-8 text: byte 26 "):
        all_of(tmp_path / "b.jsonl.gz")


def test_a_text_can_be_read_several_times(tmp_path):
    tokenizer = data.load_tokenizer("tiny")
    path = write_corpus(tmp_path, "jsonl")
    once = torch.cat(list(data.rows(path, tokenizer, "train", T=32)))
    thrice = torch.cat(list(data.rows(path, tokenizer, "train", T=32, passes=3)))
    assert 0 <= len(thrice) - 3 * len(once) <= 3
    counts = torch.bincount(thrice[:, 1:].flatten(), minlength=4096)
    expected = 3 * torch.bincount(once[:, 1:].flatten(), minlength=4096)
    assert (counts - expected).abs().sum() < 200, "but for what was left over after a row"


def test_how_much_is_held_out_is_a_setting(tmp_path):
    path = str(write_corpus(tmp_path, "jsonl"))
    by_share = {share: set(documents(path, "held-out", share)) for share in (0.05, 0.3, 0.9)}
    assert by_share[0.05] < by_share[0.3] < by_share[0.9]
    assert 0.2 < len(by_share[0.3]) / len(DOCUMENTS) < 0.4
    assert by_share[0.3].isdisjoint(documents(path, "train", 0.3))
    tokenizer = data.load_tokenizer("tiny")
    (tmp_path / "short.jsonl").write_text('{"text": "%s"}\n' % ("tea and cake " * 100))
    with pytest.raises(UserError, match="has less than a row of 128 tokens of held-out text .of its "
                       "documents 5% are held out.*--held-out-share"):
        next(data.rows(tmp_path / "short.jsonl", tokenizer, "held-out"))
    with pytest.raises(UserError, match="--held-out-share must be above 0 and below 1, not 1"):
        next(data.rows(path, tokenizer, held_out_share=1))


# without the time, which would be in the test's name: processes that run tests compare names
CUT_SHORT = gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-20]


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "fine"}\n{"text": 7}\n', ["a.jsonl, line 2", "text"]),
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', ["a.jsonl, line 3"]),
    ("a.jsonl", b"[1]\n", ["line 1"]),
    ("a.txt", b"caf\xe9 " * 1000, ["UTF-8"]),
    ("a.txt", b"", ["less than a row"]),
    ("a.txt", b"too short", ["less than a row of 128 tokens"]),
    ("a.json.gz", CUT_SHORT, ["a.json.gz", "damaged or cut short"]),
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
    with pytest.raises(UserError, match="--corpus https://example.org/a.txt is not there; give"):
        next(data.rows("https://example.org/a.txt", data.load_tokenizer("tiny")))
