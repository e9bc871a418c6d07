"""For courses: a copy of the project in which the bodies of fourteen exercises are blank.

    python tests/course/make_copy.py my-copy        then in that folder:
    python -m pytest tests/course -x

Each exercise is one idea of the paper, a few lines long; its docstring, its shapes and everything
around it stay. `tests/course/test_exercises.py` grades them in order: a test may use what earlier
exercises made, and nothing of later ones. Its messages say what kind of mistake an answer looks
like. The copy has a README of its own, EXERCISES.md with hints, and answers/, unless
--no-answers is given.
"""

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from data.errors import UserError, run  # noqa: E402


COPIED = ("*.py", "*.txt", "*.ini", "LICENSE", "data/**/*", "docs/*.md", "docs/*.ipynb",
          "docs/pictures/*", "tests/**/*")
# The first four have the answers, or read them; the fifth is of the project's own pages.
NOT_COPIED = ("tests/course/make_copy.py", "tests/measured/test_course.py",
              "tests/measured/student_answers.py", "tests/test_answers.py",
              "tests/test_results.py", "tests/course/COPY.md", "tests/course/EXERCISES.md",
              "docs/TEACHING.md")
PAGES = {"tests/course/COPY.md": "README.md", "tests/course/EXERCISES.md": "EXERCISES.md"}


class Exercise(NamedTuple):
    title: str
    file: str
    functions: tuple        # names, those of methods with their class


EXERCISES = (
    Exercise("an attention layer up to z_cat", "model.py", ("attend",)),
    Exercise("what the sparse autoencoder computes", "sae.py",
             ("SAE.encoder_input", "SAE.pre_activations", "SAE.activate", "SAE.decode")),
    Exercise("its loss, and the gradient by hand", "sae.py", ("dense_step", "gradient_of_b_dec")),
    Exercise("decoder rows of unit norm", "sae.py",
             ("project_decoder_gradient", "normalise_decoder")),
    Exercise("which inputs are badly reconstructed", "sae.py", ("draw_badly_reconstructed",)),
    Exercise("what Adam knows of a new feature", "sae.py", ("reset_adam",)),
    Exercise("new directions for dead features", "sae.py", ("resample",)),
    Exercise("cross-entropy recovered", "train.py", ("row_ce", "ce_recovered")),
    Exercise("which heads a feature lies in", "direct.py", ("head_weights",)),
    Exercise("direct feature attribution", "direct.py", ("dfa", "feature_bias")),
    Exercise("one step of recursive DFA", "attribution.py", ("attention_terms",)),
    Exercise("the length of a prefix that matches", "induction.py", ("prefix_lengths",)),
    Exercise("a feature removed, or set, where it matters", "sae.py", ("put_in",)),
    Exercise("how much of the logit difference is recovered", "ioi.py", ("recovered",)),
)


def blank(source, names, number):
    """The source with the bodies of these functions replaced by an error that says what to do;
    their docstrings stay. Comments that give the derivatives away go."""
    lines = source.splitlines(keepends=True)
    found = {f"{above}{node.name}": node for above, node in _functions(ast.parse(source))}
    # from the end: lines above stay
    for name in sorted(names, key=lambda name: -found[name].lineno):
        body = found[name].body
        first = body[0].end_lineno if ast.get_docstring(found[name]) else body[0].lineno - 1
        indent = " " * body[0].col_offset
        lines[first:body[-1].end_lineno] = [
            f"{indent}raise NotImplementedError(\n",
            f'{indent}    "exercise {number}, {EXERCISES[number - 1].title}: write {name} in "\n',
            f'{indent}    "{EXERCISES[number - 1].file}; its docstring says what it is to return")\n'
        ]
    # the gradient is an exercise: its formulas go too
    return re.sub(r"(#     dL/.*\n)+", "#     (yours to work out: dL/dW_dec and the others)\n",
                  "".join(lines))


def _functions(tree, above=""):
    """(prefix, node) of every function, with the name of its class before it."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield above, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{node.name}.")


def blanked(file, exercises=range(1, len(EXERCISES) + 1)):
    """A file's source with those of these exercises blank that are in it."""
    source = (ROOT / file).read_text(encoding="utf8")
    for number in exercises:
        if EXERCISES[number - 1].file == file:
            source = blank(source, EXERCISES[number - 1].functions, number)
    return source


def answer(exercise):
    """The functions of an exercise as they are in the project."""
    source = (ROOT / exercise.file).read_text(encoding="utf8")
    found = {f"{above}{node.name}": node for above, node in _functions(ast.parse(source))}
    lines = source.splitlines()
    parts = []
    for name in exercise.functions:
        node = found[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append("\n".join(lines[first - 1:node.end_lineno]))
    return f"# {exercise.title}: {exercise.file}\n\n" + "\n\n\n".join(parts) + "\n"


def student_copy(folder, with_answers=True):
    """Copy the project into a new folder, with every exercise blank. Raises UserError if the folder
    is there and holds something."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is there already; name a new folder, so that nobody's answers are lost.")
    files = sorted({path for pattern in COPIED for path in ROOT.glob(pattern)
                    if path.is_file() and "__pycache__" not in path.parts
                    and path.relative_to(ROOT).as_posix() not in NOT_COPIED})
    try:
        for path in files:
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for page, name in PAGES.items():
            shutil.copyfile(ROOT / page, folder / name)
        for file in {exercise.file for exercise in EXERCISES}:
            (folder / file).write_text(blanked(file), encoding="utf8")
        if with_answers:
            (folder / "answers").mkdir()
            for number, exercise in enumerate(EXERCISES, start=1):
                path = folder / "answers" / f"{number:02d}.txt"
                path.write_text(answer(exercise), encoding="utf8")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; name another folder.") from error


def main():
    asked = sys.argv[1:]
    if asked in (["-h"], ["--help"]):
        print(__doc__)
        return
    folders = [one for one in asked if one != "--no-answers"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise UserError("say where the copy should be: python tests/course/make_copy.py my-copy, "
                        "with --no-answers if its answers should stay here.")
    folder = folders[0]
    student_copy(folder, with_answers="--no-answers" not in asked)
    for number, exercise in enumerate(EXERCISES, start=1):
        print(f"{number:2d}  {exercise.title}: {', '.join(exercise.functions)} in {exercise.file}")
    print(f"\nwritten to {folder}/, where README.md says how to go on: EXERCISES.md has hints, and\n"
          f"python -m pytest tests/course -x stops at the first that is to be written.")


if __name__ == "__main__":
    run(main)
