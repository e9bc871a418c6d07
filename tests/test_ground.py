"""data/flags.py, files.py, stats.py, machine.py: the small shared helpers."""

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from conftest import ROOT, program
from safetensors.torch import save_file

import study
from data import figures, files, flags, machine, stats
from data.errors import UserError
from data.stats import mean_with_ci, spearman, wilson

# ---- flags ----


@dataclasses.dataclass(frozen=True)
class Flags:
    n_steps: int = flags.field(10, "steps")
    lr: float = flags.field(1e-3, "rate")
    layers: tuple[int, ...] = flags.field((), "layers")
    l1: tuple[float, ...] = flags.field((0.5,), "weights")
    name: str = flags.field("x", "a name")
    half: bool = flags.field(False, "a switch")


def test_flags_come_from_the_dataclass():
    parsed = flags.parse_flags(Flags, "", [
        "--n-steps", "1e6", "--lr", "2e-4", "--layers", "0,2", "--l1", "1,0.5", "--half", "--name",
        "y"
    ])
    assert parsed == Flags(1_000_000, 2e-4, (0, 2), (1.0, 0.5), "y", True)
    assert flags.parse_flags(Flags, "", ["--no-half"]) == Flags()


def test_a_large_whole_number_is_not_rounded():
    assert flags.parse_flags(Flags, "", ["--n-steps", str(2**53 + 1)]).n_steps == 2**53 + 1


@pytest.mark.parametrize("program_and_flags, words", [
    ("features --seed -1", "--seed must be between 0"),
    ("induction --seed 1e20", "--seed must be between 0"),
    ("train --seed 1e20", "--seed must be between 0"),
    ("explorer --device cpu:x", "--device cpu:x is not available"),
    ("explorer --device cuda:99", "--device cuda:99 is not available"),
])
def test_numbers_and_devices_that_nothing_takes_get_one_sentence(program_and_flags, words,
                                                                 tmp_path):
    name, *argv = program_and_flags.split()
    done = program(name, *argv, "--out", tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="--n-rows must be at least 1, not 0"):
        study.held_out_rows(None, 0)


@pytest.mark.parametrize("argv", [["--n-steps", "1.5"], ["--n-steps", "inf"], ["--lr", "nan"],
                                  ["--layers", "0,x"], ["--n-steps", ""]])
def test_a_value_of_the_wrong_type_names_the_flag(argv):
    with pytest.raises(UserError, match=argv[0]):
        flags.parse_flags(Flags, "", argv)


def test_a_flag_that_is_not_there_gets_one_sentence():
    with pytest.raises(UserError, match="unrecognized arguments: --frobnicate; --help"):
        flags.parse_flags(Flags, "", ["--frobnicate"])


# ---- files ----


def test_atomic_writes_leave_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "sub" / "file"
    with files.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_safetensors_writes_has_the_mode_of_other_files(tmp_path):
    (tmp_path / "plain").write_text("")
    with files.atomic(tmp_path / "weights") as temporary:
        save_file({"w": torch.zeros(2)}, temporary)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_nothing(tmp_path):
    """The lock goes with the process that holds it; what it was writing is cleared away."""
    hold = ("import sys, time, pathlib; from data.files import sole_writer\n"
            "with sole_writer(pathlib.Path(sys.argv[1])):\n"
            "    pathlib.Path(sys.argv[1], '.sae.safetensors.1.tmp').touch()\n"
            "    print('holding', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == "holding\n"
    with pytest.raises(UserError, match="another run is writing"), files.sole_writer(tmp_path):
        pass
    assert (tmp_path / ".sae.safetensors.1.tmp").exists(), "a live run's file was taken away"
    other.kill()
    other.wait()
    with files.sole_writer(tmp_path):
        assert not (tmp_path / ".sae.safetensors.1.tmp").exists()
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_as_windows_allows(tmp_path, monkeypatch):
    """There only what is open for writing can be synced, and there are no locks of Unix."""
    fcntl = pytest.importorskip("fcntl")
    synced = []

    def fsync(descriptor):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced.append(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert len(synced) == 1 and files.read_json(tmp_path / "a.json") == {"a": 1}
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.sole_writer(tmp_path):
        files.write_text(tmp_path / "b.txt", "\u27e8b\u27e9")
    assert (tmp_path / "b.txt").read_text(encoding="utf8") == "\u27e8b\u27e9"


# ---- printing and ending ----

PRINTING = """
import sys
from pathlib import Path
from data.errors import run
def main():
    for i in range(3):
        print("\\u27e8here\\u27e9", "x" * 5000, flush=i == 1)
    Path(sys.argv[1]).write_text("done")
run(main)
"""


def start_printing(result, **options):
    """A program that prints, with a sign that few code pages have, and writes a result."""
    return subprocess.Popen([sys.executable, "-c", PRINTING, result], cwd=ROOT,
                            stderr=subprocess.PIPE, text=True, **options)


def test_a_program_whose_output_nobody_reads_ends_quietly_with_its_work_done(tmp_path):
    process = start_printing(tmp_path / "result", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate()[1] == "" and process.returncode == 0
    assert (tmp_path / "result").read_text() == "done"


def test_a_program_without_standard_output_does_its_work(tmp_path):
    process = start_printing(tmp_path / "result", preexec_fn=lambda: os.close(1))
    assert process.communicate()[1] == "" and process.returncode == 0
    assert (tmp_path / "result").read_text() == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_said_once(tmp_path):
    with open("/dev/full", "w") as full:
        process = start_printing(tmp_path / "result", stdout=full)
        said = process.communicate()[1]
    assert said.count("\n") == 1 and "standard output cannot be written (No space left" in said
    assert process.returncode == 0 and (tmp_path / "result").read_text() == "done"


def test_signs_that_a_code_page_lacks_are_written_as_escapes(tmp_path):
    process = start_printing(tmp_path / "result", stdout=subprocess.PIPE,
                             env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    printed, said = process.communicate()
    assert said == "" and process.returncode == 0
    assert printed.startswith("\\u27e8here\\u27e9 xxx")


def test_sigterm_ends_a_program_with_its_own_code():
    code = ("import os, signal\nfrom data.errors import run\n"
            "def main():\n    os.kill(os.getpid(), signal.SIGTERM)\n    signal.pause()\nrun(main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr == "-c: stopped.\n"


def test_one_folder_holds_the_results_of_one_model(tmp_path, capsys):
    files.claim(tmp_path, "a/checkpoint-1000", "0123")
    files.claim(tmp_path, "moved/checkpoint-1000", "0123")
    with pytest.raises(UserError, match="results of another model, .*a/checkpoint-1000.*--out"):
        files.claim(tmp_path, "b/checkpoint-1000", "4567")
    assert capsys.readouterr().out == ""
    files.claim(tmp_path, "a/checkpoint-1000", "4567")
    assert capsys.readouterr().out.startswith("note: "), "the same model in another precision"


@pytest.mark.parametrize("token", ["$$", "$x_1$", "$", "\\$", "a $b$ c$", "\\frac{$$", "\n$$"])
def test_a_token_in_a_figure_is_text_and_no_formula(tmp_path, token):
    # what matplotlib itself makes of it: the text that it draws, and whether as a formula
    assert Text()._preprocess_math(figures.as_text(token)) == (token, False)
    f = np.array([1.0, 2.0, 3.0])
    figures.plot_feature(f, f > 1, f"1.2, named after {token!r}", tmp_path / "feature.png")
    assert (tmp_path / "feature.png").stat().st_size > 0


def test_figures_are_drawn_whatever_backend_a_notebook_left_behind(tmp_path):
    code = ("import sys, numpy\nfrom data import figures\nf = numpy.ones(3)\n"
            "figures.plot_feature(f, f > 0, 'x', sys.argv[1] + '/feature.png')")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"MPLBACKEND": "module://no_such_backend"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "feature.png").stat().st_size > 0


# ---- statistics ----


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_law():
    x = np.random.default_rng(1).normal(size=400)
    low, high = stats.bootstrap(lambda i: x[i].mean(), 400, samples=4000)
    expected = 1.96 * x.std() / 20
    assert abs(low - (x.mean() - expected)) < 0.15 * expected
    assert abs(high - (x.mean() + expected)) < 0.15 * expected


def test_mean_of_draws_what_belongs_together_together():
    values = np.repeat([1.0, 2.0, 4.0], [2, 1, 3])
    mean, (low, high) = mean_with_ci(values, [7, 7, 3, 5, 5, 5])
    assert mean == pytest.approx(values.mean()) and low == 1.0 and high == 4.0
    rng = np.random.default_rng(0)
    many = rng.normal(size=(400, 2))
    mean, (low, high) = mean_with_ci(many)
    # the normal interval of a mean, by the textbook
    np.testing.assert_allclose(np.subtract(high, low), 2 * 1.96 * many.std(0) / 20, rtol=0.12)
    assert mean_with_ci([]) == (None, None)


def test_the_interval_of_a_share():
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert wilson(0, 0) is None


def test_spearman_equals_counting_by_hand():
    rising = spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 25, 90]))
    assert rising == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4, worked out on paper
    tied = spearman(torch.tensor([1.0, 5, 5, 9]), torch.tensor([2.0, 1, 3, 4]))
    assert float(tied) == pytest.approx(0.632456, abs=1e-6)


# ---- machine ----


def test_ctrl_c_is_left_alone_outside_the_main_thread():
    said = []

    def work():
        with machine.deferred_interrupt() as interrupted:
            said.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [None], "signal handlers can be set in the main thread only"
