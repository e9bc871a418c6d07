"""kill -9 at any moment, then --resume: the SAEs end with the same bytes as those of a run left
alone.

    python tests/test_kill.py 20        20 kills, at moments drawn over a run's whole time

The test does three, on a text that is read in no time.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--layers 0,2 --d-sae 256 --n-tokens 40000 --batch-size 256 --warmup 10 --resample-every 20 "
    "--n-eval-rows 8 --block-mib 32 --half").split()
# A checkpoint every five steps, so that some kills fall inside the writing of one.
PROGRAM = "import train; train.CHECKPOINT_EVERY = 5; train.run(train.main)"


def start(out, corpus):
    """The run, begun or gone on with, in a process of its own."""
    resume = ["--resume"] if (out / "tiny" / "checkpoint.safetensors").is_file() else []
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *FLAGS, "--corpus", corpus,
                             "--out", out, *resume],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def bytes_of(process, out):
    """Wait for the run's end -> {file: bytes} of its SAEs; then forget the run."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    files = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for path in files:
        path.unlink()
    left = [path.name for path in files if path.name.startswith(".")]
    assert not left, f"what a killed run was writing lies about: {left}"
    return {path.relative_to(out).as_posix(): found for path, found in files.items()
            if path.name in ("sae.safetensors", "config.json")}


def kill_often(out, kills, seed, corpus="python", say=lambda text: None):
    """Kill the run at drawn moments and go on, from the start again where it ended first; all ends
    must be alike -> how often it was killed, and how often a process went on with --resume."""
    begun = time.monotonic()
    whole = bytes_of(start(out, corpus), out)
    seconds, draw, killed, resumed = time.monotonic() - begun, random.Random(seed), 0, 0
    assert len(whole) == 4
    say(f"the run left alone took {seconds:.1f} s")
    while killed < kills or not resumed:
        process, wait = start(out, corpus), draw.uniform(0, seconds)
        resumed += "--resume" in process.args
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            say(f"kill {killed} after {wait:4.1f} s")
        else:
            assert bytes_of(process, out) == whole, "other bytes after kills"
            say("ended before it was killed, with the same bytes; again from the start")
    assert bytes_of(start(out, corpus), out) == whole, "other bytes after kills"
    say(f"{killed} kills, {resumed} of them or of the ends after --resume, "
        "and every end has the same bytes")
    return killed, resumed


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Line {i} of a book about {i % 17} owls and {i * i % 23} mice.\n"
                            for i in range(12_000)))
    killed, resumed = kill_often(tmp_path / "out", kills=3, seed=0, corpus=book)
    assert killed >= 3 and resumed >= 1, \
        "no kill fell between a checkpoint and the end: nothing was resumed"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_often(Path(folder), int(sys.argv[1]), seed=1, say=lambda text: print(text, flush=True))
