"""The directions of import that the project promises: a file can be read, and taken elsewhere, with
those above it deleted."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import test_small
from conftest import ROOT

GROUND = sorted(ROOT.glob("data/**/*.py"))
RESULTS = ROOT / "docs" / "results.py"      # a student's copy lacks it, and has files of its own
# may use what is above; nobody imports it
PROGRAM = ROOT / "data" / "tiny" / "make.py"
OPTIONAL = {"tokenizers", "huggingface_hub"}
RUNTIME = {"torch", "numpy", "tiktoken", "safetensors", "matplotlib"}

# What each file of the top level may import of the others.
ALLOWED = {
    "model": set(), "sae": set(), "sparse": {"sae"}, "study": {"model", "sae"},
    "train": {"model", "sae", "sparse"}, "direct": set(),
    "attribution": {"direct", "sae"},
    "explorer": {"attribution", "direct", "study"}, "features": {"direct", "sparse", "study"},
    "heads": {"direct", "features", "study"},
    "next_by_induction": {"direct", "model", "sae", "sparse"},
    "induction": {"direct", "next_by_induction", "sae", "study"},
    "ioi": {"attribution", "direct", "model", "sae", "study"}}
TOP = sorted(path.stem for path in ROOT.glob("*.py") if path.stem in ALLOWED or RESULTS.is_file())
PROGRAMS = [name for name in TOP if "\ndef main():" in (ROOT / f"{name}.py").read_text("utf8")]
SOURCES = [*(ROOT / f"{name}.py" for name in TOP), *GROUND]


def imported(path):
    """Every module that a file imports, anywhere in it: "data.errors", "torch" ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_top_level_is_the_files_that_the_readme_names():
    assert set(TOP) == set(ALLOWED)
    page = (ROOT / "README.md").read_text(encoding="utf8")
    assert set(re.findall(r"(?m)^(\w+)\.py  ", page)) == set(TOP) or not RESULTS.is_file()


@pytest.mark.parametrize("name", TOP)
def test_files_of_the_top_level_import_only_what_they_may(name):
    others = {module.split(".")[0] for module in imported(ROOT / f"{name}.py")} & set(TOP)
    assert others <= ALLOWED[name], f"{name}.py imports {sorted(others - ALLOWED[name])}"


@pytest.mark.parametrize("path", GROUND, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_ground_imports_nothing_above_it(path):
    above = {module.split(".")[0] for module in imported(path)} & set(TOP)
    assert path == PROGRAM or not above, f"{path.name} imports {sorted(above)}"


def test_nobody_imports_the_program_that_makes_tiny_or_the_tests():
    for path in SOURCES:
        assert not {module for module in imported(path)
                    if module.startswith(("data.tiny.make", "tests", "docs"))}, path


def test_running_takes_five_packages():
    for path in SOURCES:
        for module in {name.split(".")[0] for name in imported(path)}:
            is_ours = module in TOP or module == "data"
            assert is_ours or module in RUNTIME | OPTIONAL | set(sys.stdlib_module_names), \
                f"{path.name} imports {module}"


def test_every_program_is_tried_on_small_models():
    assert test_small.PROGRAMS.keys() == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_starts_and_says_in_one_sentence_what_is_wrong(name):
    started = subprocess.run([sys.executable, f"{name}.py", "--frobnicate"], cwd=ROOT, text=True,
                             capture_output=True)
    assert started.returncode == 2 and "Traceback" not in started.stderr
    assert started.stderr.startswith(f"{name}.py: unrecognized arguments: --frobnicate; --help")
    assert started.stderr.count("\n") == 1


def test_no_program_draws_through_pyplot():
    """It would switch a notebook's backend."""
    for path in SOURCES:
        assert "matplotlib.pyplot" not in imported(path), path


def test_a_figure_leaves_the_backend_alone(tmp_path):
    import matplotlib
    from data.figures import figure, save
    before = dict(matplotlib.rcParams)
    fig, ax = figure(2, 2)
    save(fig, tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before and (tmp_path / "x.png").stat().st_size > 0
    assert "matplotlib.pyplot" not in Path(figure.__code__.co_filename).read_text()


def calls_without_encoding(path):
    """Lines on which a file opens a text without saying that it is UTF-8, which on Windows it then
    is not."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        opens = called == "open" or called.endswith((".read_text", ".write_text"))
        modes = [one.value for one in node.args[1:] if isinstance(one, ast.Constant)]
        is_binary = called == "open" and any("b" in mode for mode in modes)
        if opens and not is_binary and "encoding" not in {word.arg for word in node.keywords}:
            yield node.lineno


@pytest.mark.parametrize("path", [*SOURCES, *([RESULTS] if RESULTS.is_file() else [])],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts_are_utf8_on_every_machine(path):
    assert not list(calls_without_encoding(path))
