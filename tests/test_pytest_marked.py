"""`--truestep-require-executed`: no filter and no early end hides a test marked `parity`."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester"]

REQUIRED = "--truestep-require-executed"
LEAN = ("-p", "no:hypothesispytest", "-p", "no:anyio")  # plugins that take a second to import

TESTS = """
import os
import pytest

marked = pytest.mark.parity(scope="dit", coverage="both")

@marked
def test_one():
    pass

def test_plain():
    END

class TestTwo:
    @marked
    def test_two(self):
        pass

@marked
@pytest.mark.parametrize("size", [1, 2])
def test_three(size):
    pass
"""
ALL = {"test_one", "TestTwo::test_two", "test_three[1]", "test_three[2]"}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Tests that compare nothing: no torch is needed to see which of them ran."""
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(test_a=TESTS.replace("END", "pass"))
    return pytester


def run(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Within a test, where no run is guarded."""
    return project.runpytest(*LEAN, "-p", "no:xdist", REQUIRED, *args)


def reasons(result: pytest.RunResult) -> dict[str, str]:
    """Test to the reason why it proves nothing."""
    lines = [line for line in result.outlines if line.startswith("NOT EXECUTED test_")]
    pairs = [line.removeprefix("NOT EXECUTED ").split(": ", 1) for line in lines]
    return {name.partition("::")[2] or name: why for name, why in pairs}


def left_out(result: pytest.RunResult) -> set[str]:
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    return {name for name, why in reasons(result).items() if why == "deselected"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], set()),
        (["-k", "one"], ALL - {"test_one"}),
        (["-m", "not parity"], ALL),
        (["test_a.py::test_one"], ALL - {"test_one"}),
        (["test_a.py::TestTwo", "test_a.py::test_three[1]"], {"test_one", "test_three[2]"}),
        (["--deselect", "test_a.py::TestTwo"], {"TestTwo::test_two"}),
        (["test_a.py"], set()),
    ],
)
def test_a_filter_hides_no_marked_test(
    project: pytest.Pytester, arguments: list[str], expected: set[str]
) -> None:
    result = run(project, "-p", "no:cacheprovider", *arguments)
    assert left_out(result) == expected
    ran = ALL - expected
    assert {n for n, why in reasons(result).items() if why == "compared no numbers"} == ran


def test_what_a_conftest_removes_or_marks_is_seen(project: pytest.Pytester) -> None:
    project.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                if item.name == "test_plain":
                    item.add_marker(pytest.mark.parity)
            items[:] = [item for item in items if item.name != "test_one"]
        """
    )
    result = run(project)
    assert left_out(result) == {"test_one"}
    assert reasons(result)["test_plain"] == "compared no numbers"


def test_last_failed_hides_neither_tests_nor_files(project: pytest.Pytester) -> None:
    project.makepyfile(test_a=TESTS.replace("END", "assert 0"), test_b=TESTS.replace("END", "pass"))
    project.runpytest(*LEAN, "-p", "no:xdist")
    result = run(project, "--lf")
    result.assert_outcomes(failed=1)
    lines = [line for line in result.outlines if line.endswith(": deselected")]
    expected = {
        f"NOT EXECUTED {file}::{name}" for file in ("test_a.py", "test_b.py") for name in ALL
    }
    assert {line.removesuffix(": deselected") for line in lines} == expected


def test_other_files_are_the_callers_choice(project: pytest.Pytester) -> None:
    project.makepyfile(test_b=TESTS.replace("END", "pass"))
    assert left_out(run(project, "test_b.py")) == set()


def test_a_skipped_file_of_marked_tests_is_named(project: pytest.Pytester) -> None:
    text = "import pytest\npytest.importorskip('absent_engine')\n"
    project.makepyfile(test_b=text + TESTS, test_c=text + "def test_plain():\n    pass\n")
    found = {n: why for n, why in reasons(run(project)).items() if n.startswith("test_b")}
    assert list(found) == ["test_b.py"]
    assert found["test_b.py"].startswith("the file was skipped: Skipped: could not import")


def test_a_run_without_marked_tests_proves_nothing(project: pytest.Pytester) -> None:
    project.makepyfile(test_a="def test_plain(): pass")
    result = run(project)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["NOT EXECUTED: no test marked parity ran"])
    project.makepyfile(test_a="")
    assert run(project).ret == pytest.ExitCode.TESTS_FAILED


NEVER = "never reached: the run ended before it"


@pytest.mark.parametrize(
    ("end", "arguments", "code"),
    [
        ("assert 0", ["-x"], 1),
        ("assert 0", ["--maxfail=1"], 1),
        ("pytest.exit('enough', returncode=0)", [], 1),
        ("pytest.exit('enough', returncode=7)", [], 7),
    ],
)
def test_what_an_early_end_left_undone_is_named(
    project: pytest.Pytester, end: str, arguments: list[str], code: int
) -> None:
    project.makepyfile(test_a=TESTS.replace("END", end))
    result = run(project, *arguments)
    assert result.ret == code
    if code != 7:  # pytest prints no summary then
        assert {n for n, why in reasons(result).items() if why == NEVER} == ALL - {"test_one"}


def test_an_internal_error_fails(project: pytest.Pytester) -> None:
    project.makeconftest("def pytest_runtest_logfinish():\n    raise ValueError('a hook')")
    assert run(project).ret == pytest.ExitCode.INTERNAL_ERROR
    project.makeconftest(
        "import pytest\n\n@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_sessionfinish():\n    pytest.exit('enough', returncode=0)"
    )
    assert run(project).ret == pytest.ExitCode.TESTS_FAILED


def subprocess(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    """As a user runs it, not within a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        return project.runpytest_subprocess(*LEAN, "-p", "no:cacheprovider", REQUIRED, *args)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os._exit(0)", "pytest ended with exit code 0 before it had judged"),
        ("os.kill(os.getpid(), 9)", "pytest was ended by SIGKILL before it had judged"),
        ("os.kill(os.getpid(), 11)", "pytest was ended by SIGSEGV before it had judged"),
    ],
)
def test_a_test_that_ends_the_process_fails_the_run(
    project: pytest.Pytester, end: str, how: str
) -> None:
    project.makepyfile(test_a=TESTS.replace("END", end))
    result = subprocess(project, "-p", "no:xdist")
    assert result.ret == 1
    result.stderr.fnmatch_lines([how, "  where    test_a.py::test_plain"])


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "pytest.exit('x', returncode=0)"])
@pytest.mark.parametrize("name", ["conftest", "test_a"])
def test_an_exit_while_collecting_fails_the_run(
    project: pytest.Pytester, name: str, end: str
) -> None:
    project.makepyfile(**{name: f"import os, pytest, sys\n{end}\n"})
    assert subprocess(project, "-p", "no:xdist").ret not in (0, None)


def test_an_exit_after_the_run_does_not_make_it_pass(project: pytest.Pytester) -> None:
    project.makeconftest("import atexit, os\natexit.register(os._exit, 0)")
    assert subprocess(project, "-p", "no:xdist").ret == 1


def test_usage_errors_and_help_keep_their_exit_codes(project: pytest.Pytester) -> None:
    assert subprocess(project, "--help").ret == 0
    project.makeconftest("import nothing_of_that_name")
    result = subprocess(project)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.no_fnmatch_line("*before it had judged*")


def test_an_interrupt_reaches_a_guarded_run(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_a=TESTS.replace(
            "END",
            "import signal; os.kill(os.getppid(), signal.SIGINT); import time; time.sleep(60)",
        )
    )
    result = subprocess(project, "-p", "no:xdist")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"NOT EXECUTED test_a.py::TestTwo::test_two: {NEVER}"])


@pytest.mark.parametrize(
    ("end", "arguments", "expected"),
    [
        ("pass", ["-k", "one or plain"], ALL - {"test_one"}),
        ("pass", ["-k", "plain"], ALL),
        ("os._exit(0)", [], set()),
        ("os._exit(0)", ["--max-worker-restart=0"], set()),
        ("pytest.exit('enough', returncode=0)", [], set()),
    ],
)
def test_under_xdist(
    project: pytest.Pytester, end: str, arguments: list[str], expected: set[str]
) -> None:
    project.makepyfile(test_a=TESTS.replace("END", end))
    result = subprocess(project, "-n", "2", *arguments)
    assert result.ret not in (0, None)
    assert {n for n, why in reasons(result).items() if why == "deselected"} == expected


def test_a_run_within_a_test_is_not_forked(project: pytest.Pytester) -> None:
    process = os.getpid()
    for _ in range(2):
        run(project)
    assert os.getpid() == process


def test_an_unguarded_run_says_so(project: pytest.Pytester) -> None:
    run(project).stdout.fnmatch_lines(["not guarded: *"])
    subprocess(project).stdout.no_fnmatch_line("not guarded: *")


def test_a_run_that_requires_nothing_is_left_alone(project: pytest.Pytester) -> None:
    result = project.runpytest(*LEAN, "-p", "no:xdist", "-k", "plain")
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*= truestep =*")
