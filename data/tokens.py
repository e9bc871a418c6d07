"""Tokenizers: text to token ids and back, for GPT-2 and Gemma, and what is asked of tokens.

A model's tokenizer is read from its directory: GPT-2's `vocab.json` into a `tiktoken.Encoding`, or
a `tokenizer.json`, Gemma's or one with added tokens, by the package `tokenizers`.
"""

import tiktoken
import torch

from data.errors import UserError
from data.files import read_json
from data.hub import cached
from data.weights import PUBLISHED, find, find_config, local_folder

# GPT-2's split into words: contractions, letters, digits and other signs, each with the space
# before it; runs of white space.
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"          # the replacement sign
LONGEST_PIECE = 100_000     # characters that tiktoken gets at once: a million blanks are too
                            # much for its stack


class Tokenizer:
    """GPT-2's: `encode(text) -> ids`, `decode(ids) -> text`, `bos` (the id that starts every row),
    `n_vocab` (BOS and all ids that `encode` can give are below it), `special` (ids that it cannot
    give, BOS among them)."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.bos = encoding.eot_token
        self.n_vocab = encoding.n_vocab
        self.special = {self.bos}

    def encode(self, text):
        """Token ids of the text. "<|endoftext|>" inside it is ordinary text, no special token."""
        return [i for piece in pieces(text) for i in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts):
        """`encode` of many texts, on all cores."""
        if max(map(len, texts), default=0) > LONGEST_PIECE:
            return [self.encode(text) for text in texts]
        return self.encoding.encode_ordinary_batch(texts)

    def decode(self, ids):
        """Text of the ids. Bytes that are not UTF-8 become the replacement sign, and so does an id
        that is no token."""
        ids = [int(i) for i in ids]
        try:
            return self.encoding.decode(ids)
        except KeyError:
            return "".join(self.encoding.decode([i]) if 0 <= i < self.n_vocab else UNKNOWN
                           for i in ids)

    def single(self, text, flag=""):
        """The id of a text that must be exactly one token. Raises UserError if it is not. flag: the
        option that asked for it."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"{flag} {text!r} is {len(ids)} tokens of this model, and one is "
                            f"needed; choose another word, and mind the space before it.".strip())
        return ids[0]


def pieces(text):                                               # -> str, str, ...
    """A long text in pieces, cut where a word ends, which changes no token. (A run of blanks or of
    signs longer than a piece is cut where it is.)"""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = start + LONGEST_PIECE
        while end > start and (text[end] not in " \n" or text[end - 1].isspace()):
            end -= 1
        if end == start:
            end = start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


class JsonTokenizer(Tokenizer):
    """The same of a tokenizer.json (Gemma's), read by the package `tokenizers`."""

    def __init__(self, path, bos):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"reading {path} takes one more package: pip install tokenizers."
                            ) from None
        try:
            self.encoding = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:      # the package raises nothing narrower
            raise UserError(f"{path} is not a tokenizer ({error}); fetch it again.") from error
        self.encoding.encode_special_tokens = True              # "<bos>" in a text is ordinary text
        if self.decode(self.encode(" a")) == "a":
            raise UserError(f"{path} puts a space before a text, or takes it away, so that a word "
                            f"alone is not the word in a sentence; such tokenizers are not "
                            f"supported.")
        added = self.encoding.get_added_tokens_decoder()
        self.bos = bos
        self.special = {i for i, token in added.items() if token.special} | {bos}
        ids = set(self.encoding.get_vocab(with_added_tokens=True).values())
        # Special ids may lie beyond the embedding: in Gemma 3 one for images does.
        self.n_vocab = max((ids - self.special) | {bos}) + 1

    def encode(self, text):
        return self.encoding.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        encoded = self.encoding.encode_batch(texts, add_special_tokens=False)
        return [text.ids for text in encoded]

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if all(self.encoding.id_to_token(i) is not None for i in ids):
            return self.encoding.decode(ids, skip_special_tokens=False)
        if len(ids) == 1:
            return UNKNOWN
        return "".join(self.decode([i]) for i in ids)


# ---- finding a model's tokenizer ----


def load_tokenizer(name_or_dir):
    """The tokenizer of a model: its vocab.json if that says all, else its tokenizer.json, else, for
    GPT-2, tiktoken's.

    Raises UserError if the files are damaged, or have to be downloaded and cannot be.
    """
    is_gpt2 = name_or_dir in PUBLISHED and str(name_or_dir).startswith("gpt2")
    if is_gpt2 and local_folder(name_or_dir) is None:
        vocabulary = cached(PUBLISHED[name_or_dir], "vocab.json")
        return Tokenizer(read_vocabulary(vocabulary)) if vocabulary else download_gpt2()
    vocabulary = find(name_or_dir, "vocab.json", optional=True)
    if vocabulary and says_all(vocabulary, name_or_dir):
        return Tokenizer(read_vocabulary(vocabulary))
    config_path = find_config(name_or_dir)
    config = read_json(config_path)
    if name_or_dir == "tiny":
        raise UserError(f"{config_path.with_name('vocab.json')} is missing; restore it from the "
                        f"repository, or run python -m data.tiny.make.")
    if path := find(name_or_dir, "tokenizer.json", optional=True):
        bos = config.get("bos_token_id")
        if type(bos) is not int or bos < 0:
            raise UserError(f"{config_path}: bos_token_id should be a token's number, and is "
                            f"{bos!r}.")
        return JsonTokenizer(path, bos)
    if config.get("model_type") != "gpt2":
        raise UserError(f"--model {name_or_dir} has no tokenizer.json; fetch it into that folder.")
    return download_gpt2()


def says_all(vocabulary, name_or_dir):
    """Whether vocab.json is all that there is to a model's tokenizer: not if a tokenizer.json
    beside it adds tokens that text can give, or cuts text in another way, or is there and
    vocab.json is of another kind than GPT-2's.

    Raises UserError for added tokens that stand in added_tokens.json alone.
    """
    path = find(name_or_dir, "tokenizer.json", optional=True)
    if path is None:
        if added := find(name_or_dir, "added_tokens.json", optional=True):
            raise UserError(f"{added} adds tokens to vocab.json, and is not read; write a "
                            f"tokenizer.json there, as transformers' fast tokenizers do.")
        return True
    try:
        read_vocabulary(vocabulary)
    except UserError:
        return False
    settings = read_json(path)
    added = settings.get("added_tokens") or []
    return splits_as_gpt2(settings) and all(isinstance(one, dict) and one.get("special")
                                            for one in added)


def splits_as_gpt2(settings):
    """Whether a tokenizer.json cuts text into words as GPT-2 does, before it merges bytes. Others
    have a regex of their own."""
    cut = settings.get("pre_tokenizer")
    return (isinstance(cut, dict) and cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
            and not cut.get("add_prefix_space", True))


def download_gpt2():
    """GPT-2's own tokenizer, which tiktoken fetches once."""
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:      # tiktoken passes on whatever its HTTP library raises
        raise UserError(f"the GPT-2 tokenizer could not be downloaded ({type(error).__name__}); "
                        f"connect to the internet once, or set TIKTOKEN_CACHE_DIR to a folder with "
                        f"tiktoken's files.") from error


def read_vocabulary(path):
    """vocab.json -> tiktoken.Encoding. A token's id is its rank: GPT-2's ids are in the order in
    which merges were learnt."""
    byte_of_sign = {sign: byte for byte, sign in byte_signs().items()}
    try:
        ranks = {}
        for token, rank in read_json(path).items():
            if token != END_OF_TEXT:
                ranks[bytes(byte_of_sign[sign] for sign in token)] = rank
        numbered_in_order = sorted(ranks.values()) == list(range(len(ranks)))
        bytes_come_first = all(ranks[bytes([byte])] < 256 for byte in range(256))
        if not numbered_in_order or not bytes_come_first:
            raise ValueError
        return tiktoken.Encoding("bpe", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a GPT-2 vocabulary (256 bytes and their merges, numbered "
                        "in order); fetch it again.") from error


def byte_signs():
    """GPT-2's printable sign for every byte, in the order of its ids: printable bytes stand for
    themselves, the others have stand-ins from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable}
    return signs | {byte: chr(256 + i) for i, byte in enumerate(others)}


def set_n_tokens(model, tokenizer, name):
    """Let a model know which rows of its embedding are tokens: those below n_vocab. Raises
    UserError if the tokenizer has tokens for which the model has no embedding."""
    if tokenizer.n_vocab > model.config.d_vocab:
        raise UserError(f"--model {name} has {model.config.d_vocab} tokens and its tokenizer "
                        f"{tokenizer.n_vocab}; put the model's own vocab.json beside its weights.")
    model.n_tokens = tokenizer.n_vocab


# ---- rows of tokens ----


def pad_prompts(prompts, bos):                          # list of lists of ids -> (N,T), (N,)
    """Prompts of different lengths as rows, filled up with BOS, and where each one's last token
    stands. What comes after a prompt's end cannot change anything before it."""
    tokens = torch.full((len(prompts), max(map(len, prompts))), bos)
    for row, ids in zip(tokens, prompts):
        row[:len(ids)] = torch.tensor(ids)
    return tokens, torch.tensor([len(ids) - 1 for ids in prompts])


def fuzzy_classes(tokenizer):                                   # -> (n_vocab,)
    """A class for every token: tokens that differ in one leading space or in case share one.

    BOS and the other special tokens, which no text gives, have class -1. A token that is no text by
    itself, such as a part of a character, has a class of its own.
    """
    class_of_text = {}
    classes = []
    for i in range(tokenizer.n_vocab):
        text = tokenizer.decode([i])
        if text[:1] == " " and len(text) > 1:
            text = text[1:]
        key = i if "\ufffd" in text else text.lower()
        if i in tokenizer.special:
            classes.append(-1)
        else:
            classes.append(class_of_text.setdefault(key, len(class_of_text)))
    return torch.tensor(classes)


def is_copy(classes, row, q, k):                                # (R,T), (n,) x 3 -> (n,) bool
    """Whether the tokens at q and k of a row are copies: of one class (`fuzzy_classes`).

    Never for BOS, of class -1; it stands at position 0 and between documents. A k below 0, where
    there is no token, is taken as 0: no copy. Any shapes that broadcast.
    """
    own = classes[row, q]
    return (own >= 0) & (own == classes[row, k.clamp_min(0)])


def is_after_copy(classes, row, q, k):                          # (R,T), (n,) x 3 -> (n,) bool
    """Whether the token at k of a row stands right after a copy of that at q, and is not BOS: where
    an induction head looks from q. Never for a k of 0 or less. Any shapes that broadcast."""
    return is_copy(classes, row, q, k - 1) & (classes[row, k.clamp_min(0)] >= 0)


def text_around(row, q, tokenizer, n_before=10, n_after=3):     # (T,) -> str
    """Position q of a row with the text around it, its token in angle brackets."""
    def decode(part):
        return tokenizer.decode(part).replace("\n", "\\n")

    ids = row.tolist()
    before = decode(ids[max(q - n_before, 0):q])
    here = decode(ids[q:q + 1])
    after = decode(ids[q + 1:q + 1 + n_after])
    return f"{before}\u27e8{here}\u27e9{after}"
