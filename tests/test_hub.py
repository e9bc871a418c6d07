"""data/hub.py: files of the Hugging Face hub. huggingface_hub reads its variables when it is
imported, so programs of their own ask a server that answers as the hub does."""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import GEMMA_SHAPES, GPT2_SHAPES, ROOT, random_gemma, random_gpt2
from hub_server import COMMIT, Hub

import data
from data import hub
from data.errors import UserError
from data.sae_files import PUBLISHED, sae_paths
from model import load_model
from sae import SAE

NOBODY = "http://127.0.0.1:9"

# What goes wrong: {repository: (what the server does, words of the sentence)}.
FAULTS = {
    "fault/gated": ({"error": (401, "GatedRepo")}, ["fault/gated", "licence", "HF_TOKEN"]),
    "fault/private": ({"error": (401, "RepoNotFound")}, ["no fault/private", "HF_TOKEN"]),
    "fault/forbidden": ({"error": (403, "")}, ["fault/forbidden", "HTTP 403"]),
    "fault/down": ({"error": (500, "")}, ["HTTP 500", "hf download fault/down config.json"]),
    "fault/other": ({"no commit": True}, ["config.json", "FileMetadataError"]),
    "fault/cut": ({"cut": True}, ["model.safetensors", "hf download"]),
    "fault/storage": ({"storage": (503, "")}, ["model.safetensors", "HTTP 503"]),
    "fault/kind": ({}, ["config.json: model_type 'gpt_neox' is not supported"]),
    "fault/pickle": ({}, ["fault/pickle has no model.safetensors"]),
    "fault/empty": ({}, ["no fault/empty/config.json"]),
}
UNKNOWN = {"nobody/nothing": ["no nobody/nothing"], "nonsense": ["--model nonsense is unknown"],
           "a/b/c": ["unknown"], "../../none": ["unknown"], "-x/y": ["unknown"],
           "a--b/c..d": ["a--b/c..d is no name"]}

ASK = """
import json, os, sys, time
import torch
import data
from data.errors import UserError
from data.corpus import documents
from data.sae_files import sae_paths
from model import load_model
time.sleep = lambda seconds: None       # the package waits before it tries again

def said(ask, *arguments):
    try:
        return ask(*arguments)
    except UserError as error:
        return f"UserError: {error}"

def logits(name):
    return load_model(name)(torch.arange(20)[None])[0].double().sum().item()

def ids(name):
    return data.load_tokenizer(name).encode("John gave a drink")

def c4(split, n):
    stream = documents("c4", split)
    return [next(stream) for _ in range(n)]

def saes(where):
    return str(sae_paths(where, [5], 12)[5])

"""


def ask(code, home, endpoint, **variables):
    """What a fresh Python finds at an endpoint, with its cache in `home` -> a value of JSON."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith("HF_") and "proxy" not in name.lower()}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint,
                    "TIKTOKEN_CACHE_DIR": str(home / "none")} | variables
    done = subprocess.run([sys.executable, "-c", ASK + f"print(json.dumps({code}))"], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a GPT-2 under the published name, a Gemma in shards under a name of its own, C4's
    first files, an SAE of the paper's set, and all that goes wrong."""
    folder = tmp_path_factory.mktemp("hub")
    repos = {"openai-community/gpt2": folder / "gpt2", "someone/a-Gemma.2": folder / "gemma",
             "datasets/allenai/c4": folder / "c4", PUBLISHED["kissane"][0]: folder / "kissane",
             "members/only": folder / "gpt2"}
    random_gpt2(folder / "gpt2", **GPT2_SHAPES["small"] | {"vocab_size": 4100})
    for name in ("vocab.json", "tokenizer.json"):
        if (path := ROOT / "data" / "tiny" / name).is_file():
            (folder / "gpt2" / name).write_bytes(path.read_bytes())
    random_gemma(folder / "whole", **GEMMA_SHAPES["2"]).save_pretrained(
        folder / "gemma", max_shard_size="100KB")
    assert len(list((folder / "gemma").glob("model-0*"))) > 1, "this should be several shards"
    for number in (0, 1):
        write_c4(folder / "c4" / "en" / f"c4-train.0000{number}-of-01024.json.gz")
    write_c4(folder / "c4" / "en" / "c4-validation.00000-of-00008.json.gz")
    write_kissane(folder / "kissane")
    for repo in FAULTS:
        repos[repo] = folder / "gpt2"
    repos["fault/kind"] = folder / "neox"
    repos["fault/pickle"] = folder / "pickle"
    repos["fault/empty"] = folder / "whole" / "none"
    for name in ("neox", "pickle"):
        config = json.loads((folder / "gpt2" / "config.json").read_text())
        if name == "neox":
            config["model_type"] = "gpt_neox"
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    torch.save({}, folder / "pickle" / "pytorch_model.bin")
    storage = Hub(repos)
    server = Hub(repos, storage)
    server.folder = folder
    server.storage = storage
    for repo, (fault, _) in FAULTS.items():
        fault = dict(fault)
        storage.faults[repo] = {"error": fault.pop("storage", None), "cut": fault.pop("cut", None)}
        server.faults[repo] = fault
    server.faults["members/only"] = {"members only": "hf_secret"}
    yield server
    for one in (server, storage):
        one.shutdown()
        one.server_close()


def write_c4(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        for i in range(300):
            file.write(json.dumps({"text": f"{path.name} {i} " * 40, "url": "x"}) + "\n")


def write_kissane(folder):
    sae = SAE(8, 16)
    tensors = {name: tensor for name, tensor in sae.state_dict().items() if name != "threshold"}
    folder.mkdir()
    torch.save(tensors, folder / PUBLISHED["kissane"][1][5])


@pytest.fixture(scope="module")
def found(server, tmp_path_factory):
    """What one program finds there, everything once, with an empty cache."""
    home = tmp_path_factory.mktemp("home")
    names = [*FAULTS, *UNKNOWN]
    answers = ask(f"""{{
        "gpt2": logits("gpt2"), "gemma": logits("someone/a-Gemma.2"), "ids": ids("me/gpt2"),
        "published ids": ids("openai-community/gpt2"), "saes": saes("kissane"),
        "c4": said(c4, "train", 600), "c4 held out": said(c4, "held-out", 300),
        "c4 ends": said(c4, "train", 601),
        "faults": {{name: said(logits, name) for name in {names!r}}},
        "refused": said(logits, "members/only"),
        "member": os.environ.update(HF_TOKEN="hf_secret") or said(logits, "members/only"),
    }}""".replace("me/gpt2", "openai-community/gpt2"), home, server.url)
    return answers | {"home": home}


def test_a_model_of_the_hub_is_the_model_in_its_folder(server, found):
    for name in ("gpt2", "gemma"):
        expected = load_model(server.folder / name)(torch.arange(20)[None])[0].double().sum().item()
        assert found[name] == pytest.approx(expected, rel=1e-6), name
    assert found["published ids"] == data.load_tokenizer("tiny").encode("John gave a drink")


def test_files_of_a_repository_come_from_one_commit(server, found):
    later = [path for _, path, _ in server.seen if "a-Gemma.2" in path and "config" not in path]
    assert later and all(f"/resolve/{COMMIT}/" in path for path in later), later


def test_a_published_set_of_saes_is_found(server, found):
    assert found["saes"].endswith(PUBLISHED["kissane"][1][5])


def test_c4_is_streamed_file_by_file_and_not_stored(server, found):
    assert len(found["c4"]) == 600
    assert found["c4"][0].startswith("c4-train.00000") and found["c4"][-1].startswith("c4-train.00001")
    assert all(text.startswith("c4-validation.00000") for text in found["c4 held out"])
    assert all(word in found["c4 ends"] for word in ("allenai/c4", "c4-train.00002", "FileNotFound"))
    assert not list((found["home"] / "hub").glob("*c4*"))


@pytest.mark.parametrize("name", [*FAULTS, *UNKNOWN])
def test_what_goes_wrong_is_one_sentence(found, name):
    words = FAULTS[name][1] if name in FAULTS else UNKNOWN[name]
    sentence = found["faults"][name]
    assert isinstance(sentence, str) and sentence.startswith("UserError: "), sentence
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and "force_download" not in sentence


def test_nothing_that_broke_off_has_its_name_in_the_cache(found):
    names = [path.name for path in (found["home"] / "hub").glob("models--fault--cut/snapshots/*/*")]
    assert names == ["config.json"]


def test_a_token_opens_what_is_for_members(server, found):
    assert "licence" in found["refused"] and found["member"] == found["gpt2"]
    tokens = {token for _, path, token in server.storage.seen if "members/only" in path}
    assert tokens == {None}, "the token followed to another host"


def test_a_cache_that_others_have_laid_out_is_read_without_network(server, tmp_path):
    lay_out = ("import huggingface_hub as h; "
               "h.snapshot_download('openai-community/gpt2'); "
               "h.snapshot_download('someone/a-Gemma.2', allow_patterns=['*.json'])")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}
    subprocess.run([sys.executable, "-c", lay_out], env=environment, check=True,
                   capture_output=True, timeout=100)
    n_seen = len(server.seen)
    answers = ask("""{
        "gpt2": logits("gpt2"), "ids": ids("gpt2"), "shards": said(logits, "someone/a-Gemma.2"),
        "ids by the general way": ids("openai-community/gpt2"),
        "none": said(logits, "google/gemma-2-2b"), "c4": said(c4, "train", 1)
    }""", tmp_path, server.url, HF_HUB_OFFLINE="1")
    expected = load_model(server.folder / "gpt2")(torch.arange(20)[None])[0].double().sum().item()
    assert answers["gpt2"] == pytest.approx(expected, rel=1e-6)
    assert answers["ids"] == answers["ids by the general way"] \
        == data.load_tokenizer("tiny").encode("John gave a drink")
    assert "model-00001-of" in answers["shards"] and "cannot be fetched" in answers["shards"]
    for name in ("none", "c4"):
        assert "OfflineModeIsEnabled" in answers[name], answers[name]
    assert len(server.seen) == n_seen, "the network was asked"


def test_where_nobody_answers_the_cache_is_read(server, found):
    answers = ask("""{"gpt2": logits("gpt2"), "none": said(logits, "google/gemma-2-2b"),
                      "c4": said(c4, "train", 1)}""", found["home"], NOBODY)
    assert answers["gpt2"] == found["gpt2"]
    assert all(word in answers["none"] for word in
               ("Connect", "hf download google/gemma-2-2b config.json")), answers["none"]
    assert "allenai/c4" in answers["c4"] and "Connect" in answers["c4"]


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("gpt2", "someone/a-Gemma.2"):
        with pytest.raises(UserError, match="takes one more package: pip install huggingface_hub"):
            load_model(name)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        next(data.rows("c4", data.load_tokenizer("tiny")))
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        sae_paths("kissane", [5], 12)
    assert hub.cached("openai-community/gpt2", "vocab.json") is None
