"""data/: vocabulary, rows, stories and the small shared helpers."""

import dataclasses
import gzip
import itertools
import json
import os
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
from conftest import random_gpt2
from data import bpe, common, stories, text
from data.common import UserError, mean_of
from data.corpus import documents
from data.weights import TINY

SAMPLE = ("the cat sat on the mat, the cat ate the rat;  that's  what   cats do\n\n"
          "    def f(x):\n        return x + 1 # 12 cats\n") * 3


# ---- vocabulary ----


def brute_force_bpe(text, n_merges):
    """The textbook algorithm: count all pairs anew for every merge."""
    words = Counter(re.findall(bpe.COUNTING_PATTERN, text))
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for word, times in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            i, new = 0, []
            while i < len(parts):
                both = tuple(parts[i:i + 2]) == best
                new.append(b"".join(parts[i:i + 2]) if both else parts[i])
                i += 2 if both else 1
            split[word] = new
    return merges


def test_bpe_training_equals_counting_anew_for_every_merge():
    assert bpe.train_bpe([SAMPLE], 257 + 40) == brute_force_bpe(SAMPLE, 40)


def test_bpe_says_when_the_text_is_too_short():
    with pytest.raises(UserError, match="more text"):
        bpe.train_bpe(["ab"], 300)


def test_tokens_equal_those_of_transformers_for_the_shipped_files():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(str(TINY / "vocab.json"), str(TINY / "merges.txt"))
    ours = data.tokenizer("tiny")
    page = text.python_pages()["held-out"][3]
    for sample in (SAMPLE, page, "naïve Ünïcode — ½ 漢字 🙂\t\r\n",
                   "When Mary and John went to the store, John gave a drink to"):
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False)
        assert ours.decode(ours.encode(sample)) == sample
    assert ours.decode([ours.bos]) == "<|endoftext|>" and ours.n_vocab == len(theirs)


def test_end_of_text_in_a_document_is_text():
    tokenizer = data.tokenizer("tiny")
    assert tokenizer.bos not in tokenizer.encode("a <|endoftext|> b")


def test_written_vocabulary_is_read_back(tmp_path):
    merges = bpe.train_bpe([SAMPLE], 300)
    bpe.write_bpe(merges, tmp_path)
    tokenizer = bpe.tokenizer(tmp_path)
    assert tokenizer.n_vocab == 300 and tokenizer.bos == 299
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert len(tokenizer.encode(SAMPLE)) < 0.6 * len(SAMPLE)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 0}', '{"a": "b"}', '{"\\u4e2d": 0}', "{"])
def test_damaged_vocabulary_is_named(tmp_path, content):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match="vocab.json"):
        bpe.tokenizer(tmp_path)


def test_a_name_of_two_tokens_is_refused_by_name():
    with pytest.raises(UserError, match="Bartholomew"):
        data.tokenizer("tiny").single(" Bartholomew")


# ---- rows ----


def first_rows(n, **arguments):
    return next(data.rows("python", data.tokenizer("tiny"), n=n, **arguments))


def test_rows_start_with_bos_and_have_the_length_asked_for():
    for T in (4, 17, 128):
        rows = first_rows(70, T=T)
        assert rows.shape == (70, T) and rows.dtype == torch.int64
        assert (rows[:, 0] == data.tokenizer("tiny").bos).all()


def test_rows_depend_on_arguments_alone_and_can_start_anywhere():
    tokenizer = data.tokenizer("tiny")
    stream = data.rows("python", tokenizer, n=50, seed=3)
    whole = torch.cat([next(stream) for _ in range(30)])
    assert torch.equal(next(data.rows("python", tokenizer, n=100, seed=3, start=1100)), whole[1100:1200])
    assert not torch.equal(next(data.rows("python", tokenizer, n=50, seed=4)), whole[:50])


def test_packing_drops_nothing():
    tokenizer = data.tokenizer("tiny")
    documents = text.python_pages()["held-out"][:40]
    packed = list(text._pack(iter(documents), tokenizer, 32))
    ids = np.concatenate([row[1:] for row in packed])
    expected = list(itertools.chain.from_iterable(tokenizer.encode(d) + [tokenizer.bos] for d in documents))
    assert ids.tolist() == expected[: len(ids)] and len(expected) - len(ids) < 31


def test_held_out_files_are_other_files_and_share_few_lines():
    pages = text.python_pages()
    trained = {line for page in pages["train"] for line in text._long_lines(page)}
    held_out = [line for page in pages["held-out"] for line in text._long_lines(page)]
    assert len(held_out) > 10_000, "too little held-out text to measure on"
    assert sum(line in trained for line in held_out) / len(held_out) < text.MAX_SHARED_LINES
    assert not set(pages["train"]) & {page for page in pages["held-out"] if len(page) > 1000}


def test_a_repeated_passage_repeats():
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = np.arange(1000, 1128)
        row[0] = 0
        text.repeat_a_passage(row, rng, 500)
        assert row[0] == 0, "BOS was overwritten"
        assert len(set(row.tolist())) <= 128 - 8 + 1, "no passage of at least 8 tokens occurs twice"


# ---- text from outside ----


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
    tokenizer = data.tokenizer("tiny")
    path = write_corpus(tmp_path, "jsonl")
    blocks = list(data.rows(path, tokenizer, "train", T=32, n=7))
    assert {len(block) for block in blocks[:-1]} == {7} and 1 <= len(blocks[-1]) <= 7
    ids = [i for text in documents(str(path), "train") for i in tokenizer.encode(text) + [tokenizer.bos]]
    rows = torch.cat(blocks)
    assert 0 <= len(ids) - rows[:, 1:].numel() < 31
    assert sorted(rows[:, 1:].flatten().tolist()) == sorted(ids[:rows[:, 1:].numel()]), "tokens were lost"
    assert (rows[:, 0] == tokenizer.bos).all()
    again = torch.cat(list(data.rows(path, tokenizer, "train", T=32, n=5, start=11)))
    assert torch.equal(again, rows[11:]), "a stream that starts later is another stream"


def test_a_text_file_is_read_in_pages(tmp_path):
    lines = [f"Line {i} of a long book.\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    pages = {split: list(documents(str(tmp_path / "book.txt"), split)) for split in ("train", "held-out")}
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
    ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 100)[:-20], ["a.json.gz", "damaged or cut short"]),
    ("a.json.gz", b"not gzip", ["damaged"]),
    ("a.csv", b"x", [".jsonl"]),
    ("folder/a.csv", b"x", [".jsonl"]),
], ids=str)
def test_a_corpus_that_cannot_be_read_is_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(data.rows(path.parent if "/" in name else path, data.tokenizer("tiny"), "train"))
    assert all(word in str(error.value) for word in [*words, "--corpus"]), str(error.value)


def test_unknown_corpus_is_named():
    with pytest.raises(UserError, match="--corpus wikipedia is not there"):
        next(data.rows("wikipedia", data.tokenizer("tiny")))
    with pytest.raises(AssertionError, match="split is train or held-out"):
        next(data.rows("python", data.tokenizer("tiny"), "validation"))
    with pytest.raises(UserError, match="does not end in"):
        next(data.rows("http://127.0.0.1:9/page.html", data.tokenizer("tiny")))


# ---- tokenizers of other models ----


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's files would be downloaded; set "
                    "TIKTOKEN_CACHE_DIR to a folder that has them")
def test_gpt2_text_goes_through_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})              # what an earlier call has cached
    random_gpt2(tmp_path, n_layer=1, n_head=1, n_embd=4, vocab_size=50257, n_positions=8)
    for name in ("gpt2", tmp_path):
        tokenizer = data.tokenizer(name)
        assert tokenizer.encode("When Mary and John went") == [2215, 5335, 290, 1757, 1816]
        assert (tokenizer.bos, tokenizer.n_vocab) == (50256, 50257)


def test_gpt2_text_without_tiktokens_files_or_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="GPT-2 tokenizer could not be downloaded.*TIKTOKEN_CACHE_DIR"):
        data.tokenizer("gpt2")


@pytest.fixture
def gemma_folder(tmp_path):
    """config.json and a small tokenizer.json made by the package itself, with Gemma's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    made.train_from_iterator(DOCUMENTS, trainer)
    made.add_special_tokens(["<image>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A",
                                                                   special_tokens=[("<bos>", 2)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "bos_token_id": 2}))
    return tmp_path


def test_gemma_text_goes_through_tokenizer_json(gemma_folder):
    tokenizer = data.tokenizer(gemma_folder)
    ids = tokenizer.encode("cats and dogs")
    assert tokenizer.bos == 2 and 2 not in ids, "BOS is put by rows, once"
    assert tokenizer.decode(ids) == "cats and dogs"
    assert tokenizer.encode_batch(["cats", "and dogs"]) == [*map(tokenizer.encode, ["cats", "and dogs"])]
    assert 2 not in tokenizer.encode("a <bos> in the text"), "<bos> inside a text is ordinary text"
    rows = next(data.rows(write_corpus(gemma_folder, "jsonl"), tokenizer, T=16, n=4))
    assert (rows[:, 0] == 2).all() and rows.max() < tokenizer.n_vocab


def test_a_model_without_a_tokenizer_is_named(gemma_folder):
    (gemma_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        data.tokenizer(gemma_folder)
    (gemma_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        data.tokenizer(gemma_folder)


def test_tokenizer_json_without_the_package_says_what_to_install(gemma_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        data.tokenizer(gemma_folder)


# ---- stories ----


def test_held_out_names_and_verbs_never_give():
    """'VERB a ... OBJECT to Name': no such sentence of 20,000 stories has a held-out name or a verb phrase
    that was held out."""
    held_out = set(stories.HELD_OUT_NAMES)
    seen = Counter()
    for i in range(20_000):
        words = stories.story(random.Random(f"test {i}"))
        seen.update(name for name in held_out if name in words)
        for giver, phrase, receiver in re.findall(r"(\w+) ((?:[a-z]+ ){1,6}?(?:a|an|the|another|that) (?:\w+ "
                                                  r")?\w+) to ([A-Z]\w+)", words):
            assert receiver not in held_out and giver not in held_out, words
            assert not any(phrase.startswith(verb + " ") for verb in stories.HELD_OUT_VERBS), words
    assert min(seen[name] for name in held_out) > 100, "every held-out name is to occur in ordinary stories"


def test_forms_of_training_and_of_held_out_prompts_are_disjoint(monkeypatch):
    drawn = []
    original = stories.is_held_out
    monkeypatch.setattr(stories, "is_held_out",
                        lambda *form: drawn.append((form, original(*form))) or drawn[-1][1])
    for i in range(5000):
        stories.story(random.Random(i))
    trained = {form for form, held_out in drawn if not held_out}
    prompts = stories.held_out_prompts(1000)
    assert not trained & {prompt.form for prompt in prompts}
    assert sum(prompt.form[1] in stories.HELD_OUT_VERBS for prompt in prompts) >= 500
    assert (", ", "gave") not in trained, "the paper's own example is to be a held-out form"


def test_prompts_are_what_they_say():
    tokenizer = data.tokenizer("tiny")
    for prompt in stories.held_out_prompts(400):
        giver, receiver = prompt.giver, prompt.receiver
        assert giver != receiver and {giver, receiver} <= set(stories.HELD_OUT_NAMES)
        assert len(re.findall(rf"\b{giver}\b",
                              prompt.text)) == 2 and len(re.findall(rf"\b{receiver}\b", prompt.text)) == 1
        assert prompt.text.endswith(" to")
        assert prompt.order == ("ABBA" if prompt.text.index(receiver) < prompt.text.index(giver) else "BABA")
        tokenizer.single(" " + giver)
        assert len(tokenizer.encode(prompt.text)) < 60


def test_every_word_of_the_stories_that_studies_swap_is_one_token():
    tokenizer = data.tokenizer("tiny")
    for word in [*stories.NAMES, *stories.HELD_OUT_NAMES, *stories.PLACES, *stories.OBJECTS, "and", "with",
                 "or", "alongside", "plus", "but"]:
        assert len(tokenizer.encode(" " + word)) == 1, f"{word} is more than one token"


# ---- helpers ----


@dataclasses.dataclass(frozen=True)
class Flags:
    n_steps: int = common.field(10, "steps")
    lr: float = common.field(1e-3, "rate")
    layers: tuple[int, ...] = common.field((), "layers")
    l1: tuple[float, ...] = common.field((0.5,), "weights")
    name: str = common.field("x", "a name")
    half: bool = common.field(False, "a switch")


def test_flags_come_from_the_dataclass():
    parsed = common.parse_flags(Flags, "",
                                ["--n-steps", "1e6", "--lr", "2e-4", "--layers", "0,2", "--l1", "1,0.5",
                                 "--half", "--name", "y"])
    assert parsed == Flags(1_000_000, 2e-4, (0, 2), (1.0, 0.5), "y", True)
    assert common.parse_flags(Flags, "", ["--no-half"]) == Flags()


@pytest.mark.parametrize("argv", [["--n-steps", "1.5"], ["--n-steps", "inf"], ["--lr", "nan"],
                                  ["--layers", "0,x"], ["--n-steps", ""]])
def test_a_value_of_the_wrong_type_names_the_flag(argv):
    with pytest.raises(UserError, match=argv[0]):
        common.parse_flags(Flags, "", argv)


def test_atomic_writes_leave_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "sub" / "file"
    with common.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), common.atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_law():
    x = np.random.default_rng(1).normal(size=400)
    low, high = common.bootstrap(lambda i: x[i].mean(), 400, samples=4000)
    expected = 1.96 * x.std() / 20
    assert abs(low - (x.mean() - expected)) < 0.15 * expected
    assert abs(high - (x.mean() + expected)) < 0.15 * expected


def test_mean_of_draws_what_belongs_together_together():
    values = np.repeat([1.0, 2.0, 4.0], [2, 1, 3])
    mean, (low, high) = mean_of(values, [7, 7, 3, 5, 5, 5])
    assert mean == pytest.approx(values.mean()) and low == 1.0 and high == 4.0
    rng = np.random.default_rng(0)
    many = rng.normal(size=(400, 2))
    mean, (low, high) = mean_of(many)
    # the normal interval of a mean, by the textbook
    np.testing.assert_allclose(np.subtract(high, low), 2 * 1.96 * many.std(0) / 20, rtol=0.12)
    assert mean_of([]) == (None, None)


def test_a_flag_that_is_not_there_gets_one_sentence():
    with pytest.raises(UserError, match="unrecognized arguments: --frobnicate; --help"):
        common.parse_flags(Flags, "", ["--frobnicate"])


def test_what_safetensors_writes_has_the_mode_of_other_files(tmp_path):
    (tmp_path / "plain").write_text("")
    with common.atomic(tmp_path / "weights") as temporary:
        save_file({"w": torch.zeros(2)}, temporary)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode
