"""docs/walkthrough.ipynb, made of docs/WALKTHROUGH.md: the same words, code and outputs.

    python -m docs.notebook

WALKTHROUGH.md is the source: `python -m docs.results walkthrough` runs its code, puts what is
printed below it, and then calls this. A test runs the notebook.
"""

import base64
import json
import re
from pathlib import Path

from data.errors import UserError, run
from data.files import write_text

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "WALKTHROUGH.md"
NOTEBOOK = DOCS / "walkthrough.ipynb"

# A piece of code, what it prints, and the picture it draws, if it does.
PIECE = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?"
                   r"(?:\n!\[[^\]]*\]\((?P<picture>[^)]*)\)\n)?", re.DOTALL)
DRAWN = re.compile(r'"(out/[^"]*\.png)"')

FIND_THE_PROJECT = """# The project is the folder of this notebook, or one above it.
import os
import sys
from pathlib import Path

from IPython.display import Image, display

folder = next((one for one in (Path.cwd(), *Path.cwd().parents) if (one / "model.py").is_file()), None)
if folder is None:
    raise FileNotFoundError("open this notebook in the project's folder, or in one below it")
os.chdir(folder)
sys.path.insert(0, str(folder))
"""


def notebook(page):                                         # the text of a page -> a dict
    """Words as markdown cells, pieces as code cells with their outputs."""
    cells = []
    end = 0
    for piece in PIECE.finditer(page):
        add_words(cells, page[end:piece.start()])
        if not any(cell["cell_type"] == "code" for cell in cells):
            add_code(cells, FIND_THE_PROJECT, [])
        code = piece["code"]
        outputs = []
        if piece["printed"]:
            outputs.append({"output_type": "stream", "name": "stdout",
                            "text": lines_of(piece["printed"])})
        drawn = DRAWN.search(code)
        if drawn:
            code += f'display(Image("{drawn[1]}"))\n'
        if drawn and piece["picture"]:
            png = (DOCS / piece["picture"]).read_bytes()
            outputs.append({"output_type": "display_data", "metadata": {},
                            "data": {"image/png": base64.b64encode(png).decode()}})
        add_code(cells, code, outputs)
        end = piece.end()
        if piece["picture"] and not drawn:                  # a picture of another program's
            end = piece.start("picture") - len(page[:piece.start("picture")].rpartition("\n")[2])
    add_words(cells, page[end:])
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3",
                                        "language": "python"}}}


def add_words(cells, text):
    """A markdown cell, if there is anything to say."""
    if text.strip():
        cells.append({"cell_type": "markdown", "id": f"cell-{len(cells)}", "metadata": {},
                      "source": lines_of(text.strip())})


def add_code(cells, code, outputs):
    """A code cell, numbered as if run in order."""
    n_before = sum(cell["cell_type"] == "code" for cell in cells)
    cells.append({"cell_type": "code", "id": f"cell-{len(cells)}", "metadata": {},
                  "execution_count": n_before + 1, "outputs": outputs,
                  "source": lines_of(code.rstrip("\n"))})


def lines_of(text):
    """As notebooks store a text."""
    return text.splitlines(keepends=True)


def write():
    """Bring the notebook up to the page."""
    made = notebook(PAGE.read_text(encoding="utf8"))
    write_text(NOTEBOOK, json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def main():
    if not PAGE.is_file():
        raise UserError(f"{PAGE} is missing.")
    write()
    print(f"written to {NOTEBOOK}")


if __name__ == "__main__":
    run(main)
