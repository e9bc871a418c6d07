"""data/: vocabulary, rows, stories and the small shared helpers."""

import dataclasses
import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import bpe, common, stories, text
from data.common import UserError
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


def test_unknown_corpus_is_named():
    with pytest.raises(UserError, match="--corpus nowhere"):
        next(data.rows("nowhere", data.tokenizer("tiny")))


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
