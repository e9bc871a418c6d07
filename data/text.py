"""Text as rows of token ids.

`rows(corpus, tokenizer, split)` yields (n, T) tensors; every row starts with the tokenizer's BOS, and
documents are packed into rows with BOS between them. The corpus "python" is the text that the shipped model
was trained on, and every machine that can run this project has it: the Python sources, docstrings and manuals
of the standard library, torch, numpy and matplotlib, read where they are installed; with short stories
(data/stories.py) between them, and with passages that repeat inside a row, on which induction can be learnt
and measured. Other text comes from data/corpus.py. `fuzzy` says which tokens count as the same.
"""

import hashlib
import importlib.util
import itertools
import os
import random
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.common import UserError
from data.corpus import documents, pages
from data.stories import story

PACKAGES = ("torch", "numpy", "matplotlib")
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
STORY_SHARE = 0.25          # of the characters of the python corpus
REPEAT_SHARE = 0.12         # of the rows of the python corpus
MAX_SHARED_LINES = 0.2      # a held-out file may share this part of its lines with the training files


def rows(corpus, tokenizer, split="train", T=128, n=64, seed=0, start=0, repeat_share=REPEAT_SHARE,
         story_share=STORY_SHARE):
    """An iterator of int64 tensors (n, T) of token ids, each row starting with BOS, from row number `start`
    on.

    corpus: "python", endless: each pass shuffles the pages anew and has new stories; repeat_share of its rows
    hold a passage twice. Or what data/corpus.py reads: "c4", a file, a folder, an address; then the iterator
    ends with the text, its last tensor may have fewer rows, and fewer than T-1 tokens are left over. split:
    "train" or "held-out"; the two share no file, no story and no document. The rows depend on the arguments
    alone: a stream with start=k is the stream with start=0 after k rows.

    Raises UserError if the text is not there, is damaged, or is shorter than a row.
    """
    assert split in ("train", "held-out"), f"split is train or held-out, not {split!r}"
    own = str(corpus) == "python"
    texts = python_documents(split, seed, story_share) if own else documents(str(corpus), split)
    shuffled = _shuffle(_pack(texts, tokenizer, T), seed)
    if (first := next(shuffled, None)) is None:
        raise UserError(f"--corpus {corpus} has less than a row of {T} tokens of {split} text (one document "
                        f"in 20 is held out); give more text.")
    shuffled = itertools.islice(itertools.chain([first], shuffled), start, None)
    for number in itertools.count(start, n):
        block = list(itertools.islice(shuffled, n))
        if not block:
            return
        for i, row in enumerate(block):
            rng = np.random.default_rng([seed, number + i, split == "train"])
            if own and rng.random() < repeat_share:
                repeat_a_passage(row, rng, tokenizer.n_vocab - 1)
        yield torch.from_numpy(np.stack(block))


def _shuffle(packed, seed, window=1024):
    """Rows in a new order inside each window, so that neighbours come from different documents."""
    for number in itertools.count():
        block = list(itertools.islice(packed, window))
        if not block:
            return
        yield from (block[i] for i in np.random.default_rng([seed, number]).permutation(len(block)))


def _pack(texts, tokenizer, T):
    """Documents end to end with BOS between them, cut every T-1 tokens, and BOS put before each cut; nothing
    is dropped but the last few tokens of a text that ends."""
    kept = []
    for batch in iter(lambda: list(itertools.islice(texts, 64)), []):
        for ids in tokenizer.encode_batch(batch):
            kept += ids + [tokenizer.bos]
        whole = len(kept) // (T - 1) * (T - 1)
        for row in np.array(kept[:whole], dtype=np.int64).reshape(-1, T - 1):
            yield np.concatenate(([tokenizer.bos], row))
        kept = kept[whole:]


def repeat_a_passage(row, rng, n_ids):
    """Write one passage of 8 to 50 tokens into the row twice, in place: random tokens (60%) or the row's own
    text (40%)."""
    T, longest = len(row), min(50, (len(row) - 1) // 2)
    if longest < 8:
        return
    length = int(rng.integers(8, longest + 1))
    first = int(rng.integers(1, T - 2 * length + 1))
    second = int(rng.integers(first + length, T - length + 1))
    if rng.random() < 0.6:
        row[first:first + length] = rng.integers(0, n_ids, length)
    row[second:second + length] = row[first:first + length]


def python_documents(split, seed, story_share=STORY_SHARE):
    """Endless: pages of the corpus in an order that the seed fixes, with stories between them."""
    all_pages, story_number, debt = python_pages()[split], itertools.count(), 0.0
    for epoch in itertools.count():
        order = list(range(len(all_pages)))
        random.Random(f"{split} pages {seed} {epoch}").shuffle(order)
        for i in order:
            debt += len(all_pages[i]) * story_share / (1 - story_share)
            yield all_pages[i]
            while debt > 0:
                text = story(random.Random(f"{split} story {seed} {next(story_number)}"))
                debt -= len(text)
                yield text


@lru_cache(maxsize=1)
def python_pages():
    """{"train": [...], "held-out": [...]}: the pages of every file, split by a hash of the file's path inside
    its package.

    Exact duplicates are dropped, and so is a held-out file that shares more than 20% of its lines (of 12
    characters and more: `else:` is everybody's) with training files.
    """
    files, seen = {"train": [], "held-out": []}, set()
    for name, text in _python_files():
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            files["held-out" if hashlib.sha256(name.encode()).digest()[0] < 20 else "train"].append(text)
    trained = {line for text in files["train"] for line in _long_lines(text)}
    files["held-out"] = [text for text in files["held-out"] if _shared(text, trained) <= MAX_SHARED_LINES]
    return {split: [page for text in texts for page in pages(text.splitlines(keepends=True))]
            for split, texts in files.items()}


def _python_files():
    """(path inside its package, text) of every source and manual, tests left out, in a fixed order."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    roots |= {package: Path(importlib.util.find_spec(package).origin).parent for package in PACKAGES}
    for package, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith(("test", "_test"))
                                   and s not in ("site-packages", "dist-packages"))
            for path in (Path(folder) / name for name in sorted(names) if name.endswith(SUFFIXES)):
                try:
                    text = path.read_text(encoding="utf8")
                except (UnicodeDecodeError, OSError):       # a few files are in other encodings on purpose
                    continue
                if path.name == "topics.py" and path.parent.name == "pydoc_data":
                    yield from _manual()
                elif len(text) >= 200:
                    yield f"{package}/{path.relative_to(root).as_posix()}", text


def _manual():
    """Python's language reference, one topic a document, as `help("topics")` shows it."""
    from pydoc_data.topics import topics
    return [(f"python/manual/{topic}", text) for topic, text in sorted(topics.items()) if len(text) >= 200]


def _long_lines(text):
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= 12]


def _shared(text, trained):
    lines = _long_lines(text)
    return sum(line in trained for line in lines) / max(len(lines), 1)


def fuzzy(tokenizer):                                                   # -> (n_vocab,)
    """A class for every token: tokens that differ in one leading space or in case share one. BOS has class
    -1; a token that is no text by itself (part of a character) has a class of its own."""
    numbers, classes = {}, []
    for i in range(tokenizer.n_vocab):
        text = tokenizer.decode([i])
        text = text[1:] if text[:1] == " " and len(text) > 1 else text
        key = i if "\ufffd" in text else text.lower()
        classes.append(-1 if i == tokenizer.bos else numbers.setdefault(key, len(numbers)))
    return torch.tensor(classes)


def in_text(row, q, tokenizer, before=10, after=3):                     # (T,) -> str
    """Position q of a row with the text around it, its token in angle brackets."""
    ids = row.tolist()
    decode = lambda part: tokenizer.decode(part).replace("\n", "\\n")
    return (decode(ids[max(q - before, 0):q]) + "\u27e8" + decode(ids[q:q + 1]) + "\u27e9"
            + decode(ids[q + 1:q + 1 + after]))
