"""data/tokens.py and data/tiny/bpe.py: vocabularies, and the tokenizers of other models."""

import json
import os
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import Words, random_gpt2
from test_corpus import DOCUMENTS, write_corpus

import data
from data import text, tokens
from data.errors import UserError
from data.tiny import bpe
from data.weights import TINY

SAMPLE = ("the cat sat on the mat, the cat ate the rat;  that's  what   cats do\n\n"
          "    def f(x):\n        return x + 1 # 12 cats\n") * 3


# ---- learning a vocabulary ----


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


# ---- reading one ----


def test_tokens_equal_those_of_transformers_for_the_shipped_files():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast(str(TINY / "vocab.json"), str(TINY / "merges.txt"))
    ours = data.load_tokenizer("tiny")
    page = text.python_pages()["held-out"][3]
    for sample in (SAMPLE, page, "naïve Ünïcode — ½ 漢字 🙂\t\r\n",
                   "When Mary and John went to the store, John gave a drink to"):
        assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False)
        assert ours.decode(ours.encode(sample)) == sample
    assert ours.decode([ours.bos]) == "<|endoftext|>" and ours.n_vocab == len(theirs)


def test_end_of_text_in_a_document_is_text():
    tokenizer = data.load_tokenizer("tiny")
    assert tokenizer.bos not in tokenizer.encode("a <|endoftext|> b")


def test_written_vocabulary_is_read_back(tmp_path):
    merges = bpe.train_bpe([SAMPLE], 300)
    bpe.write_bpe(merges, tmp_path)
    tokenizer = tokens.load_tokenizer(tmp_path)
    assert tokenizer.n_vocab == 300 and tokenizer.bos == 299
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert len(tokenizer.encode(SAMPLE)) < 0.6 * len(SAMPLE)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 0}', '{"a": "b"}', '{"\\u4e2d": 0}', "{"])
def test_damaged_vocabulary_is_named(tmp_path, content):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(UserError, match="vocab.json"):
        tokens.load_tokenizer(tmp_path)


def test_a_name_of_two_tokens_is_refused_by_name():
    with pytest.raises(UserError, match="Bartholomew"):
        data.load_tokenizer("tiny").single(" Bartholomew")


# ---- tokenizers of other models ----


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's files would be downloaded; set "
    "TIKTOKEN_CACHE_DIR to a folder that has them")
def test_gpt2_text_goes_through_tiktoken(tmp_path, monkeypatch):
    # what an earlier call has cached
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    random_gpt2(tmp_path, n_layer=1, n_head=1, n_embd=4, vocab_size=50257, n_positions=8)
    for name in ("gpt2", tmp_path):
        tokenizer = data.load_tokenizer(name)
        assert tokenizer.encode("When Mary and John went") == [2215, 5335, 290, 1757, 1816]
        assert (tokenizer.bos, tokenizer.n_vocab) == (50256, 50257)


def test_gpt2_text_without_tiktokens_files_or_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError,
                       match="GPT-2 tokenizer could not be downloaded.*TIKTOKEN_CACHE_DIR"):
        data.load_tokenizer("gpt2")


@pytest.fixture
def gemma_folder(tmp_path):
    """config.json and a small tokenizer.json made by the package itself, with Gemma's special
    tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
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
    tokenizer = data.load_tokenizer(gemma_folder)
    ids = tokenizer.encode("cats and dogs")
    assert tokenizer.bos == 2 and 2 not in ids, "BOS is put by rows, once"
    assert tokenizer.decode(ids) == "cats and dogs"
    both = ["cats", "and dogs"]
    assert tokenizer.encode_batch(both) == [tokenizer.encode(text) for text in both]
    assert 2 not in tokenizer.encode("a <bos> in the text"), "<bos> inside a text is ordinary text"
    rows = next(data.rows(write_corpus(gemma_folder, "jsonl"), tokenizer, T=16, n=4))
    assert (rows[:, 0] == 2).all() and rows.max() < tokenizer.n_vocab


def test_n_vocab_counts_what_text_can_give_and_bos(gemma_folder):
    """Special ids may lie beyond the embedding, as one of Gemma 3's does; added tokens may not."""
    tokenizers = pytest.importorskip("tokenizers")
    before = data.load_tokenizer(gemma_folder)
    assert before.n_vocab == 300 and before.special == {0, 1, 2, 3, 300}
    assert before.decode([300]) == "<image>", "which is a token all the same"
    assert before.decode([301]) == "\ufffd" and before.decode([5, 301])[-1] == "\ufffd"
    path = str(gemma_folder / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(path)
    made.add_tokens(["<speaker>"])
    made.save(path)
    after = data.load_tokenizer(gemma_folder)
    assert 301 in after.encode("<speaker> cats") and after.n_vocab == 302
    classes = tokens.fuzzy_classes(after)
    assert (classes[[0, 1, 2, 3, 300]] == -1).all(), "special tokens match nothing"
    assert (classes[4:300] >= 0).all() and classes[301] >= 0


def byte_level(folder, special):
    """tokenizer.json and vocab.json as tokenizers writes them, with the special tokens first."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([SAMPLE], vocab_size=300, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 0}))
    return made


def test_special_tokens_first_are_read_from_tokenizer_json(tmp_path):
    theirs = byte_level(tmp_path, ["<s>", "<pad>"])
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.encode(SAMPLE) == theirs.encode(SAMPLE).ids
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert tokenizer.bos == 0 and tokenizer.special == {0, 1}
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="vocab.json is not a GPT-2 vocabulary"):
        data.load_tokenizer(tmp_path)


def test_a_vocabulary_in_gpt2s_order_with_another_regex_is_read_from_tokenizer_json(tmp_path):
    """As Qwen's and others': digits one by one. Its vocab.json alone would be read with GPT-2's
    regex."""
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 4095}))
    theirs = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"),
                                              str(tmp_path / "merges.txt"))
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert type(data.load_tokenizer(tmp_path)) is tokens.Tokenizer, "GPT-2's own"
    cut = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True),
                                         cut.ByteLevel(add_prefix_space=False)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    text = "in 1024 tokens"
    found = data.load_tokenizer(tmp_path).encode(text)
    assert found == theirs.encode(text).ids
    (tmp_path / "tokenizer.json").unlink()
    assert found != data.load_tokenizer(tmp_path).encode(text), "this text should tell them apart"


def test_a_tokenizer_that_puts_a_space_before_a_text_is_refused(gemma_folder):
    """As Llama's: " Mary" alone would be other tokens than " Mary" in a sentence."""
    tokenizers = pytest.importorskip("tokenizers")
    path = str(gemma_folder / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(path)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(path)
    with pytest.raises(UserError, match="puts a space before a text"):
        data.load_tokenizer(gemma_folder)


def test_added_tokens_of_a_gpt2_are_not_lost(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "bos_token_id": 4095}))
    theirs = transformers.GPT2TokenizerFast(str(TINY / "vocab.json"), str(TINY / "merges.txt"))
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path)
    assert type(data.load_tokenizer(tmp_path)) is tokens.Tokenizer, "no text gives a special token"
    theirs.add_tokens(["<speaker1>"])
    theirs.save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    text = "<speaker1> the cat"
    assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert 4097 in tokenizer.encode(text) and tokenizer.n_vocab == 4098
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<speaker1>": 4096}')
    with pytest.raises(UserError, match="added_tokens.json adds tokens.*tokenizer.json"):
        data.load_tokenizer(tmp_path)


def test_an_id_that_is_no_token_is_decoded_as_such():
    tokenizer = data.load_tokenizer("tiny")
    a, b = tokenizer.encode("a cat")[:2]
    assert tokenizer.decode([a, 5000, b]) == tokenizer.decode([a]) + "\ufffd" + tokenizer.decode([b])


def test_a_model_without_a_tokenizer_is_named(gemma_folder):
    (gemma_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        data.load_tokenizer(gemma_folder)
    (gemma_folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        data.load_tokenizer(gemma_folder)


def test_tokenizer_json_without_the_package_says_what_to_install(gemma_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        data.load_tokenizer(gemma_folder)


# ---- rows of tokens ----


def test_tokens_match_up_to_one_leading_space_and_case():
    words = ["cat", " cat", " Cat", "CAT", "  cat", "\ufffd", " \ufffd", " ", "", "dog", "<bos>"]
    classes = tokens.fuzzy_classes(Words(words)).tolist()
    assert classes[0] == classes[1] == classes[2] == classes[3], "one space and case do not count"
    assert len({classes[i] for i in (0, 4, 5, 6, 7, 8, 9)}) == 7, "two spaces, broken bytes differ"
    assert classes[10] == -1, "BOS matches nothing"


def test_copies_and_what_stands_after_them():
    classes = torch.tensor([[-1, 4, 7, 4, -1, 7, 4]])
    row = torch.zeros((), dtype=torch.long)
    q, k = torch.arange(7)[:, None], torch.arange(-2, 7)[None]
    copies = tokens.is_copy(classes, row, q, k)
    after = tokens.is_after_copy(classes, row, q, k)
    for i, here in enumerate(classes[0].tolist()):
        for at in range(-2, 7):
            def is_copy(k):
                return k >= 0 and here >= 0 and here == classes[0, k]
            assert copies[i, at + 2] == is_copy(at), (i, at)
            assert after[i, at + 2] == (is_copy(at - 1) and classes[0, at] >= 0), (i, at)
    assert not after[3, 4 + 2] and copies[3, 3 + 2], "BOS follows 4, and is no key"


def test_prompts_are_filled_up_with_bos():
    padded, last = tokens.pad_prompts([[9, 1, 2], [9, 3]], bos=9)
    assert padded.tolist() == [[9, 1, 2], [9, 3, 9]] and last.tolist() == [2, 1]
