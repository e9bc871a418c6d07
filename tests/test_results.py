"""docs/results.py: the pages say what the stored outputs say, a number that drifted is noticed, and
the walk-through's code prints what stands below it."""

import json
import re

import pytest

from docs import notebook, results
from data.errors import UserError


SOURCES = json.loads(results.SOURCES.read_text())


def source_of(path):
    return SOURCES[path.relative_to(results.ROOT).as_posix()]


@pytest.mark.parametrize("path", results.PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_outputs_say(path):
    page = path.read_text(encoding="utf8")
    source = source_of(path)
    assert results.filled(page, source["blocks"]) == page, "run python -m docs.results --check"
    assert results.unsupported(page, source["sections"]) == []
    titles = {"", *re.findall(r"(?m)^## (.*)", page)}
    assert set(source["sections"]) <= titles, "a heading has changed its words"
    assert "<!--" not in page, "a page carries no bookkeeping"


def test_every_command_has_its_output_and_every_output_is_used(monkeypatch):
    results.check_outputs()
    monkeypatch.setitem(results.COMMANDS, "ioi", "ioi.py --other")
    with pytest.raises(UserError, match="ioi.txt is of another command"):
        results.check_outputs()
    monkeypatch.setitem(results.COMMANDS, "ioi2", "ioi.py")
    monkeypatch.delitem(results.COMMANDS, "ioi")
    with pytest.raises(UserError, match="ioi.txt is of no command"):
        results.check_outputs()


def test_a_number_that_drifted_is_noticed():
    path = results.PAGES[1]
    source = source_of(path)
    page = path.read_text(encoding="utf8")
    found = next(m for m in re.finditer(r"\| (\d\d\.\d)% \[", page))
    changed = page.replace(found[0], f"| {float(found[1]) - 33.3:.1f}% [", 1)
    drifted = results.unsupported(changed, source["sections"])
    assert [number for _, number in drifted] == [f"{float(found[1]) - 33.3:.1f}%"]
    block = results.BLOCK.search(page)
    digit = re.search(r"\d\.\d", block[1])[0]
    wrong = page.replace(block[1], block[1].replace(digit, "9.9"), 1)
    assert results.filled(wrong, source["blocks"]) == page


def test_numbers_stand_for_what_they_round():
    known = {(0.8476, "%"), (3.14159, ""), (1234.0, ""), (0.0305, "any")}
    for number in ("85%", "84.8%", "+84.8%", "3.14", "+3.1", "1,234", "3.1%", "0.031", "7",
                   "2.13.0"):
        assert results.stands(number, known), number
    for number in ("84.9%", "3.15", "1,235", "0.9", "17", "0.848", "314%", "-84.8%", "-3.14"):
        assert not results.stands(number, known), number
    assert results.stands("3.1", {(-3.14, "")}), "falls by 3.1"


def test_excerpts_are_lines_in_order(monkeypatch):
    monkeypatch.setattr(results, "output", lambda name: ["a 1", "b 2", "c 3", "d 4", "b 5"])
    assert results.excerpt("x", '"a"; "c" +1') == "a 1\n...\nc 3\nd 4"
    assert results.excerpt("x", '"a" +1; "b"') == "a 1\nb 2\n...\nb 5"
    assert results.excerpt("x", '"b" to "d"') == "b 2\nc 3\nd 4"
    with pytest.raises(UserError, match="starts with 'e'"):
        results.excerpt("x", '"a" to "e"')
    with pytest.raises(UserError, match="starts with 'e'"):
        results.excerpt("x", '"e"')


@pytest.mark.parametrize("name", results.WALKS)
def test_pages_of_code_print_what_they_say(name, monkeypatch, tmp_path):
    page = results.WALKS[name].read_text(encoding="utf8")
    (tmp_path / "data").symlink_to(results.ROOT / "data")
    monkeypatch.chdir(tmp_path)                                         # where its pictures go
    assert_prints(results.walked(page), page)


def test_the_notebook_is_the_walk_through():
    page = notebook.PAGE.read_text(encoding="utf8")
    stored = json.loads(notebook.NOTEBOOK.read_text(encoding="utf8"))
    assert stored == notebook.notebook(page), "run python -m docs.notebook"
    said = "".join("".join(cell["source"]) for cell in stored["cells"])
    words = re.sub(r"(?s)```python\n(.*?)```|```text\n.*?```", r"\1", page)
    for line in words.splitlines():
        if not line.startswith("!["):
            assert line in said, f"the notebook lacks {line!r}"


def test_the_notebook_runs_and_prints_what_it_says(tmp_path):
    """Each cell in a kernel of its own, started in the folder of the notebook. Figures come out as
    pictures."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    stored = nbformat.read(notebook.NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    ran = nbformat.read(notebook.NOTEBOOK, as_version=4)
    nbclient.NotebookClient(ran, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": notebook.DOCS}}).execute()
    for before, after in zip(stored.cells, ran.cells):
        assert_prints(printed_by(after), printed_by(before))
        assert pictures_of(after) == pictures_of(before)
    assert sum(map(pictures_of, ran.cells)) == 2


def printed_by(cell):
    """What a cell wrote to its output, which comes in pieces."""
    return "".join(one.text for one in cell.get("outputs", []) if one.output_type == "stream")


def pictures_of(cell):
    """How many pictures a cell shows."""
    outputs = cell.get("outputs", [])
    return sum("image/png" in one.get("data", {}) for one in outputs)


def assert_prints(got, expected):
    """Words to the letter, numbers to two per cent: other processors round otherwise."""
    number = r"[+-]?\d+(?:\.\d+)?"

    def words(text):
        """The text without its numbers, and without what pads them: 9.9 has a blank more than 10.1
        before it."""
        return re.sub(number, "#", re.sub(f" +({number})", r" \1", text))

    assert words(got) == words(expected)
    for a, b in zip(re.findall(number, got), re.findall(number, expected)):
        assert float(a) == pytest.approx(float(b), rel=0.02, abs=0.02), f"{a}, and it says {b}"


def test_every_test_that_the_docs_name_is_there():
    page = (results.ROOT / "docs" / "FORMATS.md").read_text(encoding="utf8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 40
    for file, name in sorted(named):
        source = (results.ROOT / "tests" / file).read_text(encoding="utf8")
        assert f"\ndef {name}(" in source, f"{file} has no {name}"


@pytest.mark.parametrize("has_bfloat16, refused", [(True, "benchmark"),
                                                   (False, "benchmark-bfloat16")])
def test_an_output_of_another_kind_of_machine_is_not_overwritten(monkeypatch, has_bfloat16,
                                                                 refused):
    monkeypatch.setattr(results, "fast_bfloat16", lambda device: has_bfloat16)
    monkeypatch.setattr(results.torch.cuda, "is_available", lambda: False)
    for name in results.COMMANDS:
        if name == refused or name.startswith("gpu-"):
            with pytest.raises(UserError, match=f"{name} is of a"):
                results.check_machine(name)
        else:
            results.check_machine(name)
