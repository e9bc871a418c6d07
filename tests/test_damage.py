"""Files that are damaged: several hundred of them, and every one gives a UserError of one sentence
or a whole result; never another exception, never a hang.

Damage is of three kinds. To bytes: files cut short, bits flipped, stretches overwritten, bytes put
in. To meaning: JSON in which one value is another one or is gone, also inside the header of a
safetensors file, with lengths that are right. To archives: npz files that hold other arrays than
they should.
"""

import copy
import gzip
import io
import json
import shutil
import signal
import zipfile

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

import data
import model as models
import sae as S
import train as T
from data.errors import UserError
from data.files import claim
from data.hf_config import read_config
from data.weights import TINY

SECONDS = 20            # what takes longer hangs: each of these takes a few milliseconds


class Hangs(BaseException):
    """Not an Exception, which a loader might take for damage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind of file that is read here, small and whole."""
    folder, random = tmp_path_factory.mktemp("whole"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(
        json.dumps({
            "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 50,
            "n_positions": 16, "n_inner": None, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new"
        }))
    gpt2 = models.GPT2(models.GPT2Config(2, 2, 8, 32, 50, 16))
    save_file({name: p.detach() for name, p in gpt2.named_parameters()},
              folder / "model" / "model.safetensors")

    (folder / "gemma").mkdir()
    (folder / "gemma" / "config.json").write_text(
        json.dumps({
            "model_type": "gemma2", "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "hidden_size": 8, "head_dim": 4, "intermediate_size": 12,
            "vocab_size": 50, "rms_norm_eps": 1e-6, "max_position_embeddings": 16,
            "sliding_window": 4, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 50.0,
            "layer_types": ["sliding_attention", "full_attention"
                            ], "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
        }))
    _, settings, layout = read_config(folder / "gemma" / "config.json")
    shapes = {f"model.{name}": p.shape[::-1] if name.endswith(layout.transposed) else p.shape
              for name, p in models.Gemma(models.GemmaConfig(**settings)).named_parameters()}
    tensors = {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    shards = {"one.safetensors": list(tensors)[:7], "two.safetensors": list(tensors)[7:]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / "gemma" / shard)
    (folder / "gemma" / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": 1}, "weight_map": {name: shard for shard, names in shards.items()
                                                      for name in names}}))

    (folder / "vocabulary").mkdir()
    shutil.copy(TINY / "vocab.json", folder / "vocabulary")
    shutil.copy(TINY / "config.json", folder / "vocabulary")

    sae = S.SAE(8, 24, random)
    tensors = {name: t.detach().contiguous() for name, t in sae.state_dict().items()}
    sae.save(folder / "own" / "sae.safetensors")
    data.sae_files.write_saelens(tensors, folder / "saelens", "tiny", 0, 16)
    (folder / "saelens" / "cfg.json").write_text(json.dumps(
        json.loads((folder / "saelens" / "cfg.json").read_text())
        | {"normalize_activations": "expected_average_only_in"}))
    (folder / "saelens" / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    (folder / "gemma-scope").mkdir()
    arrays = {name: t.numpy() for name, t in tensors.items()}
    np.savez(folder / "gemma-scope" / "params.npz", **arrays)
    np.savez_compressed(folder / "gemma-scope" / "small.npz", **arrays)
    (folder / "kissane").mkdir()
    torch.save({name: t
                for name, t in tensors.items() if name != "threshold"}, folder / "kissane" / "x.pt")
    (folder / "kissane" / "x_cfg.json").write_text(
        json.dumps({"act_size": 8, "dict_size": 24, "seed": 49}))

    texts = [
        f"Page {i} of a long book: " + " ".join(f"word{i * j}" for j in range(60))
        for i in range(60)
    ]
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    (folder / "c4.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "posts.jsonl").write_text(lines)
    (folder / "book.txt").write_text("\n".join(texts))

    write_tokenizer(folder / "tokenizer", texts)
    (folder / "of").mkdir()
    claim(folder / "of", "tiny", "0123456789abcdef")

    learner = T.make_learner((8,), 24, 0.1, 1e-3)
    learner.l0 = 24.0
    T.train_step(learner, (torch.randn(64, 8, generator=random),), 0, CHECKPOINTED)
    (folder / "run").mkdir()
    T.save(folder / "run", CHECKPOINTED, 1, {0: learner})
    return folder


def write_tokenizer(folder, texts):
    """A tokenizer.json with an added token and a special one, and the config.json beside it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
    made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<bos>", "<unk>"], show_progress=False))
    made.add_tokens(["<speaker>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "bos_token_id": 0}))


CHECKPOINTED = T.TrainConfig(n_tokens=10_000, batch_size=64)


# ---- what is done with each file; each returns what tells a whole result from half of one ----


def load_model(path):
    model = models.load_model(path.parent)
    assert not any(p.is_meta for p in model.parameters()), "a parameter was never filled"
    logits, cache = model(torch.tensor([[0, 1, 2]]), keep=(0,))
    assert logits.shape == (1, 3, model.config.d_vocab) and cache[0].z_cat.shape[:2] == (1, 3)


def load_tokenizer(path):
    tokenizer = data.load_tokenizer(path.parent)
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


def load_other_tokenizer(path):
    tokenizer = data.load_tokenizer(path.parent)
    ids = tokenizer.encode("Page 7 of a <speaker> long book")
    assert all(0 <= i < tokenizer.n_vocab for i in [*ids, tokenizer.bos])
    assert isinstance(tokenizer.decode([*ids, 10**6]), str)


def load_claim(path):
    claim(path.parent, "tiny", "0123456789abcdef")


def load_sae(path):
    sae = S.SAE.load(path.parent if path.parent.name == "saelens" else path)
    assert sae(torch.zeros(3, sae.d_in)).isfinite().all()
    return {name: tensor.tolist() for name, tensor in sae.state_dict().items()}


def load_kissane(path):
    load_sae(path.parent / "x.pt")


def load_text(path):
    found = list(data.rows(str(path), data.load_tokenizer("tiny"), "train", 32, 64))
    return torch.cat(found).tolist()


def load_checkpoint(path):
    learners = {0: T.make_learner((8,), 24, 0.1, 1e-3)}
    step = T.resume(learners, CHECKPOINTED, path.parent)
    T.train_step(learners[0], (torch.zeros(64, 8),), step, CHECKPOINTED)


BYTES = {
    "model/config.json": load_model, "model/model.safetensors": load_model,
    "gemma/config.json": load_model, "gemma/one.safetensors": load_model,
    "gemma/model.safetensors.index.json": load_model, "vocabulary/vocab.json": load_tokenizer,
    "own/sae.safetensors": load_sae, "saelens/cfg.json": load_sae,
    "saelens/sae_weights.safetensors": load_sae, "gemma-scope/params.npz": load_sae,
    "gemma-scope/small.npz": load_sae, "kissane/x.pt": load_sae, "kissane/x_cfg.json": load_kissane,
    "saelens/activation_scaler.json": load_sae, "tokenizer/tokenizer.json": load_other_tokenizer,
    "tokenizer/config.json": load_other_tokenizer, "of/model.json": load_claim,
    "c4.json.gz": load_text, "posts.jsonl": load_text, "book.txt": load_text, "run/checkpoint.safetensors": load_checkpoint
}


def damaged_bytes(whole, random, n):
    """n ways to damage a file's bytes, the beginning more often than the rest: it holds the
    lengths."""
    yield b""
    yield b"<html>404</html>"
    for kind in range(n - 2):
        at = int(random.integers(min(len(whole), 200) if random.random() < 0.5 else len(whole)))
        length = int(random.integers(1, 40))
        if kind % 4 == 0:
            yield whole[:at]
        elif kind % 4 == 1:
            yield whole[:at] + bytes([whole[at] ^ (1 << int(random.integers(8)))]) + whole[at + 1:]
        elif kind % 4 == 2:
            yield whole[:at] + random.bytes(length) + whole[at + length:]
        else:
            yield whole[:at] + random.bytes(length) + whole[at:]


WRONG = [
    None, True, 0, -1, 1, 10**6, 1.5, 1e-300, 1e300, 2**31, 2**62, 10**40,
    float("nan"), "", "gelu", "\ud800", [], [[]], {}, {"a": 1}, "../../etc/passwd", [0, 2**62],
    ["F8_E4M3"], "F8_E4M3", "I64", "BOOL"
]


def damaged_values(value, random, n):
    """n copies of a JSON value in which something, anywhere in it, is another value or is gone."""
    def places(one, path=()):
        items = one.items() if isinstance(one,
                                          dict) else enumerate(one) if isinstance(one, list) else ()
        for key, inner in items:
            yield path + (key,)
            yield from places(inner, path + (key,))

    everywhere = list(places(value))
    for i in range(n):
        other = copy.deepcopy(value)
        *path, last = everywhere[int(random.integers(len(everywhere)))]
        at = other
        for key in path:
            at = at[key]
        if i % 5 == 0:
            del at[last]
        else:
            at[last] = WRONG[int(random.integers(len(WRONG)))]
        yield other


def outcome(load, path):
    """("refused", message), or ("whole", result); anything else is the failure that is looked
    for."""
    def hangs(number, frame):
        raise Hangs(f"{path.name} was not read in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        return "whole", load(path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith("."), f"not one sentence: {error}"
        return "refused", str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(load, path, contents, may_be_whole=lambda result: True):
    """Write each of `contents` to `path`, load it, and put the whole file back -> how many were
    refused."""
    original, refused = path.read_bytes(), 0
    try:
        for number, content in enumerate(contents):
            path.write_bytes(content)
            try:
                kind, result = outcome(load, path)
            except Exception as error:
                raise AssertionError(
                    f"{path.name}, damage {number}: {type(error).__name__}: {error}; the "
                    f"file begins {content[:300]!r}") from error
            refused += kind == "refused"
            assert kind == "refused" or may_be_whole(result), \
                f"{path.name}, damage {number}: a part was returned"
    finally:
        path.write_bytes(original)
    return refused


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes(folder, name):
    """24 of each of 21 kinds of file. What is checked by a sum (gz, npz) comes back whole or not at
    all."""
    path, load = folder / name, BYTES[name]
    whole = load(path)
    random = np.random.default_rng(list(name.encode()))
    summed = name.endswith((".gz", ".npz"))
    same = (lambda result: result == whole) if summed else lambda result: True
    refused = check(load, path, damaged_bytes(path.read_bytes(), random, 24), same)
    assert refused >= 8, "hardly any damage was noticed: is this file read at all?"


@pytest.mark.parametrize("name", [name for name in BYTES if name.endswith(".json")])
def test_damaged_json(folder, name):
    path, random = folder / name, np.random.default_rng(list(name.encode()))
    values = [*damaged_values(json.loads(path.read_text()), random, 40), [], "x", None]
    check(BYTES[name], path, [json.dumps(value).encode() for value in values])
    assert check(BYTES[name], path, [b'{"n_layer": ' + b"[" * 100_000]) == 1


@pytest.mark.parametrize("name", [name for name in BYTES if name.endswith(".safetensors")])
def test_damaged_safetensors_header(folder, name):
    """A header whose length is right and whose JSON says something else: a tensor's name, type,
    shape or place, or the metadata."""
    path, random = folder / name, np.random.default_rng(list(name.encode()))
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    damaged = damaged_values(json.loads(whole[8:8 + n]), random, 40)
    headers = [json.dumps(header).encode() for header in damaged]
    refused = check(BYTES[name], path,
                    [len(h).to_bytes(8, "little") + h + whole[8 + n:] for h in headers])
    assert refused >= 20


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [name for name in BYTES if name.endswith(".safetensors")])
def test_numbers_that_are_not_finite(folder, name, number):
    """One of them, in a file that is whole otherwise, in each of its tensors."""
    path = folder / name
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    contents = []
    for key in [key for key, tensor in tensors.items() if tensor.is_floating_point()]:
        other = tensors[key].clone()
        other.view(-1)[-1] = number
        contents.append(save(tensors | {key: other}, metadata))
    assert check(BYTES[name], path, contents) == len(contents)


def test_archives_of_other_arrays(folder):
    path = folder / "gemma-scope" / "params.npz"
    with np.load(path) as archive:
        arrays = dict(archive)

    def archive_of(**others):
        file = io.BytesIO()
        np.savez(file, **{name: a for name, a in (arrays | others).items() if a is not None})
        return file.getvalue()

    def raw(**members):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        return file.getvalue()

    header = lambda text: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    encrypted = bytearray(archive_of())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    contents = [
        archive_of(W_enc=None),
        archive_of(extra=np.zeros(3)),
        archive_of(b_enc=np.zeros(23, np.float32)),
        archive_of(W_dec=np.zeros((8, 24), np.float32)),
        archive_of(W_dec=np.float32(1)),
        archive_of(b_dec=np.array(["a"] * 8)),
        archive_of(b_dec=np.array([{}] * 8, dtype=object)),
        archive_of(b_dec=np.full(8, np.nan, np.float32)),
        archive_of(threshold=np.full(24, np.inf)),
        archive_of(b_dec=np.zeros(8, complex)),
        archive_of(b_dec=np.zeros(8, int)),
        archive_of(b_dec=np.zeros(8, "datetime64[s]")),
        archive_of(W_enc=np.zeros((0, 24), np.float32)),
        raw(W_enc=b""),
        raw(W_enc=b"\x93NUMPY"),
        raw(W_enc=header(b"{'descr': '<f4',")),
        raw(W_enc=header(
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n")),
        raw(W_enc=header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2), }\n")),
        raw(W_enc=header(b"__import__('os').system('echo run')\n")),
        raw(W_enc=header(b"(" * 9000)),
        raw(W_enc=b"plain text"),
        bytes(encrypted),
        archive_of()[::-1]
    ]
    assert check(load_sae, path, contents) == len(contents)


def test_lines_that_are_not_what_they_should_be(folder):
    lines = [
        b'{"text": "a"', b'{"text": 3}', b'{"txt": "a"}', b"[]", b"null", b'"text"',
        b'{"text": "\xff"}', b"\x00" * 500, b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}"
    ]
    whole = (folder / "posts.jsonl").read_bytes()
    contents = [whole + line + b"\n" + whole for line in lines]
    assert check(load_text, folder / "posts.jsonl", contents) == len(contents)
    # JSON can say it, UTF-8 cannot
    lone = [whole + b'{"text": "\\ud800 a lone surrogate"}\n']
    assert check(load_text, folder / "posts.jsonl", lone) == 0
