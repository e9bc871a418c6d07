"""Numbers in the pages: the commands that print them, what they printed, a check that nothing
drifts.

    python -m docs.results              run all that take nothing from elsewhere: about an hour on
                                        two cores
    python -m docs.results ioi train    run some; walkthrough and exercises are two of them, pages
                                        whose code is run piece by piece
    python -m docs.results --check      run none: are the pages what the stored outputs say?

The pages are README.md and RESULTS, GEMMA and SPEED in docs/. What a command prints is kept in
docs/outputs/<name>.txt, under the time and the memory it took. docs/sources.json says where the
numbers of a page come from:

    blocks      for each ```text block of a page, in order, an output and lines of it:
                '"ABBA" +2; "head" to "roles"; "end"' is the line that starts with ABBA and the two
                after it, "...", those from head to roles, "..." and the line end
    sections    for each heading, outputs in which the numbers of its text have to stand, rounded
                as they may be, with their sign where one is written; rows of a table may have
                outputs of their own, by how they begin; and settings, numbers that nothing measured

Numbers in `code` and whole numbers up to twelve are not looked at, nor are sections without an
entry.

docs/WALKTHROUGH.md is a program with text between: its code is run, and what it prints put below.
Figures that the commands draw are copied over those of the pages, docs/pictures/<name>-*.png.

The commands write to out/ as they do when run by hand. Those that take more are run when asked for
by name: benchmark and benchmark-bfloat16 the environments of other libraries that they name, and a
processor without or with bfloat16; gpt2-size the random model that docs/SPEED.md makes, with
GPT-2's tokenizer; gemma- the model and the text of docs/GEMMA.md, and hours; gpu- a GPU. What was
run in pieces, or on a machine without this program, has a head written by hand.
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

import torch

from data.errors import UserError, run
from data.files import read_json, write_text
from data.machine import fast_bfloat16
from docs import notebook

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "docs" / "outputs"
PICTURES = ROOT / "docs" / "pictures"
# pages whose pieces of code are run, and what they print put below them
WALKS = {"walkthrough": ROOT / "docs" / "WALKTHROUGH.md",
         "exercises": ROOT / "tests" / "course" / "EXERCISES.md"}
PAGES = (ROOT / "README.md", ROOT / "docs" / "RESULTS.md", ROOT / "docs" / "GEMMA.md",
         ROOT / "docs" / "SPEED.md")
SOURCES = ROOT / "docs" / "sources.json"
# what the benchmark says where other libraries are missing
NO_PEERS = "the other rows take two environments"

GEMMA = "--model published/gemma-3-270m --corpus published/english"
# what train.py did by default when these outputs were made
SCHEDULE = "--warmup 100 --decay 0.2 --resample-every 250"
COMMANDS = {
    "train": "train.py",
    "explorer": "explorer.py --saes data/tiny --feature 2.1228 --no-mlp",
    "explorer-logit": "explorer.py --saes data/tiny --logit ' Mary' --against ' John'",
    "features": "features.py --saes data/tiny",
    "heads": "heads.py --saes data/tiny",
    "induction": "induction.py --saes data/tiny",
    "ioi": "ioi.py --saes data/tiny",
    "agreement": "tests/measured/agreement.py --saes data/tiny",
    "calibrate": "tests/measured/calibrate.py",
    "spaces": "tests/measured/spaces.py",
    "topk": "tests/measured/topk.py",
    "kills": "tests/test_kill.py 20",
    "gpt2-size": "train.py --model out/random-gpt2 --warmup 100 --decay 0.2 --layers 5 "
                 "--d-sae 24576 --l1 1 --no-normalise --lr 1.2e-3 --batch-size 4096 "
                 "--n-tokens 163840 --n-eval-rows 8",
    "benchmark": "tests/measured/benchmark.py",
    "benchmark-bfloat16": "tests/measured/benchmark.py",
    "gpu-train": f"train.py {SCHEDULE} --batch-size 2048 --n-tokens 2.5e6",
    "gpu-preset": "train.py --preset paper --model out/random-gpt2 --corpus published/english "
                  "--n-tokens 1e6 --block-mib 16384 --n-eval-rows 16",
    "gpu-preset-5": "train.py --preset paper --model out/random-gpt2 --corpus published/english "
                    "--layers 5 --n-tokens 6e6 --passes 2 --block-mib 4096 --n-eval-rows 64",
    "gpu-benchmark": "tests/measured/benchmark.py --device cuda",
    "gemma-train": f"train.py {GEMMA} {SCHEDULE} --batch-size 2048 --d-sae 4096 "
                   "--n-tokens 1024000 --n-eval-rows 64",
    "gemma-longer-train": f"train.py {GEMMA} {SCHEDULE} --layers 5 --batch-size 2048 --d-sae 8192 "
                          "--n-tokens 4e6 --n-eval-rows 64 --out out/longer",
    "gemma-mlp": f"train.py {GEMMA} {SCHEDULE} --reads mlp --layers 3,11,12 --d-sae 4096 --l1 0.05 "
                 "--n-tokens 409600 --batch-size 1024 --n-eval-rows 64",
    "gemma-features": f"features.py {GEMMA} --n-tokens 100000",
    "gemma-heads": f"heads.py {GEMMA} --n-tokens 100000",
    "gemma-induction": f"induction.py {GEMMA} --layers 5,11 --n-rows 1024 "
                       "--heads 5.1,5.2,11.2",
    "gemma-ioi": f"ioi.py {GEMMA}",
    "gemma-longer-ioi": f"ioi.py {GEMMA} --saes out/longer/gemma-3-270m --out out/longer",
    "gemma-explorer": f"explorer.py {GEMMA} --logit ' Mary' --against ' John'",
    "gemma-agreement": f"tests/measured/agreement.py {GEMMA} --n-rows 64 --n-roots 25",
    "gemma-against": f"tests/measured/against_transformers.py {GEMMA} "
                     "--heads 5.1,5.2,11.2,11.3,12.1",
}
ELSEWHERE = ("gemma-", "gpu-", "benchmark", "gpt2-size")    # these take more than is here
TINY = ("report.json", *(f"{folder}L{layer}/metrics.json" for folder in ("", "mlp/")
                        for layer in range(4)))

PROGRESS_LINE = re.compile(r"^ *[\d,]+/[\d,]+ \w+  ")
BLOCK = re.compile(r"```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,/-])[+-]?\d+(?:,\d{3})*(?:\.\d+)*%?(?![\w/]|[.,]\d)")
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)


# ---- running a command and keeping what it prints ----


def measure(name):
    """Run a command and keep what it prints, its time and its memory. Raises UserError if it
    fails."""
    check_machine(name)
    command = [sys.executable, *shlex.split(COMMANDS[name])]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors,
                                   text=True)
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            last_line = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"python {COMMANDS[name]} failed, and nothing of it is kept: "
                            f"{last_line}")
    if NO_PEERS in printed:
        raise UserError(f"{name} compares with other libraries; tests/measured/benchmark.py says "
                        f"how they are installed.")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    head = [f"python {COMMANDS[name]}",
            f"took {minutes} minutes {seconds} seconds, and {peak:.1f} GiB of memory at its peak",
            f"on {machine()}", ""]
    kept = [line.rstrip() for line in printed.splitlines() if not PROGRESS_LINE.match(line)]
    write_text(OUTPUTS / f"{name}.txt", "\n".join(head + kept) + "\n")


def check_machine(name):
    """Raise UserError where an output is of another kind of machine than this."""
    bfloat16 = fast_bfloat16(torch.device("cpu"))
    if name.startswith("gpu-") and not torch.cuda.is_available():
        raise UserError(f"{name} is of a GPU, and there is none.")
    if name == "benchmark" and bfloat16:
        raise UserError("benchmark is of a processor without bfloat16; here it is "
                        "benchmark-bfloat16.")
    if name == "benchmark-bfloat16" and not bfloat16:
        raise UserError("benchmark-bfloat16 is of a processor with bfloat16; here it is benchmark.")


def machine():
    """The processor in words."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf8") if path.is_file() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    bfloat16 = "with" if fast_bfloat16(torch.device("cpu")) else "without"
    processor = names[0] if names else "a processor"
    return f"{processor}, {torch.get_num_threads()} threads, {bfloat16} bfloat16"


def output(name):
    """The lines of a stored output. Raises UserError if there is none."""
    path = OUTPUTS / f"{name}.txt"
    if not path.is_file():
        raise UserError(f"{path} is missing; run python -m docs.results {name}.")
    return path.read_text(encoding="utf8").splitlines()


def copy_pictures(name):
    """The figures that a command drew, over those in the pages. (There are none of a command with
    --out.)"""
    run = "gemma-3-270m" if name.startswith("gemma-") else "tiny"
    study = name.removeprefix("gemma-")
    drawn = ROOT / "out" / (name if name in WALKS else f"{run}/{study}")
    for picture in PICTURES.glob(f"{name}-*.png"):
        new = drawn / picture.name.removeprefix(f"{name}-")
        if new.is_file():
            shutil.copyfile(new, picture)


# ---- blocks of a page ----


def excerpt(name, ranges):
    """Lines of an output: '"text" +n; ...' -> each line that starts with the text, and n more, or
    those up to the line that starts with another text: '"text" to "other"; ...'."""
    lines = output(name)
    shown = []
    last = -1

    def find(start, after):
        for i in range(after, len(lines)):
            if lines[i].startswith(start):
                return i
        raise UserError(f"no line of docs/outputs/{name}.txt, after those before, starts with "
                        f"{start!r}, which a page asks for.")

    for start, more, end in re.findall(r'"(.*?)"(?: \+(\d+)| to "(.*?)")?', ranges):
        first = find(start, last + 1)
        if shown and first > last + 1:
            shown.append("...")
        last = find(end, first) if end else min(first + int(more or 0), len(lines) - 1)
        shown += lines[first:last + 1]
    return "\n".join(shown)


def filled(page, blocks):
    """The page with its blocks as the outputs are."""
    n_blocks = len(BLOCK.findall(page))
    if n_blocks != len(blocks):
        raise UserError(f"a page has {n_blocks} text blocks, and {SOURCES.name} names "
                        f"{len(blocks)}.")
    sources = iter(blocks)

    def fill(match):
        source = next(sources)
        return f"```text\n{excerpt(source['output'], source['lines'])}\n```"

    return BLOCK.sub(fill, page)


# ---- numbers in the text of a page ----


def unsupported(page, sections):
    """(line, number) for every number that is in no output named for its section, and for every
    setting that the section does not need."""
    found = []
    for section in re.split(r"(?m)^(?=## )", page):
        title = re.match(r"## (.*)", section)
        source = sections.get(title[1] if title else "")
        if source is None:
            continue
        needed = set()
        for line in NOT_PROSE.sub("", section).splitlines():
            own = [names for start, names in source.get("rows", {}).items()
                   if line.startswith(f"| {start}")]
            known = {number for name in (own[0] if own else source["outputs"])
                     for number in numbers_of(name)}
            for number in NUMBER.findall(line):
                if stands(number, known):
                    continue
                needed.add(number.strip("+"))
                if number.strip("+") not in source["settings"]:
                    found.append((line.strip(), number))
        found += [(f"{title[1] if title else 'the top'}: a setting that nothing needs", setting)
                  for setting in source["settings"] if setting not in needed]
    return found


def numbers_of(name):
    """All numbers of an output, or of the shipped model's JSON files, as (value, how a page may
    write it): "%", "" for plain, or "any"."""
    if name == "tiny":
        texts = [(ROOT / "data" / "tiny" / path).read_text(encoding="utf8") for path in TINY]
        files = [json.loads(text) for text in texts]
        return {(float(value), "any") for value in leaves(files)}
    found = {number for line in output(name) for number in NUMBER.findall(line)}
    return {(parsed(number)[0], "%" if number.endswith("%") else "") for number in found}


def leaves(value):
    """All numbers of nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {x for inner in value for x in leaves(inner)}
    return {value} if type(value) in (int, float) else set()


def parsed(number):
    """"-12.5%" -> -0.125 and a step of its last digit, 0.001."""
    text = number.replace(",", "").rstrip("%")
    decimals = text.partition(".")[2]
    if "." in decimals:                                                 # 2.13.0 is no number
        return 0.0, 0.0
    scale = 0.01 if number.endswith("%") else 1.0
    return float(text) * scale, 10.0**-len(decimals) * scale


def stands(number, known):
    """Whether some known number, rounded to as many digits, is this one. Without a sign it may be
    of either: "falls by 3.4"."""
    value, step = parsed(number)
    if step == 0 or (step == 1 and abs(value) <= 12):
        return True
    has_sign = number[0] in "+-"
    written = "%" if number.endswith("%") else ""
    return any(abs((other if has_sign else abs(other)) - value) <= 0.5001 * step
               for other, how in known if how in (written, "any"))


# ---- pages of code ----


def walked(page):
    """A page with what its pieces of code print, run one after the other."""
    names = {}

    def run_piece(piece):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(piece[1], "a piece of the page", "exec"), names)
        said = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{piece[1]}```\n{said}"

    return re.sub(r"(?s)```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", run_piece, page)


# ---- the program ----


def main():
    asked = sys.argv[1:]
    is_check = "--check" in asked
    unknown = [name for name in asked if name not in (*COMMANDS, *WALKS, "--check")]
    if unknown:
        raise UserError(f"{unknown[0]} is unknown; there are: --check, "
                        f"{', '.join([*WALKS, *COMMANDS])}.")
    if is_check and len(asked) > 1:
        raise UserError("--check runs nothing; give it alone.")
    if not is_check:
        ours = [name for name in COMMANDS if not name.startswith(ELSEWHERE)]
        for name in asked or [*ours, *WALKS]:
            run_one(name)
    stale = [path for path in PAGES if not update(path, write=not is_check)]
    if is_check and stale:
        raise UserError("the pages are not what the outputs say; run python -m docs.results.")
    if is_check:
        check_outputs()


def check_outputs():
    """Raise UserError unless every command has its output, of that very command, and a page that
    uses it."""
    stored = {path.stem for path in OUTPUTS.glob("*.txt")}
    used = set()
    for source in read_json(SOURCES).values():
        for section in source["sections"].values():
            used |= set(section["outputs"]).union(*section.get("rows", {}).values())
    for name in stored - COMMANDS.keys():
        raise UserError(f"docs/outputs/{name}.txt is of no command in docs/results.py; remove it.")
    for name, command in COMMANDS.items():
        if output(name)[0] != f"python {command}":
            raise UserError(f"docs/outputs/{name}.txt is of another command; run "
                            f"python -m docs.results {name}.")
        if name not in used:
            raise UserError(f"no page uses docs/outputs/{name}.txt.")


def run_one(name):
    """Run a command, or a page of code, and keep what it prints and draws."""
    if name in WALKS:
        page = WALKS[name]
        print(page.relative_to(ROOT), flush=True)
        write_text(page, walked(page.read_text(encoding="utf8")))
    else:
        print(f"python {COMMANDS[name]}", flush=True)
        measure(name)
    copy_pictures(name)
    if name == "walkthrough":
        notebook.write()


def update(path, write):                                    # -> whether the page is as it should be
    """Bring a page's blocks up to date, and list its numbers that stand nowhere."""
    source = read_json(SOURCES)[path.relative_to(ROOT).as_posix()]
    before = path.read_text(encoding="utf8")
    after = filled(before, source["blocks"])
    drifted = unsupported(after, source["sections"])
    for line, number in drifted:
        print(f"{path.name}: {number} is in no output named for its section: {line[:100]}")
    if write and after != before:
        write_text(path, after)
    print(f"{path.name}: blocks {'as they were' if after == before else 'changed'}, "
          f"{len(drifted)} numbers to look at")
    return after == before and not drifted


if __name__ == "__main__":
    run(main)
