"""Byte-pair encoding: learn merges from text, and read a vocabulary into a `tiktoken.Encoding`.

GPT-2's algorithm (Sennrich et al. 2016, on bytes): text is split into words by a pattern; a word starts as
its bytes; the most frequent pair of neighbours, counted over all words, becomes a new token; and so on. Files
are GPT-2's own, `vocab.json` and `merges.txt`, so that transformers reads them too.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

from data.common import UserError, atomic, read_json
from data.weights import PUBLISHED, find, find_config, local_folder

# GPT-2's split into words: contractions, letters, digits and other signs, each with the space before it; runs
# of white space.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same for Python's re, which has no \p{L}; used for counting words only, so rare scripts may be split
# otherwise.
COUNTING_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, `bos` (the id that starts every row), `n_vocab`."""

    def __init__(self, encoding):
        self.encoding, self.bos, self.n_vocab = encoding, encoding.eot_token, encoding.n_vocab

    def encode(self, text):
        """Token ids of the text. "<|endoftext|>" inside it is ordinary text, never the special token."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts):
        """`encode` of many texts, on all cores."""
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids):
        """Text of the ids; bytes that are not UTF-8 become the replacement sign."""
        return self.encoding.decode([int(i) for i in ids])

    def single(self, text):
        """The id of a text that must be exactly one token. Raises UserError if it is more."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens in this model's vocabulary, and one is needed; "
                            f"choose another word.")
        return ids[0]


class JsonTokenizer(Tokenizer):
    """The same of a tokenizer.json (Gemma's), read by the package `tokenizers`."""

    def __init__(self, path, bos):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"reading {path} takes one more package: pip install tokenizers.") from None
        try:
            self.encoding = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:      # the package raises nothing narrower
            raise UserError(f"{path} is not a tokenizer ({error}); fetch it again.") from error
        self.encoding.encode_special_tokens = True                      # "<bos>" in a text is ordinary text
        words = self.encoding.get_vocab(with_added_tokens=False)
        self.bos, self.n_vocab = bos, max(max(words.values(), default=0), bos) + 1

    def encode(self, text):
        return self.encoding.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [found.ids for found in self.encoding.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids], skip_special_tokens=False)


def tokenizer(name_or_dir):
    """The tokenizer of a model: vocab.json of its directory ("tiny" ships with the project), else its
    tokenizer.json, else, for GPT-2, tiktoken's.

    Raises UserError if the files are damaged, or have to be downloaded and cannot be.
    """
    folder = local_folder(name_or_dir)
    if folder is None and str(name_or_dir).startswith("gpt2") and name_or_dir in PUBLISHED:
        return _gpt2()
    if folder and (folder / "vocab.json").is_file():
        return Tokenizer(_read(folder / "vocab.json"))
    if name_or_dir == "tiny":
        raise UserError(f"{folder}/vocab.json is missing; restore it from the repository, or run python -m "
                        f"data.make_tiny.")
    config = find_config(name_or_dir)
    raw = read_json(config)
    if path := find(name_or_dir, "tokenizer.json"):
        if type(bos := raw.get("bos_token_id")) is not int or bos < 0:
            raise UserError(f"{config}: bos_token_id should be a token's number, and is {bos!r}.")
        return JsonTokenizer(path, bos)
    if raw.get("model_type") != "gpt2":
        raise UserError(f"--model {name_or_dir} has no tokenizer.json; fetch it into that folder.")
    return _gpt2()


def check_fits(tokenizer, model, name):
    """Raise UserError if the tokenizer has tokens for which the model has no embedding."""
    if tokenizer.n_vocab > model.config.d_vocab:
        raise UserError(f"--model {name} has {model.config.d_vocab} tokens and its tokenizer "
                        f"{tokenizer.n_vocab}; put the model's own vocab.json beside its weights.")


def _gpt2():
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:      # tiktoken passes on whatever its HTTP library raises
        raise UserError(f"the GPT-2 tokenizer could not be downloaded ({type(error).__name__}); connect to "
                        f"the internet once, or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's "
                        "files.") from error


def _read(path):
    """vocab.json -> tiktoken.Encoding. A token's id is its rank: GPT-2's ids are in the order in which merges
    were learnt."""
    to_byte = {sign: byte for byte, sign in _byte_signs().items()}
    try:
        ranks = {bytes(to_byte[sign] for sign in token): rank
                 for token, rank in read_json(path).items() if token != END_OF_TEXT}
        in_order = sorted(ranks.values()) == list(range(len(ranks)))
        if not in_order or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError
        return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a GPT-2 vocabulary (256 bytes and their merges, numbered in order); "
                        f"fetch it again.") from error


def _byte_signs():
    """GPT-2's printable sign for every byte, in the order of its ids: printable bytes, then stand-ins."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def train_bpe(texts, n_vocab):
    """Learn a vocabulary of n_vocab tokens (256 bytes, merges, end of text) -> list of merged pairs of byte
    strings.

    Ties are broken by the pair itself, so that the result depends on the text alone.
    """
    counts = Counter()
    for text in texts:
        counts.update(re.findall(COUNTING_PATTERN, text))
    words = [[bytes([b]) for b in word.encode("utf8", "replace")] for word in counts]
    times = list(counts.values())
    pair_count, where = Counter(), defaultdict(set)     # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += times[i]
            where[pair].add(i)
    queue = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(queue)
    merges, known = [], set()
    while len(merges) < n_vocab - 257:
        if not queue:
            raise UserError(f"this text has only {len(merges)} pairs to merge, too few for {n_vocab} tokens; "
                            f"train on more text.")
        count, best = heapq.heappop(queue)
        if -count != pair_count[best]:
            continue  # counted before a later merge changed it; its new count is queued too
        if best[0] + best[1] not in known:              # two ways to the same token need one entry
            merges.append(best)
            known.add(best[0] + best[1])
        changed = set()
        for i in where.pop(best):
            changed |= _merge_in_word(words, i, best, times[i], pair_count, where)
        for pair in changed:
            if pair_count[pair] > 0 and pair != best:
                heapq.heappush(queue, (-pair_count[pair], pair))
    return merges


def _merge_in_word(words, i, best, times, pair_count, where):
    """Replace the pair in word i and bring the counts up to date -> the pairs whose count may have changed.
    """
    old, new, j = words[i], [], 0
    while j < len(old):
        step = 2 if tuple(old[j:j + 2]) == best else 1
        new.append(b"".join(old[j:j + step]))
        j += step
    before, after = list(zip(old, old[1:])), list(zip(new, new[1:]))
    for pair in before:
        pair_count[pair] -= times
    for pair in after:
        pair_count[pair] += times
        where[pair].add(i)
    words[i] = new
    return {*before, *after}


def write_bpe(merges, folder):
    """GPT-2's two files: vocab.json (token -> id) and merges.txt (one pair a line, in order)."""
    signs = _byte_signs()
    sign = lambda token: "".join(signs[byte] for byte in token)
    tokens = [*signs.values(), *(sign(a + b) for a, b in merges), END_OF_TEXT]
    with atomic(Path(folder) / "vocab.json") as temporary:
        temporary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
                             encoding="utf8")
    with atomic(Path(folder) / "merges.txt") as temporary:
        temporary.write_text("#version: 0.2\n" + "".join(f"{sign(a)} {sign(b)}\n" for a, b in merges),
                             encoding="utf8")
