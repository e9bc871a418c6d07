"""Documents from outside: a text file, a folder of them, or the C4 corpus, streamed.

    book.txt        pages of some 3000 characters, cut at line ends: each page is a document (a line
                    is cut too where it has more than 12,000 bytes)
    posts.jsonl     a JSON object a line, its "text" a document; so .json.gz (C4) and .jsonl.gz
    folder/         every such file in it, a document from each in turn, in order of name: so the
                    first rows are of all of them, and not of one book

Nothing is skipped in silence: a line that is not such an object, or text that is not UTF-8, is an
error that names the place. A document is held out if a hash of its text says so, so that the two
splits are the same on every machine, and a document that occurs twice is never in both.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import os
import zlib
from collections import deque
from pathlib import Path

from data import hub
from data.errors import UserError
from data.files import parse_json

SUFFIXES = (".txt", ".jsonl", ".json.gz", ".jsonl.gz", ".txt.gz")
C4 = "datasets/allenai/c4/en/c4-{}.{:05d}-of-{:05d}.json.gz"     # on the Hugging Face hub
PAGE = 3000                 # characters
LONGEST_LINE = 4 * PAGE     # bytes; one without end would be one page, and in one split
HELD_OUT_SHARE = 0.05       # of the documents


def documents(corpus, split, held_out_share=HELD_OUT_SHARE):
    """The documents of `corpus` ("c4", a file or a folder) in `split` ("train" or "held-out").

    C4 has a split of its own, published as validation. Raises UserError for a corpus that is not
    there, holds no file that can be read, or is damaged.
    """
    if corpus == "c4":
        name, n_files = ("train", 1024) if split == "train" else ("validation", 8)
        for number in range(n_files):
            path = C4.format(name, number, n_files)
            with contextlib.closing(hub.Stream(path)) as raw:
                yield from documents_in(raw, path)
        return
    for document in in_turn(files_of(corpus)):
        if is_held_out(document, held_out_share) == (split == "held-out"):
            yield document


def in_turn(paths, n_open=64):
    """A document of each file in turn, until all have ended. No more than n_open files are open:
    the next takes the place of one that has ended."""
    waiting = iter(paths)
    files = deque(read_documents(path) for path in itertools.islice(waiting, n_open))
    while files:
        file = files.popleft()
        document = next(file, None)
        if document is None:
            files.extend(read_documents(path) for path in itertools.islice(waiting, 1))
        else:
            yield document
            files.append(file)


def is_held_out(document, share):
    """Whether a document is one of those held out, by a hash of its text. With a larger share they
    are the same and more."""
    digest = hashlib.sha256(document.encode("utf8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") < int(2**32 * share)


def files_of(corpus):
    """The paths of the files that `corpus` names."""
    path = Path(corpus)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    readable = [str(file) for file in files if is_readable(file.name)]
    if not path.exists():
        raise UserError(f"--corpus {corpus} is not there; give python, c4, a file or a folder.")
    if not readable:
        raise UserError(f"--corpus {corpus} is not, or does not hold, a file of "
                        f"{' '.join(SUFFIXES)}.")
    if len(readable) < len(files):
        print(f"reading {len(readable)} of the {len(files)} files in {corpus}: those of "
              f"{' '.join(SUFFIXES)}")
    return readable


def is_readable(name):
    """Whether a file is of a kind that is read, by its name; capitals are as good."""
    return name.lower().endswith(SUFFIXES)


def read_documents(path):
    """The documents of one file."""
    try:
        with open(path, "rb") as raw:
            yield from documents_in(raw, path)
    except OSError as error:
        raise UserError(f"--corpus {path} cannot be read ({error.strerror or error}).") from error


def documents_in(raw, path):
    """The documents in a file of bytes; its kind is seen by its name."""
    is_json = ".json" in os.path.basename(path).lower()
    file = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
    line_number = 0
    try:
        if is_json:
            for line_number, line in enumerate(lines_of(file, path), start=1):
                if line.strip():
                    yield text_of_json(line)
        else:
            yield from pages(lines_of(file, path, LONGEST_LINE))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--corpus {path} is damaged or cut short ({error}); fetch it again."
                        ) from error
    except ValueError as error:
        raise UserError(f"--corpus {path}, line {line_number}: {error}; each line should be a JSON "
                        f"object with a string \"text\".") from error


def lines_of(file, path, longest=-1):
    """The lines of a file of bytes as text; a line of more than `longest` bytes in several pieces.

    The file is UTF-8; a byte order mark before it is left out, and line ends are all made "\\n".
    Raises UserError for a byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf8")()        # keeps a character that is cut in two
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    n_read = 0                                              # bytes
    is_first = True
    while piece := file.readline(longest):
        waiting, _ = decoder.getstate()
        try:
            text = newlines.decode(decoder.decode(piece))
        except UnicodeDecodeError as error:
            raise not_utf8(path, n_read - len(waiting) + error.start) from error
        n_read += len(piece)
        yield text.removeprefix("\ufeff") if is_first else text
        is_first = False
    waiting, _ = decoder.getstate()
    if waiting:
        raise not_utf8(path, n_read - len(waiting))
    if last := newlines.decode("", final=True):             # a carriage return that waited
        yield last


def not_utf8(path, place):
    """The UserError for a byte that is not UTF-8; `place` is how many bytes are before it."""
    return UserError(f"--corpus {path} is not UTF-8 text: byte {place:,} (the first is 0; of "
                     f"what is unpacked, if it is packed) belongs to no character; convert it, "
                     f"with iconv for instance.")


def text_of_json(line):
    """The document in a line of JSON. Raises ValueError if there is none."""
    value = parse_json(line)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError("there is no such text")
    return value["text"]


def pages(lines):
    """Lines joined to pages of about PAGE characters."""
    page = []
    size = 0
    for line in lines:
        page.append(line)
        size += len(line)
        if size >= PAGE:
            yield "".join(page)
            page = []
            size = 0
    if page:
        yield "".join(page)
