"""Fixtures: small random models written by transformers, which are the reference for ours."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# several at once: a thread each is fastest
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")           # here, and in what the tests start

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    """pytest-xdist hands out files with many tests first, and one of ours with one test is long."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first: at the end one process would wait for them."""
    longest = ("test_train.py", "test_kill.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Of a failed exercise a student sees the message alone, or the line of theirs that failed.
    The traceback would show references, which are often the answer, and pages of PyTorch."""
    outcome = yield
    report = outcome.get_result()
    if item.path.name != "test_exercises.py" or not report.failed or not call.excinfo:
        return
    if isinstance(call.excinfo.value, (AssertionError, NotImplementedError)):
        # what pytest adds, the values that were compared, begins on a new line
        report.longrepr = str(call.excinfo.value).split("\nassert ")[0]
        return
    theirs = [entry for entry in call.excinfo.traceback
              if Path(entry.path).parent == ROOT or Path(entry.path).parent.name == "data"]
    if theirs:
        at = theirs[-1]
        report.longrepr = (f"{Path(at.path).name}, line {at.lineno + 1}: {str(at.statement).strip()}"
                           f"\n{call.excinfo.exconly()}")


def program(name, *arguments):
    """python <name>.py <arguments> -> returncode, stdout, stderr. It runs in this process, which
    has imported torch and read the text already; test_structure.py starts each once for real."""
    from data.errors import run
    main = importlib.import_module(name).main
    returncode = 0
    argv, folder = sys.argv, os.getcwd()
    os.chdir(ROOT)
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as stdout, \
                contextlib.redirect_stderr(io.StringIO()) as stderr:
            run(main)
    except SystemExit as stop:
        returncode = stop.code
    finally:
        sys.argv = argv
        os.chdir(folder)
    return SimpleNamespace(returncode=returncode, stdout=stdout.getvalue(),
                           stderr=stderr.getvalue())


class Words:
    """A tokenizer whose tokens are given; the last is BOS."""

    def __init__(self, words):
        self.words, self.bos, self.n_vocab = words, len(words) - 1, len(words)
        self.special = {self.bos}

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


GPT2_SHAPES = {
    "small": dict(n_layer=3, n_head=4, n_embd=32, vocab_size=101, n_positions=40),
    "wide heads, eps": dict(n_layer=2, n_head=2, n_embd=48, vocab_size=333, n_positions=64,
                            layer_norm_epsilon=1e-3),
    "n_inner, one head": dict(n_layer=4, n_head=1, n_embd=20, vocab_size=57, n_positions=30,
                              n_inner=36),
}


GEMMA = dict(hidden_size=48, intermediate_size=80, vocab_size=120, max_position_embeddings=40,
             pad_token_id=0, bos_token_id=2)
GEMMA_SHAPES = {
    "1, one key for all": dict(model_type="gemma", num_hidden_layers=3, num_attention_heads=4,
                               num_key_value_heads=1, head_dim=16, **GEMMA),
    "1, a key each": dict(model_type="gemma", num_hidden_layers=2, num_attention_heads=3,
                          num_key_value_heads=3, head_dim=10, rms_norm_eps=1e-3, **GEMMA),
    "2": dict(model_type="gemma2", num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=20, sliding_window=7,
              attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA),
    "2, no caps": dict(model_type="gemma2", num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8, sliding_window=3,
                       attn_logit_softcapping=None, final_logit_softcapping=None, **GEMMA),
    "3": dict(model_type="gemma3_text", num_hidden_layers=7, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=6,
              **GEMMA),
}


def random_gemma(folder, seed=0, **shape):
    """A transformers Gemma 1, 2 or 3 with random weights, norms among them, saved to `folder` ->
    the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**shape, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


def random_gpt2(folder, seed=0, **shape):
    """A transformers GPT-2 with random weights, large enough to matter, saved to `folder` -> the
    model, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0,
                                     attn_implementation="eager")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # biases and norms too: zeros and ones would hide mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


SHAPES = ({f"GPT-2 {name}": (random_gpt2, shape) for name, shape in GPT2_SHAPES.items()}
          | {f"Gemma {name}": (random_gemma, shape) for name, shape in GEMMA_SHAPES.items()})


@pytest.fixture(scope="session", params=SHAPES)
def pair(request, tmp_path_factory):
    """(ours, theirs) for each shape."""
    import model
    folder, (write, shape) = tmp_path_factory.mktemp("model"), SHAPES[request.param]
    theirs = write(folder, **shape)
    return model.load_model(folder), theirs


@pytest.fixture(scope="session")
def tiny():
    """The shipped model."""
    import model
    return model.load_model("tiny")
