"""tests/course/make_copy.py: in the copy every exercise fails and says what to write, and passes
when it is written, in order; and typical mistakes are called what they are."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import make_copy as course
import student_answers
from data.errors import UserError

# The tests of every state of the files, in one process: torch is imported once, the project anew
# each time.
RUNNER = """
import importlib, json, os, sys, pytest
states, folder = json.load(sys.stdin), os.getcwd()
class Found:
    def __init__(self):
        self.outcome = {}
    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            message = str(report.longrepr) if report.failed else ""
            self.outcome[report.nodeid.split("::")[-1]] = [report.passed, message]
answers = []
for files in states:
    for name, text in files.items():
        with open(name, "w", encoding="utf8") as file:
            file.write(text)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    importlib.invalidate_caches()
    found = Found()
    pytest.main(["-q", "-p", "no:cacheprovider", "tests/course/test_exercises.py"], plugins=[found])
    answers.append(found.outcome)
with open("answers.json", "w") as file:
    json.dump(answers, file)
"""

# What students write: (exercise, the right code, the mistake, a word of the message it should get).
MISTAKES = [
    (1, "scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), -torch.inf)",
     "scores", "causal"),
    (1, "scores = scale * torch.einsum", "scores = torch.einsum", "scale times q . k"),
    (1, "pattern = scores.softmax(-1,", "pattern = scores.nan_to_num(neginf=-1e30).softmax(-2,",
     "over the keys"),
    (1, "if not with_pattern and not softcap:", "if False:", "None for the pattern"),
    (1, "scores = scale * torch.einsum", "q *= scale\n    scores = torch.einsum", "in place"),
    (2, "f = pre * (pre > self.threshold)\n", "f = pre\n", "ReLU"),
    (2, "f = pre * (pre > self.threshold)\n", "f = pre * (pre > self.threshold[0])\n",
     "threshold of its own"),
    (2, "f = pre * (pre > self.threshold)\n", "f = pre * (pre >= self.threshold)\n",
     "not >="),
    (2, "f = pre * (pre > self.threshold)\n",
     "f = (pre * (pre > self.threshold)).flatten(0, -2)\n", "leading dimensions"),
    (2, "return keep_largest(f, self.top_k) if self.top_k else f\n", "return f\n", "top_k"),
    (2, "return f @ self.W_dec + self.b_dec\n", "return (f @ self.W_dec + self.b_dec).detach()\n",
     "do not detach"),
    (2, "return self.encoder_input(z) @ self.W_enc + self.b_enc\n",
     "return z @ self.W_enc + self.b_enc\n", "b_dec is subtracted"),
    (3, "LossAndGradients(e.square().sum() / B, f.sum()",
     "LossAndGradients(e.square().mean(), f.sum()", "sum over d_in"),
    (3, '"b_dec": gradient_of_b_dec(sae, g, d_b_enc)}', '"b_dec": g.sum(0)}', "b_dec enters twice"),
    (3, "d_pre = (g @ sae.W_dec.T + l1 / B) * active", "d_pre = (g @ sae.W_enc + l1 / B) * active",
     "W_dec^T, not W_enc"),
    (3, "d_pre = (g @ sae.W_dec.T + l1 / B) * active", "d_pre = (g @ sae.W_dec.T) * active",
     "l1 / B counts"),
    (3, "d_b_dec = d_b_dec - sae.W_enc @ d_b_enc", "d_b_dec = d_b_dec - sae.W_dec.T @ d_b_enc",
     "b_dec enters twice"),
    (3, "active = f != 0\n    e = sae.decode(f)",
     "active = sae.pre_activations(z) > 0\n    f = sae.pre_activations(z) * active\n    e = sae.decode(f)",
     "sae.threshold"),
    (4, "sae.W_dec.norm(dim=-1, keepdim=True)", "sae.W_dec.norm(dim=0, keepdim=True)", "each row"),
    (4, "    sae.W_dec /= sae.W_dec.norm",
     "    sae.W_enc *= sae.W_dec.norm(dim=-1)\n    sae.W_dec /= sae.W_dec.norm", "W_enc stays"),
    (5, "torch.multinomial(error.square(),", "torch.multinomial(error,",
     "square of the squared error"),
    (5, "error = (sae(z) - target)", "error = (z - sae.b_dec)", "distance from b_dec"),
    (5, "error = (sae(z) - target)", "error = (sae(z) - z)", "against the target"),
    (7, "columns = F.normalize(z[drawn] - centre, dim=-1).T",
     "target = z - sae(z) + sae.b_dec\n    columns = F.normalize((z - sae(z))[drawn], dim=-1).T",
     "what is missing"),
    (7, "    sae.b_enc[dead] = 0.0\n", "    sae.b_enc[dead] = 0.0\n    sae.b_dec += 0.1\n",
     "b_dec stays"),
    (7, "0.2 * sae.W_enc[:, live].norm(dim=0).mean()", "0.2 * sae.W_enc.norm(dim=0).mean()",
     "of those alone"),
    (6, 'state["exp_avg_sq"][index] = mean.expand_as(state["exp_avg_sq"][index])',
     'state["exp_avg_sq"][index] = 0', "first update huge"),
    (6, 'state["exp_avg"][index] = 0.0', 'state["exp_avg"].zero_()', "of live features stays"),
    (6, 'state["exp_avg"][index] = 0.0', 'state["exp_avg"][index] = 0.0\n    state["step"].zero_()',
     "step"),
    (8, "next_token = at_positions(tokens, q + 1)", "next_token = at_positions(tokens, q)",
     "token at t + 1"),
    (8, "return losses.unflatten(0, q.shape).mean(-1)", "return losses.unflatten(0, q.shape).sum(-1)",
     "not a sum"),
    (8, "return losses.unflatten(0, q.shape).mean(-1)",
     "return -losses.unflatten(0, q.shape).mean(-1)", "sign"),
    (8, "return losses.unflatten(0, q.shape).mean(-1)",
     "return losses.unflatten(0, q.shape).mean(-1) / math.log(2)", "not bits"),
    (8, "return (ablated - sae).mean() / (ablated - clean).mean()",
     "return ((ablated - sae) / (ablated - clean)).mean()", "not a mean of ratios"),
    (8, "return (ablated - sae).mean() / (ablated - clean).mean()",
     "return np.clip((ablated - sae).mean() / (ablated - clean).mean(), 0, 1)", "clipped"),
    (8, "return (ablated - sae).mean() / (ablated - clean).mean()",
     "return np.median(ablated - sae) / np.median(ablated - clean)", "not medians"),
    (9, "(n_heads, -1)).norm(dim=-1)", "(n_heads, -1)).square().sum(-1)", "not their squares"),
    (10, "return sae.b_enc - sae.b_dec @ sae.W_enc", "return sae.b_enc", "b_dec subtracted"),
    (10, "return sae.b_enc - sae.b_dec @ sae.W_enc", "return sae.b_enc - sae.W_dec @ sae.b_dec",
     "encoder's column"),
    (10, "return sae.b_enc - sae.b_dec @ sae.W_enc",
     "return sae.b_enc - sae.b_dec @ sae.W_enc - sae.threshold", "before the threshold"),
    (10, "return sae.b_enc - sae.b_dec @ sae.W_enc", "return sae.encode(0 * sae.b_dec)",
     "may be negative"),
    (11, 'kept.scales["attn_in"][0, k, 0]', 'kept.scales["attn_in"][0, position, 0]',
     "at the component's position"),
    (11, "w = sae.W_enc[:, feature].unflatten(0, (n_heads, -1))",
     "w = sae.W_dec[feature].unflatten(0, (n_heads, -1))", "W_V[h] . w^h"),
    (11, "return Terms(head, component, value, float(value.sum()))",
     "return Terms(head, component, value, max(0.0, float(value.sum())))", "no activation"),
    (12, "same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]",
     "same = (classes[:, :, None] == classes[:, None])", "BOS matches nothing"),
    (12, "same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]",
     "same = (classes[:, :, None] == classes[:, None]) & (classes > 0)[:, None]",
     "like any other"),
    (12, "lengths[:, q, 1:q + 1] = same[:, q, :q] * (1 + lengths[:, q - 1, :q])",
     "lengths[:, q, 1:q] = same[:, q, :q - 1] * (1 + lengths[:, q - 1, :q - 1])", "k = q"),
    (12, "same = (classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None]",
     "same = ((classes[:, :, None] == classes[:, None]) & (classes >= 0)[:, None])[:1]",
     "every row"),
    (13, "edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)",
     "edited[:, where.any(0)] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)[:1]", "own positions"),
    (13, "f = sae.encode(read[where].to(sae.b_dec.dtype))",
     "f = sae.pre_activations(read[where].to(sae.b_dec.dtype))", "ReLU"),
    (13, "edited[where] += ((value - f_i) * sae.W_dec[i]).to(written.dtype)",
     "edited[where] += ((value - f_i) * sae.W_enc[:, i].T).to(written.dtype)", "not the encoder's"),
    (13, "edited = written.clone()", "edited = written.to(sae.b_dec.dtype, copy=True)",
     "keeps its type"),
    (13, "edited = written.clone()", "edited = written", "another tensor"),
    (13, "((value - f_i) * sae.W_dec[i])", "(value * sae.W_dec[i])", "which it has already"),
    (1, "        scores = softcap * torch.tanh(scores / softcap)\n"
     "    scores = scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), -torch.inf)\n",
     "        pass\n"
     "    scores = scores.masked_fill(~causal_mask(n_keys, window, q.device, positions), -torch.inf)\n"
     "    if softcap:\n        scores = softcap * torch.tanh(scores / softcap)\n", "after the cap"),
    (1, "causal_mask(n_keys, window, q.device, positions), -torch.inf)",
     "causal_mask(n_keys, window, q.device), -torch.inf)", "positions[b,i]"),
    (2, "f = pre * (pre > self.threshold)\n",
     "f = torch.where(pre > self.threshold, pre, 0.0)\n", "NaN stays"),
    (2, "return z - self.b_dec if self.subtracts_b_dec else z", "return z - self.b_dec",
     "in a transcoder"),
    (3, "    target = z if target is None else target\n    x = sae.encoder_input(z)\n",
     "    target = z\n    x = sae.encoder_input(z)\n", "against target"),
    (3, "    if sae.subtracts_b_dec:\n        d_b_dec", "    if True:\n        d_b_dec",
     "b_dec enters once"),
    (3, "d_b_dec = d_b_dec - sae.W_enc @ d_b_enc", "d_b_dec = d_b_dec + sae.W_enc @ d_b_enc",
     "minus W_enc"),
    (3, "    g = 2 * e / B\n", "    g = e / B\n", "is a factor missing"),
    (7, "    reset_adam(optimizer.state[sae.W_enc], dead, feature_dim=1)\n", "", "reset_adam"),
    (7, "    centre = sae.b_dec if sae.subtracts_b_dec else mean_in\n",
     "    centre = sae.b_dec if mean_in is None else mean_in\n", "whose centre is b_dec"),
    (7, "        sae.b_enc[dead] -= centre @ columns\n", "        pass\n",
     "pre-activation of mean_in"),
    (8, "logits.float()", "logits", "float32 first"),
    (10, "return sae.b_enc - sae.b_dec @ sae.W_enc", "return sae.b_enc + sae.b_dec @ sae.W_enc",
     "the sign"),
    (12, "= same[:, q, :q] * (1 + lengths[:, q - 1, :q])", "= same[:, q, :q] * 1", "a run grows"),
    (13, "edited = written.clone()", "edited = read.clone()", "stays out of it"),
    (14, "return (patched[drawn] - zero[drawn]).mean() / (clean[drawn] - zero[drawn]).mean()",
     "return ((patched[drawn] - zero[drawn]) / (clean[drawn] - zero[drawn])).mean()",
     "not a mean of ratios"),
    (14, "return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))",
     "value = float(ratio(np.arange(len(clean))))\n    return value, [value - 0.01, value + 0.01]",
     "a 95% interval"),
    (14, "return float(ratio(np.arange(len(clean)))), bootstrap(ratio, len(clean))",
     "return min(1.0, float(ratio(np.arange(len(clean))))), bootstrap(ratio, len(clean))",
     "clipped"),
    (14, "if low <= 0:", "if (clean - zero).mean() <= 0:", "not clearly above 0"),
]


MISTAKES += student_answers.WRONG


def number(test):
    return int(test.split("_")[1])


def with_answer(sources, exercise, right, wrong):           # -> {file: text}
    """The project's files with another answer to an exercise."""
    file = course.EXERCISES[exercise - 1].file
    text = sources[file]
    pairs = [(right, wrong)] if isinstance(right, str) else zip(right, wrong)
    for old, new in pairs:
        assert text.count(old) == 1, f"{file} no longer has {old!r}"
        text = text.replace(old, new)
    return sources | {file: text}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The outcome of every test of the exercises, when the first 0, 1 ... 14 are written, with each
    mistake, and with each right answer in other words."""
    folder = tmp_path_factory.mktemp("course") / "copy"
    files = {one.file for one in course.EXERCISES}
    course.student_copy(folder)
    n = len(course.EXERCISES)
    states = [{file: course.blanked(file, range(written + 1, n + 1)) for file in files}
              for written in range(n + 1)]
    assert all((folder / file).read_text() == states[0][file] for file in files)
    sources = {name: (ROOT / name).read_text() for name in files}
    for exercise, right, wrong, _ in MISTAKES:
        states.append(with_answer(sources, exercise, right, wrong))
    for exercise, right, other in student_answers.RIGHT:
        states.append(with_answer(sources, exercise, right, other))
    done = subprocess.run([sys.executable, "-B", "-c", RUNNER], cwd=folder,
                          input=json.dumps(states), text=True, capture_output=True, timeout=3000,
                          env=os.environ | {"PYTEST_ADDOPTS": ""})
    assert (folder / "answers.json").is_file(), done.stdout + done.stderr
    return json.loads((folder / "answers.json").read_text())


def test_exercises_fail_one_by_one_and_pass_as_they_are_written(answers):
    n = len(course.EXERCISES)
    for written, outcome in enumerate(answers[:n + 1]):
        assert {number(test) for test in outcome} == set(range(1, n + 1)), "an exercise has no test"
        for test, (passed, message) in outcome.items():
            assert passed == (number(test) <= written), \
                f"{test} with {written} exercises written: {message}"
            one = course.EXERCISES[number(test) - 1]
            if not passed and number(test) == written + 1:
                assert f"exercise {number(test)}, {one.title}" in message and one.file in message, \
                    message


@pytest.mark.parametrize("i", range(len(MISTAKES)),
                         ids=[f"{m[0]}_{m[3].replace(' ', '_')}" for m in MISTAKES])
def test_a_mistake_is_called_what_it_is(answers, i):
    exercise, _, wrong, word = MISTAKES[i]
    outcome = answers[len(course.EXERCISES) + 1 + i]
    failed = {test: message for test, (passed, message) in outcome.items() if not passed}
    first = failed.get(min(failed, key=number, default=None), "")
    assert failed and number(min(failed, key=number)) == exercise, f"{wrong!r} is not noticed"
    assert any(word in message for test, message in failed.items() if number(test) == exercise), \
        first


@pytest.mark.parametrize("i", range(len(student_answers.RIGHT)),
                         ids=[f"{one[0]}" for one in student_answers.RIGHT])
def test_a_right_answer_in_other_words_is_accepted(answers, i):
    outcome = answers[len(course.EXERCISES) + 1 + len(MISTAKES) + i]
    failed = {test: message for test, (passed, message) in outcome.items() if not passed}
    assert not failed, failed


def test_the_pages_have_every_exercise():
    for_instructors = (ROOT / "docs" / "TEACHING.md").read_text(encoding="utf8")
    for_students = (ROOT / "tests" / "course" / "EXERCISES.md").read_text(encoding="utf8")
    sections = for_students.split("\n## ")
    assert len(sections) == len(course.EXERCISES) + 2       # before them a start, after them more
    for i, one in enumerate(course.EXERCISES, start=1):
        functions = [f"`{name}`" for name in one.functions]
        assert f"| {i} | {one.title} | {', '.join(functions)} in `{one.file}` |" in for_instructors
        assert f"| {i} | {one.title} | `{one.file}` |" in for_students
        section = sections[i]
        assert section.startswith(f"{i}. {one.title}\n") and f"in `{one.file}`" in section
        assert all(name in section for name in functions)
        assert section.count("<details><summary>") == 2
        assert "```" in section, "there is something to run"


def test_a_piece_after_an_exercise_runs_when_that_exercise_is_written(tmp_path):
    """And when the later ones are not: each piece in the copy with the exercises up to it."""
    folder = tmp_path / "copy"
    course.student_copy(folder)
    files = {one.file for one in course.EXERCISES}
    page = (folder / "EXERCISES.md").read_text(encoding="utf8")
    sections = page.split("\n## ")
    start, = re.findall(r"(?s)```python\n(.*?)```", sections[0])
    for i in range(1, len(course.EXERCISES) + 1):
        for file in files:
            blanked = course.blanked(file, range(i + 1, len(course.EXERCISES) + 1))
            (folder / file).write_text(blanked, encoding="utf8")
        for piece in re.findall(r"(?s)```python\n(.*?)```", sections[i]):
            done = subprocess.run([sys.executable, "-c", start + piece], cwd=folder, text=True,
                                  capture_output=True, timeout=300)
            assert done.returncode == 0, f"after exercise {i}:\n{done.stderr}"
        for command in re.findall(r"(?s)```\npython (.*?)\n```", sections[i]):
            done = subprocess.run([sys.executable, *command.split()], cwd=folder, text=True,
                                  capture_output=True, timeout=600)
            assert done.returncode == 0, f"after exercise {i}, {command}:\n{done.stderr}"


# which exercises each program uses, as docs/TEACHING.md says; and flags that make it short
PROGRAMS = {
    "train.py": (range(1, 9), "--n-tokens 60000 --n-eval-rows 16 --resample-every 10 --warmup 10"),
    "features.py": ((1, 2, 9), "--saes data/tiny --n-tokens 20000"),
    "heads.py": ((1, 2, 9), "--saes data/tiny --n-tokens 20000"),
    "explorer.py": ((1, 2, 9, 10, 11, 13), "--saes data/tiny"),
    "induction.py": ((1, 2, 12, 13), "--saes data/tiny --n-rows 64"),
    "ioi.py": ((1, 2, 10, 11, 13, 14), "--saes data/tiny --n-prompts 20"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_when_the_exercises_that_it_uses_are_written(program, tmp_path):
    used, flags = PROGRAMS[program]
    folder = tmp_path / "copy"
    course.student_copy(folder)
    others = [i for i in range(1, len(course.EXERCISES) + 1) if i not in used]
    for file in {one.file for one in course.EXERCISES}:
        (folder / file).write_text(course.blanked(file, others), encoding="utf8")
    done = subprocess.run([sys.executable, program, *flags.split()], cwd=folder, text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row, = re.findall(rf"(?m)^\| `{program}` .*\| (.*) \|$",
                      (ROOT / "docs" / "TEACHING.md").read_text(encoding="utf8"))
    said = [range(int(first), int(last or first) + 1)
            for first, last in re.findall(r"(\d+)(?: to (\d+))?", row)]
    assert sorted(i for part in said for i in part) == sorted(used)


def test_answers_are_the_functions_of_the_project(tmp_path):
    course.student_copy(tmp_path / "with")
    answers = sorted((tmp_path / "with" / "answers").iterdir())
    assert len(answers) == len(course.EXERCISES)
    for path, one in zip(answers, course.EXERCISES):
        text = path.read_text(encoding="utf8")
        source = (ROOT / one.file).read_text(encoding="utf8")
        for part in text.split("\n\n", 1)[1].split("\n\n\n"):
            assert part.strip("\n") in source, f"{path.name} is not what {one.file} has"
    course.student_copy(tmp_path / "without", with_answers=False)
    assert not (tmp_path / "without" / "answers").exists()


def test_the_copy_says_where_one_is(tmp_path):
    course.student_copy(tmp_path / "new")
    readme = (tmp_path / "new" / "README.md").read_text(encoding="utf8")
    assert readme.startswith("# Your copy") and "make_copy" not in readme
    for link in re.findall(r"\]\((?!https)([^)]*)\)", readme):
        assert (tmp_path / "new" / link).is_file(), f"README.md of the copy links to {link}"


def test_nothing_is_overwritten_and_solutions_stay_behind(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.py").write_text("x = 1")
    with pytest.raises(UserError, match="is there already"):
        course.student_copy(tmp_path / "mine")
    course.student_copy(tmp_path / "new")
    sae = (tmp_path / "new" / "sae.py").read_text()
    assert "f^T @ g" not in sae and "yours to work out: dL/dW_dec" in sae
    assert "f = pre * (pre > self.threshold" not in sae
    assert "The reconstruction." in sae
    assert (tmp_path / "new" / "data" / "tiny" / "model.safetensors").is_file()
    assert (tmp_path / "new" / "pytest.ini").is_file(), \
        "a copy inside the project runs its own tests only"
    assert not (tmp_path / "new" / "tests" / "measured" / "test_course.py").exists(), \
        "it fails on answers in other words"
    for one in course.EXERCISES:
        compile((tmp_path / "new" / one.file).read_text(), one.file, "exec")
