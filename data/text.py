"""Text as rows of token ids.

`rows(corpus, tokenizer, split)` yields (n, T) tensors. Every row starts with BOS, and documents are
packed into rows with BOS between them.

The corpus "python" is the text that the shipped model was trained on, and every machine that can
run this project has it: the Python sources, docstrings and manuals of the standard library, torch,
numpy and matplotlib, read where they are installed. Short stories (data/stories.py) stand between
them, and some rows hold a passage twice, on which induction can be learnt and measured. Other text
comes from data/corpus.py.
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

from data.corpus import HELD_OUT_SHARE, documents, pages
from data.errors import UserError
from data.stories import story

PACKAGES = ("torch", "numpy", "matplotlib")
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
STORY_SHARE = 0.25          # of the characters of the python corpus
REPEAT_SHARE = 0.12         # of the rows of the python corpus
MAX_SHARED_LINES = 0.2      # a held-out file may share this part of its lines with training files
SHUFFLED_TOGETHER = 1024    # rows


def rows(corpus, tokenizer, split="train", T=128, n=64, seed=0, start=0, repeat_share=REPEAT_SHARE,
         story_share=STORY_SHARE, passes=1, held_out_share=HELD_OUT_SHARE):
    """An iterator of int64 tensors (n, T) of token ids, each row starting with BOS.

    corpus: "python", repeat_share of whose rows hold a passage twice. To train on it is endless:
    each pass shuffles the pages anew and has new stories; what is held out is read once, so that
    nothing is measured twice. Or what data/corpus.py reads: "c4", a file, a folder. Where the text
    ends so does the iterator; its last tensor may have fewer rows, and fewer than T-1 tokens are
    left over.
    split: "train" or "held-out"; the two share no file, no story and no document. held_out_share:
    of the documents of a text of yours.
    passes: how often a text that ends is read. The passes are packed one after the other, as if
    they were one text.
    start: the first row's number. A stream with start=k is the stream with start=0 after k rows;
    rows depend on the arguments alone.

    Raises UserError if the text is not there, is damaged, or is shorter than a row, and for a
    held_out_share that leaves nothing.
    """
    assert split in ("train", "held-out"), f"split is train or held-out, not {split!r}"
    if not 0 < held_out_share < 1:
        raise UserError(f"--held-out-share must be above 0 and below 1, not {held_out_share}.")
    is_python = str(corpus) == "python"
    if is_python:
        texts = python_documents(split, seed, story_share)
    else:
        texts = itertools.chain.from_iterable(documents(str(corpus), split, held_out_share)
                                              for _ in range(passes))
    stream = shuffled(packed(texts, tokenizer, T), seed)
    first = next(stream, None)
    if first is None:
        raise UserError(f"--corpus {corpus} has less than a row of {T} tokens of {split} text (of "
                        f"its documents {held_out_share:.0%} are held out); give more text, or "
                        f"another --held-out-share.")
    stream = itertools.islice(itertools.chain([first], stream), start, None)
    for number in itertools.count(start, n):
        block = list(itertools.islice(stream, n))
        if not block:
            return
        for i, row in enumerate(block):
            rng = np.random.default_rng([seed, number + i, split == "train"])
            if is_python and rng.random() < repeat_share:
                repeat_a_passage(row, rng, tokenizer.n_vocab, tokenizer.bos)
        yield torch.from_numpy(np.stack(block))


def packed(texts, tokenizer, T):                                # -> (T,) arrays
    """Documents end to end with BOS between them, cut every T-1 tokens, and BOS put before each
    cut. Nothing is dropped but the last few tokens of a text that ends."""
    left_over = []
    while batch := list(itertools.islice(texts, 64)):
        for ids in tokenizer.encode_batch(batch):
            left_over += ids + [tokenizer.bos]
        n_rows = len(left_over) // (T - 1)
        cut = np.array(left_over[:n_rows * (T - 1)], dtype=np.int64)
        for row in cut.reshape(-1, T - 1):
            yield np.concatenate(([tokenizer.bos], row))
        left_over = left_over[n_rows * (T - 1):]


def shuffled(stream, seed):
    """Rows in a new order inside each window, so that neighbours come from different documents."""
    for number in itertools.count():
        window = list(itertools.islice(stream, SHUFFLED_TOGETHER))
        if not window:
            return
        order = np.random.default_rng([seed, number]).permutation(len(window))
        for i in order:
            yield window[i]


def repeat_a_passage(row, rng, n_vocab, bos):
    """Write one passage of 8 to 50 tokens into the row twice, in place.

    It is of random tokens (60%; any but BOS) or the row's own text (40%).
    """
    T = len(row)
    longest = min(50, (T - 1) // 2)
    if longest < 8:
        return
    length = int(rng.integers(8, longest + 1))
    first = int(rng.integers(1, T - 2 * length + 1))
    second = int(rng.integers(first + length, T - length + 1))
    if rng.random() < 0.6:
        passage = rng.integers(0, n_vocab - 1, length)
        passage += passage >= bos                               # the ids from BOS on move up by one
        row[first:first + length] = passage
    row[second:second + length] = row[first:first + length]


# ---- the corpus "python" ----


def python_documents(split, seed, story_share=STORY_SHARE):
    """Pages of the corpus in an order that the seed fixes, with stories between them: endless to
    train on, one pass of what is held out."""
    all_pages = python_pages()[split]
    story_number = itertools.count()
    characters_owed = 0.0                                       # to stories
    for epoch in itertools.count() if split == "train" else range(1):
        order = list(range(len(all_pages)))
        random.Random(f"{split} pages {seed} {epoch}").shuffle(order)
        for i in order:
            yield all_pages[i]
            characters_owed += len(all_pages[i]) * story_share / (1 - story_share)
            while characters_owed > 0:
                text = story(random.Random(f"{split} story {seed} {next(story_number)}"))
                characters_owed -= len(text)
                yield text


@lru_cache(maxsize=1)
def python_pages():
    """{"train": [...], "held-out": [...]}: the pages of every file, split by a hash of the file's
    path inside its package.

    Exact duplicates are dropped, and so is a held-out file that shares more than 20% of its lines
    (of 12 characters and more: `else:` is everybody's) with training files.
    """
    files = {"train": [], "held-out": []}
    seen = set()
    for name, text in python_files():
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        is_held_out = hashlib.sha256(name.encode()).digest()[0] < 20
        files["held-out" if is_held_out else "train"].append(text)

    trained = {line for text in files["train"] for line in long_lines(text)}
    files["held-out"] = [text for text in files["held-out"]
                         if share_of_lines(text, trained) <= MAX_SHARED_LINES]
    return {split: [page for text in texts for page in pages(text.splitlines(keepends=True))]
            for split, texts in files.items()}


def python_files():
    """(path inside its package, text) of every source and manual, tests left out, in a fixed
    order."""
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for package in PACKAGES:
        roots[package] = Path(importlib.util.find_spec(package).origin).parent
    for package, root in roots.items():
        for path in text_files_below(root):
            try:
                text = path.read_text(encoding="utf8")
            except (UnicodeDecodeError, OSError):               # a few are in other encodings
                continue
            if path.name == "topics.py" and path.parent.name == "pydoc_data":
                yield from python_manual()
            elif len(text) >= 200:
                yield f"{package}/{path.relative_to(root).as_posix()}", text


def text_files_below(root):
    """Every source and manual below a folder, tests and other packages left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders
                               if not name.startswith(("test", "_test"))
                               and name not in ("site-packages", "dist-packages"))
        for name in sorted(names):
            if name.endswith(SUFFIXES):
                yield Path(folder) / name


def python_manual():
    """Python's language reference, one topic a document, as `help("topics")` shows it."""
    from pydoc_data.topics import topics
    for topic, text in sorted(topics.items()):
        if len(text) >= 200:
            yield f"python/manual/{topic}", text


def long_lines(text):
    """The lines of 12 characters and more, by which files are compared."""
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= 12]


def share_of_lines(text, trained):
    """How many of a text's long lines are among those of the training files."""
    lines = long_lines(text)
    return sum(line in trained for line in lines) / max(len(lines), 1)
