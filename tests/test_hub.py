"""data/hub.py against a local server that answers as the Hugging Face hub does: small files itself,
with git's checksum; large ones by redirect to another host, with SHA-256."""

import hashlib
import http.server
import socket
import struct
import threading

import pytest
import torch

import data
import model as models
from conftest import GEMMA_SHAPES, GPT2_SHAPES, random_gemma, random_gpt2
from data import hub
from data.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves {"repo/name": folder}; `cdn` is the other host's server. `faults` changes what is
    sent."""

    def __init__(self, repos, cdn=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.cdn, self.seen, self.faults = repos, cdn, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        server.seen.append((path, self.headers.get("Authorization")))
        if status := server.faults.get("status"):
            return self.answer(status)
        if path.startswith("moved/"):
            path = path.removeprefix("moved/")
        repo, _, file = path.partition("/resolve/")
        file = file.partition("/")[2]
        source = server.repos.get(repo, None)
        if source is None or not (source / file).is_file():
            return self.answer(404)
        body = (source / file).read_bytes()
        facts = {"X-Repo-Commit": server.faults.get("commit", COMMIT)}
        if server.faults.get("loop"):
            return self.answer(302, facts | {"Location": self.path})
        if address := server.faults.get("elsewhere"):
            return self.answer(302, facts | {"Location": address})
        if len(body) < 5000:
            if server.faults.get("moves") and not self.path.startswith("/moved"):
                return self.answer(307, facts | {"Location": "/moved" + self.path})
            etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            return self.send(body, facts | {"ETag": f'"{etag}"'})
        facts |= {
            "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Linked-Size": str(len(body))
        }
        if server.cdn:
            return self.answer(302, facts | {"Location": f"{server.cdn.url}/{path}"})
        self.send(body, {} if server.faults.get("plain") else facts)

    do_HEAD = do_GET

    def send(self, body, headers):
        body = body[:-1] + b"?" if self.server.faults.get("damage") else body
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.faults.get("reset"):
            self.wfile.write(body[:1000])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if self.command == "GET":
            self.wfile.write(body[:len(body) // 2] if self.server.faults.get("cut") else body)

    def answer(self, status, headers=()):
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """A hub that has a small GPT-2 under the published name, and an empty cache -> (hub, cdn,
    cache)."""
    random_gpt2(tmp_path / "gpt2", **GPT2_SHAPES["small"])
    repos = {"openai-community/gpt2": tmp_path / "gpt2"}
    cdn = Hub(repos)
    server = Hub(repos, cdn)
    cdn.faults["plain"] = True
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server, cdn, tmp_path / "home" / "hub"
    for one in (server, cdn):
        one.shutdown()
        one.server_close()


def files(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


TOKENS = torch.arange(20)[None]


def test_a_published_model_is_fetched_once_and_then_read_without_network(
        gpt2, tmp_path, monkeypatch):
    server, cdn, cache = gpt2
    expected = models.load_model(tmp_path / "gpt2")(TOKENS)[0]
    assert torch.equal(models.load_model("gpt2")(TOKENS)[0], expected)
    assert files(cache) == ["config.json", "main", "model.safetensors"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")             # nobody is there
    assert torch.equal(models.load_model("gpt2")(TOKENS)[0], expected)


def test_sharded_weights_are_fetched_by_their_index(gpt2, tmp_path):
    server, cdn, cache = gpt2
    theirs = random_gemma(tmp_path / "whole", **GEMMA_SHAPES["2"])
    theirs.save_pretrained(tmp_path / "gemma", max_shard_size="100KB")
    server.repos["google/gemma-2-2b"] = cdn.repos["google/gemma-2-2b"] = tmp_path / "gemma"
    with torch.no_grad():
        logits, _ = models.load_model("gemma-2-2b")(TOKENS)
        assert (logits - theirs(TOKENS).logits).abs().max() < 1e-4
    assert sum("model-0" in name for name in files(cache)) > 1, \
        "this test should be of several shards"


def test_what_we_fetch_hugging_face_finds_and_the_other_way_round(gpt2, tmp_path, monkeypatch):
    theirs = pytest.importorskip("huggingface_hub")
    server, cdn, cache = gpt2
    ours = hub.fetch("openai-community/gpt2", "model.safetensors")
    found = theirs.try_to_load_from_cache("openai-community/gpt2", "model.safetensors",
                                          cache_dir=cache)
    assert str(found) == str(ours)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    path = theirs.hf_hub_download("openai-community/gpt2", "config.json", endpoint=server.url,
                                  cache_dir=tmp_path / "other" / "hub")
    assert str(hub.cached("openai-community/gpt2", "config.json")) == path


def test_the_token_goes_to_the_hub_and_to_nobody_else(gpt2, monkeypatch):
    server, cdn, cache = gpt2
    server.faults["moves"] = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    models.load_model("gpt2")
    assert {token for _, token in server.seen} == {"Bearer hf_secret"}
    assert any(path.startswith("moved/") for path, _ in server.seen), \
        "no redirect inside the hub was seen"
    assert cdn.seen and {token for _, token in cdn.seen} == {None}, \
        "the token followed to another host"


@pytest.mark.parametrize("where, fault, words", [
    ("hub", {"status": 401}, ["401", "HF_TOKEN", "hf download"]),
    ("hub", {"status": 403}, ["403", "licence"]),
    ("hub", {"status": 404}, ["no gpt2/config.json"]),
    ("hub", {"status": 500}, ["500", "later"]),
    ("hub", {"commit": "../../evil"}, ["X-Repo-Commit", "HF_ENDPOINT"]),
    ("hub", {"loop": True}, ["redirects without end"]),
    ("hub", {"damage": True}, ["config.json", "checksum"]),
    ("cdn", {"damage": True}, ["model.safetensors", "checksum"]),
    ("cdn", {"cut": True}, ["model.safetensors broke off", "hf download"]),
    ("cdn", {"reset": True}, ["model.safetensors broke off", "hf download"]),
    ("hub", {"elsewhere": "file:///etc/hostname"}, ["not an address"]),
    ("hub", {"elsewhere": "http://[x/y"}, ["not an address"]),
    ("cdn", {"status": 503}, ["503"]),
    ("cdn", {"status": 404}, ["no model.safetensors"]),
], ids=str)
def test_what_goes_wrong_is_one_sentence_and_leaves_nothing_behind(gpt2, where, fault, words):
    server, cdn, cache = gpt2
    (server if where == "hub" else cdn).faults.update(fault)
    with pytest.raises(UserError) as error:
        models.load_model("gpt2")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert set(files(cache)) <= ({"config.json", "main"} if where == "cdn" else set()), \
        "a partial file has a final name, or a temporary one was left"
    (server if where == "hub" else cdn).faults.clear()
    models.load_model("gpt2")


def test_no_network_is_one_sentence(gpt2, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError,
                       match="127.0.0.1:9.*cannot be reached.*hf download openai-community/gpt2"):
        models.load_model("gpt2")
    for address in ("nonsense", "http://[x", "file:///etc", "http://"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError, match="not an address|cannot be reached"):
            models.load_model("gpt2")


def test_a_cache_that_cannot_be_written_is_one_sentence(gpt2, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="HF_HOME"):
        models.load_model("gpt2")


def test_a_corpus_is_streamed_from_an_address(gpt2, tmp_path):
    server, cdn, cache = gpt2
    (tmp_path / "gpt2" / "book.txt").write_text("It was a dark and stormy night. " * 400)
    tokenizer = data.load_tokenizer("tiny")
    rows = torch.cat(
        list(data.rows(f"{server.url}/openai-community/gpt2/resolve/main/book.txt", tokenizer)))
    assert rows.shape[1] == 128 and "stormy night" in tokenizer.decode(rows[0])
    with pytest.raises(UserError, match="404"):
        next(data.rows(f"{server.url}/openai-community/gpt2/resolve/main/none.txt", tokenizer))


def test_c4_is_streamed_file_by_file(gpt2, tmp_path):
    import gzip
    import json
    server, cdn, cache = gpt2
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-train.00001-of-01024",
                 "c4-validation.00000-of-00008"):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            for _ in range(130):
                file.write(json.dumps({"text": f"{name} " * 400, "url": "x"}) + "\n")
    server.cdn, server.repos["datasets/allenai/c4"] = None, tmp_path / "c4"
    tokenizer = data.load_tokenizer("tiny")
    stream = data.rows("c4", tokenizer, "train", n=4)
    text = ""
    with pytest.raises(UserError, match="c4-train.00002-of-01024.*404"):
        for block in stream:
            text += tokenizer.decode(block.flatten())
    held_out = tokenizer.decode(next(data.rows("c4", tokenizer, "held-out", n=4)).flatten())
    assert "validation" in held_out and "validation" not in text and "train.00000" in text
