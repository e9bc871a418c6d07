"""docs/results.py: the pages say what the stored outputs say, a number that drifted is noticed, and
the walk-through's code prints what stands below it."""

import json
import re

import pytest

from docs import results
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


def test_every_command_has_its_output_and_every_output_is_used():
    named = {name for source in SOURCES.values() for section in source["sections"].values()
             for name in section["outputs"]}
    assert {path.stem for path in results.OUTPUTS.glob("*.txt")} == set(results.COMMANDS)
    assert set(results.COMMANDS) <= named
    for name in results.COMMANDS:
        assert results.output(name)[0] == f"python {results.COMMANDS[name]}", \
            f"{name}: another command's"


def test_a_number_that_drifted_is_noticed():
    path = results.PAGES[1]
    source = source_of(path)
    page = path.read_text(encoding="utf8")
    found = next(m for m in re.finditer(r"\| (\d\d\.\d)% \[", page))
    changed = page.replace(found[0], f"| {float(found[1]) + 0.7:.1f}% [", 1)
    drifted = results.unsupported(changed, source["sections"])
    assert [number for _, number in drifted] == [f"{float(found[1]) + 0.7:.1f}%"]
    block = results.BLOCK.search(page)
    digit = re.search(r"\d\.\d", block[1])[0]
    wrong = page.replace(block[1], block[1].replace(digit, "9.9"), 1)
    assert results.filled(wrong, source["blocks"]) == page


def test_numbers_stand_for_what_they_round():
    known = {(0.8476, "%"), (3.14159, ""), (1234.0, ""), (0.0305, "any")}
    for number in ("85%", "84.8%", "-84.8%", "3.14", "+3.1", "1,234", "3.1%", "0.031", "7",
                   "2.13.0"):
        assert results.stands(number, known), number
    for number in ("84.9%", "3.15", "1,235", "0.9", "17", "0.848", "314%"):
        assert not results.stands(number, known), number


def test_excerpts_are_lines_in_order(monkeypatch):
    monkeypatch.setattr(results, "output", lambda name: ["a 1", "b 2", "c 3", "d 4", "b 5"])
    assert results.excerpt("x", '"a"; "c" +1') == "a 1\n...\nc 3\nd 4"
    assert results.excerpt("x", '"a" +1; "b"') == "a 1\nb 2\n...\nb 5"
    with pytest.raises(UserError, match="starts with 'e'"):
        results.excerpt("x", '"e"')


def test_the_walk_through_prints_what_it_says(monkeypatch, tmp_path):
    """Words to the letter, numbers to two per cent: other processors round otherwise."""
    page = results.WALK.read_text(encoding="utf8")
    monkeypatch.chdir(tmp_path)                                         # where its pictures go
    got = results.walked(page)
    number = r"[+-]?\d+(?:\.\d+)?"
    assert re.sub(number, "#", got) == re.sub(number, "#", page)
    for a, b in zip(re.findall(number, got), re.findall(number, page)):
        assert float(a) == pytest.approx(float(b), rel=0.02, abs=0.02), \
            f"{a}, and the page says {b}"


def test_every_test_that_the_docs_name_is_there():
    page = (results.ROOT / "docs" / "INPUTS.md").read_text(encoding="utf8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 40
    for file, name in sorted(named):
        source = (results.ROOT / "tests" / file).read_text(encoding="utf8")
        assert f"\ndef {name}(" in source, f"{file} has no {name}"
