"""tests/measured/test_course.py grades answers to the exercises, for minutes; here is only whether
the code that they quote is still the project's."""

import make_copy as course
import student_answers
import test_course
from conftest import ROOT

ANSWERS = [answer[:2] for answer in (*test_course.MISTAKES, *student_answers.RIGHT)]


def test_answers_quote_code_that_is_there():
    sources = {one.file: (ROOT / one.file).read_text(encoding="utf8") for one in course.EXERCISES}
    for exercise, quoted in ANSWERS:
        file = course.EXERCISES[exercise - 1].file
        for code in [quoted] if isinstance(quoted, str) else quoted:
            assert sources[file].count(code) == 1, f"exercise {exercise}: {file} has no {code!r}"
