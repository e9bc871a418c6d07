"""What a student sees of a failed exercise: the message alone. The traceback would show references,
which are often the answer."""

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    is_ours = item.path.name == "test_exercises.py"
    if is_ours and report.failed and isinstance(call.excinfo.value, (AssertionError, NotImplementedError)):
        # what pytest adds, the values that were compared, begins on a new line
        report.longrepr = str(call.excinfo.value).split("\nassert ")[0]
