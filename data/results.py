"""Numbers in the pages: the commands that print them, what they printed, a check that nothing drifts.

    python -m data.results              run all (about an hour on two cores, half of it the benchmark)
    python -m data.results ioi train    run some; walkthrough is one of them
    python -m data.results --check      run none: are the pages what the stored outputs say?

The pages are README.md and data/RESULTS.md. What a command prints is kept in data/results/<name>.txt, under
the time and the memory it took. The pages are then brought up to date: a fenced block under

    <!-- from ioi: "ABBA" +2; "head " +3 -->

gets the line of that output that starts with ABBA and the two after it, "..." and so on. Every other number
of a section has to stand in the outputs, or the JSON files, that are named under its heading,

    <!-- numbers of: ioi, tiny; settings: 200, 1e6 -->

rounded as it may be; those that do not are listed, and it is for the writer to look. Settings are numbers
that nothing measured. Numbers in `code` and whole numbers up to twelve are not looked at, nor are sections
without such a line.

data/WALKTHROUGH.md is a program with text between: its code is run, and what it prints put below. Figures
that the commands draw are copied over those of the pages, data/pictures/<name>-*.png.

The commands write to out/ as they do when run by hand. benchmark takes tests/requirements-peers.txt, and
gpt2-size the random model that README.md makes, with GPT-2's tokenizer.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data.common import UserError, atomic, fast_bfloat16, run

ROOT = Path(__file__).parent.parent
OUTPUTS, WALK, PICTURES = ROOT / "data/results", ROOT / "data/WALKTHROUGH.md", ROOT / "data/pictures"
PAGES = (ROOT / "README.md", ROOT / "data" / "RESULTS.md")
COMMANDS = {
    "train": "train.py",
    "attribution": "attribution.py --saes data/tiny --feature 2.1228",
    "measure": "attribution.py --measure --saes data/tiny",
    "induction": "induction.py --saes data/tiny",
    "ioi": "ioi.py --saes data/tiny",
    "features": "features.py --saes data/tiny",
    "one-layer": "features.py --saes data/tiny --layers 2 --n-tokens 1e6 --out out/one-layer",
    "calibrate": "tests/calibrate.py",
    "spaces": "-m data.spaces",
    "kills": "tests/test_kill.py 20",
    "gpt2-size": "train.py --model out/random-gpt2 --layers 5 --d-sae 24576 --l1 1 --no-normalise "
                 "--lr 1.2e-3 --batch-size 4096 --n-tokens 163840 --n-eval-rows 8",
    "benchmark": "tests/benchmark.py",
}
PEERS = "tests/requirements-peers.txt"
TINY = ("report.json", "L0/metrics.json", "L1/metrics.json", "L2/metrics.json", "L3/metrics.json")
PROGRESS = re.compile(r"^ *[\d,]+/[\d,]+ \w+  ")
BLOCK = re.compile(r"<!-- from ([\w-]+): (.*?) -->\n```\n(.*?)```", re.DOTALL)
SECTION = re.compile(r"<!-- numbers of: ([\w, -]*?)(?:; settings: (.*?))? -->", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,/-])[+-]?\d+(?:,\d{3})*(?:\.\d+)*%?(?![\w/]|[.,]\d)")


def measure(name):
    """Run a command and keep what it prints, its time and its memory. Raises UserError if it fails."""
    command, begun = [sys.executable, *shlex.split(COMMANDS[name])], time.monotonic()
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=complaints, text=True)
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        if process.returncode:
            last = (complaints.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"python {COMMANDS[name]} failed, and nothing of it is kept: {last}")
    if PEERS in printed:
        raise UserError(f"{name} compares with other libraries: pip install -r {PEERS} first.")
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    kept = [line.rstrip() for line in printed.splitlines() if not PROGRESS.match(line)]
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    head = [f"python {COMMANDS[name]}", f"took {minutes} minutes {seconds} seconds, and {peak:.1f} GiB of "
            f"memory at its peak", f"on {machine()}", ""]
    write(OUTPUTS / f"{name}.txt", "\n".join(head + kept) + "\n")


def machine():
    """The processor in words."""
    import torch
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.is_file() else []
    bfloat16 = "with" if fast_bfloat16(torch.device("cpu")) else "without"
    return f"{names[0] if names else 'a processor'}, {torch.get_num_threads()} threads, {bfloat16} bfloat16"


def output(name):
    """The lines of a stored output. Raises UserError if there is none."""
    path = OUTPUTS / f"{name}.txt"
    if not path.is_file():
        raise UserError(f"{path} is missing; run python -m data.results {name}.")
    return path.read_text(encoding="utf8").splitlines()


def excerpt(name, ranges):
    """Lines of an output: '"text" +n; ...' -> each line that starts with the text, and n more."""
    lines, shown, last = output(name), [], -1
    for start, more in re.findall(r'"(.*?)"(?: \+(\d+))?', ranges):
        first = next((i for i, line in enumerate(lines) if line.startswith(start) and i > last), None)
        if first is None:
            raise UserError(f"no line of data/results/{name}.txt, after those before, starts with {start!r}, "
                            f"which a page asks for.")
        shown += ["..."] if shown and first > last + 1 else []
        last = min(first + int(more or 0), len(lines) - 1)
        shown += lines[first:last + 1]
    return "\n".join(shown)


def filled(page):
    """The page with its blocks as the outputs are."""
    return BLOCK.sub(lambda m: f"<!-- from {m[1]}: {m[2]} -->\n```\n{excerpt(m[1], m[2])}\n```", page)


def unsupported(page):
    """(line, number) for every number that is in no output named for its section."""
    found = []
    for section in re.split(r"(?m)^(?=## )", page):
        if not (mark := SECTION.search(section)):
            continue
        sources = [name.strip() for name in mark[1].split(",") if name.strip()]
        settings = set(re.split(r",\s+", mark[2])) if mark[2] else set()
        known = {number for name in sources for number in numbers_of(name)}
        text = BLOCK.sub("", SECTION.sub("", section))
        text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|https?://\S+", "", text, flags=re.DOTALL)
        for line in text.splitlines():
            found += [(line.strip(), number) for number in NUMBER.findall(line)
                      if not stands(number, known) and number.strip("+") not in settings]
    return found


def numbers_of(name):
    """All numbers of an output, or of the shipped model's JSON files, as (value, how a page may write it):
    "%", "" for plain, or "any"."""
    if name != "tiny":
        found = {number for line in output(name) for number in NUMBER.findall(line)}
        return {(parsed(number)[0], "%" if number.endswith("%") else "") for number in found}
    files = [json.loads((ROOT / "data" / "tiny" / path).read_text()) for path in TINY]

    def leaves(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return {x for one in value for x in leaves(one)}
        return {(float(value), "any")} if type(value) in (int, float) else set()
    return leaves(files)


def parsed(number):
    """"-12.5%" -> 0.125 and a step of its last digit, 0.001."""
    text = number.lstrip("+-").replace(",", "").rstrip("%")
    decimals = text.partition(".")[2]
    if "." in decimals:                                                 # 2.13.0 is no number
        return 0.0, 0.0
    scale = 0.01 if number.endswith("%") else 1.0
    return float(text) * scale, 10.0**-len(decimals) * scale


def stands(number, known):
    """Whether some known number, rounded to as many digits, is this one; signs are the prose's affair."""
    value, step = parsed(number)
    if step == 0 or (step == 1 and value <= 12):
        return True
    written = "%" if number.endswith("%") else ""
    return any(abs(abs(other) - value) <= 0.5001 * step for other, how in known if how in (written, "any"))


def walked(page):
    """The walk-through with what its pieces of code print, run one after the other."""
    names = {}

    def run_piece(piece):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(piece[1], str(WALK), "exec"), names)
        said = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{piece[1]}```\n{said}"

    return re.sub(r"(?s)```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", run_piece, page)


def copy_pictures(name):
    """The figures that a command drew, over those in the pages."""
    drawn = ROOT / "out" / ("walkthrough" if name == "walkthrough" else f"tiny/{name}")
    for picture in PICTURES.glob(f"{name}-*.png"):
        if (new := drawn / picture.name.removeprefix(f"{name}-")).is_file():
            shutil.copyfile(new, picture)


def write(path, text):
    """Put a text into a file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def main():
    asked = sys.argv[1:]
    if unknown := [name for name in asked if name not in (*COMMANDS, "walkthrough", "--check")]:
        raise UserError(f"{unknown[0]} is unknown; there are: --check, walkthrough, {', '.join(COMMANDS)}.")
    if "--check" in asked and len(asked) > 1:
        raise UserError("--check runs nothing; give it alone.")
    for name in [] if "--check" in asked else asked or [*COMMANDS, "walkthrough"]:
        if name == "walkthrough":
            print(WALK.relative_to(ROOT), flush=True)
            write(WALK, walked(WALK.read_text(encoding="utf8")))
        else:
            print(f"python {COMMANDS[name]}", flush=True)
            measure(name)
        copy_pictures(name)
    stale = False
    for path in PAGES:
        before = path.read_text(encoding="utf8")
        after = filled(before)
        drifted = unsupported(after)
        for line, number in drifted:
            print(f"{path.name}: {number} is in no output named for its section: {line[:100]}")
        stale |= bool(drifted) or after != before
        if "--check" not in asked and after != before:
            write(path, after)
        print(f"{path.name}: blocks {'as they were' if after == before else 'changed'}, "
              f"{len(drifted)} numbers to look at")
    if "--check" in asked and stale:
        raise UserError("the pages are not what the outputs say; run python -m data.results.")


if __name__ == "__main__":
    run(main)
