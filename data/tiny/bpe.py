"""Byte-pair encoding: learn a vocabulary from text (Sennrich et al. 2016, on bytes, as GPT-2 does).

Text is split into words by a pattern. A word starts as its bytes; the most frequent pair of
neighbours, counted over all words, becomes a new token; and so on. The files written are GPT-2's
own, `vocab.json` and `merges.txt`, so that transformers reads them too.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from data.errors import UserError
from data.files import write_text
from data.tokens import END_OF_TEXT, byte_signs

# GPT-2's split for Python's re, which has no \p{L}. It is used for counting words only, so rare
# scripts may be split otherwise.
COUNTING_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+"
                    r"|\s+(?!\S)|\s+")


def train_bpe(texts, n_vocab):
    """Learn a vocabulary of n_vocab tokens (256 bytes, merges, end of text) -> list of merged pairs
    of byte strings.

    Ties are broken by the pair itself, so that the result depends on the text alone.
    """
    n_of_word = Counter()
    for text in texts:
        n_of_word.update(re.findall(COUNTING_PATTERN, text))
    words = [[bytes([b]) for b in word.encode("utf8", "replace")] for word in n_of_word]
    times = list(n_of_word.values())

    pair_count = Counter()              # how often a pair of neighbours occurs
    where = defaultdict(set)            # and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += times[i]
            where[pair].add(i)

    queue = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(queue)
    merges = []
    known = set()
    while len(merges) < n_vocab - 257:
        if not queue:
            raise UserError(f"this text has only {len(merges)} pairs to merge, too few for "
                            f"{n_vocab} tokens; train on more text.")
        count, best = heapq.heappop(queue)
        if -count != pair_count[best]:
            continue                    # a later merge changed it; its new count is queued too
        if best[0] + best[1] not in known:              # two ways to the same token need one entry
            merges.append(best)
            known.add(best[0] + best[1])
        changed = set()
        for i in where.pop(best):
            changed |= merge_in_word(words, i, best, times[i], pair_count, where)
        for pair in changed:
            if pair_count[pair] > 0 and pair != best:
                heapq.heappush(queue, (-pair_count[pair], pair))
    return merges


def merge_in_word(words, i, best, times, pair_count, where):
    """Replace the pair `best` in word i and bring the counts up to date -> the pairs whose count
    may have changed."""
    old = words[i]
    new = []
    j = 0
    while j < len(old):
        n_tokens = 2 if tuple(old[j:j + 2]) == best else 1
        new.append(b"".join(old[j:j + n_tokens]))
        j += n_tokens
    pairs_before = list(zip(old, old[1:]))
    pairs_after = list(zip(new, new[1:]))
    for pair in pairs_before:
        pair_count[pair] -= times
    for pair in pairs_after:
        pair_count[pair] += times
        where[pair].add(i)
    words[i] = new
    return {*pairs_before, *pairs_after}


def write_bpe(merges, folder):
    """GPT-2's two files: vocab.json (token -> id) and merges.txt (one pair a line, in order)."""
    signs = byte_signs()

    def written(token):
        return "".join(signs[byte] for byte in token)

    tokens = [*signs.values(), *(written(a + b) for a, b in merges), END_OF_TEXT]
    ids = {token: i for i, token in enumerate(tokens)}
    write_text(Path(folder) / "vocab.json", json.dumps(ids, ensure_ascii=False))
    lines = [f"{written(a)} {written(b)}\n" for a, b in merges]
    write_text(Path(folder) / "merges.txt", "#version: 0.2\n" + "".join(lines))
