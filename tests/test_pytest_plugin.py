"""The plugin through pytest's own pytester."""

from __future__ import annotations

import json
import shlex
import textwrap

import pytest
import torch  # noqa: F401  pytester unloads what a run imported, and torch cannot load twice

import truestep.judge.compare  # likewise what it needs
import truestep.judge.latent  # noqa: F401

pytest_plugins = ["pytester"]

TEST = """
import torch

def test_same(truestep):
    torch.manual_seed(0)
    truestep.check(torch.randn(4, 8) * SCALE, name="x")

def test_latent(truestep):
    torch.manual_seed(1)
    truestep.check_latent(torch.randn(1, 4, 2, 8, 8) * SCALE)
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(test_a="SCALE = 1.0\n" + TEST)
    return pytester


def change(project: pytest.Pytester, scale: str) -> None:
    project.makepyfile(test_a=f"SCALE = {scale}\n" + TEST)


def run(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    left_out = ("cacheprovider", "xdist", "hypothesispytest", "anyio")  # a second each to import
    return project.runpytest(*(text for name in left_out for text in ("-p", f"no:{name}")), *args)


def test_a_missing_reference_fails_and_leaves_the_candidate(project: pytest.Pytester) -> None:
    result = run(project)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*this check has no reference yet*"])
    result.stdout.fnmatch_lines(["*hint: pytest test_a.py::test_same --truestep-update"])
    candidates = "truestep-references/*/*/*/*.candidate"
    assert len(list(project.path.glob(candidates))) == 2
    run(project, "--truestep-update").assert_outcomes(passed=2)
    assert list(project.path.glob(candidates)) == []


def test_the_hints_work_as_printed(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    import os

    import pytest
    import torch

    @pytest.mark.parametrize("prompt", ["a 'red' cat", "caf\u00e9 [x]", "b $HOME"])
    def test_prompt(truestep, prompt):
        truestep.check(torch.arange(4.0) * float(os.environ.get("SCALE", "1")))
    """
    project.mkpydir("deep").joinpath("test_b.py").write_text(textwrap.dedent(body), "utf-8")
    monkeypatch.chdir(project.mkdir("elsewhere"))
    arguments = ("--rootdir", str(project.path), str(project.path / "deep"))
    folder = "--truestep-references=" + str(project.path / "kept here")

    def hints(result: pytest.RunResult) -> list[list[str]]:
        lines = [line.partition("hint: ")[2] for line in result.outlines]
        return [shlex.split(line.partition("pytest ")[2]) for line in lines if "pytest " in line]

    result = run(project, *arguments, folder)
    result.assert_outcomes(failed=3)
    assert len(hints(result)) == 3
    for hint in hints(result):
        run(project, *hint).assert_outcomes(passed=1)
    run(project, *arguments, folder).assert_outcomes(passed=3)
    monkeypatch.setenv("SCALE", "1.01")
    result = run(project, *arguments, folder)
    result.assert_outcomes(failed=3)
    for hint in hints(result):
        run(project, *hint).assert_outcomes(passed=1)
    run(project, *arguments, folder).assert_outcomes(passed=3)


def test_update_writes_then_passes_then_catches(project: pytest.Pytester) -> None:
    result = run(project, "--truestep-update")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["written: default/cpu/any/test-a-py-test-same-x-*"])
    run(project).assert_outcomes(passed=2)
    change(project, "1.01")
    result = run(project)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*EquivalenceError: drifted: 1 of 1 tensor*"])
    result.stdout.fnmatch_lines(["*scaled by 1.01*"])


def test_update_new_keeps_what_exists_and_all_replaces_it(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    change(project, "1.01")
    run(project, "--truestep-update=new").assert_outcomes(failed=2)
    run(project, "--truestep-update=all").assert_outcomes(passed=2)
    run(project).assert_outcomes(passed=2)


def test_update_is_refused_on_ci(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = run(project, "--truestep-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--truestep-update is refused where CI is set*"])


@pytest.mark.parametrize("scale", ["float('nan')", "0.0"])
def test_nan_and_zero_never_pass(project: pytest.Pytester, scale: str) -> None:
    run(project, "--truestep-update")
    change(project, scale)
    run(project).assert_outcomes(failed=2)


def test_report_and_json(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    run(project, "--truestep-report=r.html", "--truestep-json=r.json")
    data = json.loads((project.path / "r.json").read_text())
    assert data["verdict"] == "identical"
    assert len(data["comparisons"]) == 2
    assert "<!doctype html>" in (project.path / "r.html").read_text()


def test_under_xdist(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    result = project.runpytest("-p", "xdist", "-n", "2", "--truestep-json=r.json")
    result.assert_outcomes(passed=2)
    assert len(json.loads((project.path / "r.json").read_text())["comparisons"]) == 2


def test_unused_references_are_listed(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    project.makepyfile(test_a="SCALE = 1.0\n" + TEST.replace("test_latent", "test_other"))
    result = run(project)
    result.stdout.fnmatch_lines(["unused reference: default/cpu/any/test-a-py-test-latent-*"])
    result = run(project, "-k", "same")
    result.stdout.no_fnmatch_line("unused reference:*")


SWALLOWED = """
import threading

import pytest
import torch

def check(truestep, **name):
    truestep.check(torch.arange(4.0) * SCALE, **name)

def in_try(truestep):
    try:
        check(truestep)
    except Exception:
        pass

def in_thread(truestep):
    thread = threading.Thread(target=check, args=(truestep,))
    thread.start()
    thread.join()

def test_try(truestep):
    in_try(truestep)

def test_skip(truestep):
    in_try(truestep)
    pytest.skip("no weights")

def test_xfail(truestep):
    in_try(truestep)
    pytest.xfail("later")

@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread(truestep):
    in_thread(truestep)

@pytest.fixture
def late(truestep):
    yield
    in_try(truestep)

def test_teardown(late):
    pass

def test_setup_and_call_fail_once(truestep):
    check(truestep)
"""


def test_a_drift_that_a_test_swallows_fails_it(project: pytest.Pytester) -> None:
    project.makepyfile(test_a="SCALE = 1.0\n" + SWALLOWED)
    run(project, "--truestep-update").assert_outcomes(passed=4, skipped=1, xfailed=1)
    run(project).assert_outcomes(passed=4, skipped=1, xfailed=1)
    project.makepyfile(test_a="SCALE = 1.01\n" + SWALLOWED)
    result = run(project)
    result.assert_outcomes(passed=1, failed=5, errors=1)
    result.stdout.fnmatch_lines(["FAILED test_a.py::test_try - *EquivalenceError: drifted*"])
    result.stdout.fnmatch_lines(["ERROR test_a.py::test_teardown - *EquivalenceError: drifted*"])
    if hasattr(BaseException, "add_note"):
        result.stdout.fnmatch_lines(["*the test went on after this check failed, which fails it"])


SKIPPED = """
import unittest

import pytest
import torch

def swallow(truestep, name=""):
    try:
        truestep.check(torch.arange(4.0) * SCALE, name=name)
    except Exception:
        pass

class TestUnit(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def given(self, truestep):
        self.truestep = truestep

    def test_skip(self):
        swallow(self.truestep)
        self.skipTest("no weights")

    def test_raise(self):
        swallow(self.truestep)
        raise unittest.SkipTest("no weights")

    def test_pytest(self):
        swallow(self.truestep)
        pytest.skip("no weights")

    def test_import(self):
        swallow(self.truestep)
        pytest.importorskip("no_such_module")

    def test_xfail(self):
        swallow(self.truestep)
        pytest.xfail("later")

    def test_subtest(self):
        with self.subTest("one"):
            swallow(self.truestep)
            self.skipTest("no weights")

@pytest.fixture
def skips(truestep):
    swallow(truestep)
    pytest.skip("no weights")

@pytest.fixture
def fails_later(truestep):
    swallow(truestep)
    pytest.xfail("later")

@pytest.fixture
def late(truestep):
    yield
    swallow(truestep)
    pytest.skip("no weights")

def test_setup(skips):
    pass

def test_setup_xfail(fails_later):
    pass

def test_import(truestep):
    swallow(truestep)
    pytest.importorskip("no_such_module")

def test_raise(truestep):
    swallow(truestep)
    raise unittest.SkipTest("no weights")

def test_teardown(late):
    pass
"""

MEANT = """
import unittest

import pytest
import torch

class TestUnit(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def given(self, truestep):
        self.truestep = truestep

    @unittest.expectedFailure
    def test_expected(self):
        self.truestep.check(torch.arange(4.0) * SCALE)

    def test_raised(self):
        self.truestep.check(torch.arange(4.0) * SCALE)

@pytest.mark.xfail
def test_marked(truestep):
    truestep.check(torch.arange(4.0) * SCALE)
"""


def test_a_skip_after_a_drift_that_was_swallowed_fails(project: pytest.Pytester) -> None:
    project.makepyfile(test_a="SCALE = 1.0\n" + SKIPPED)
    run(project, "--truestep-update")
    same = run(project)
    assert same.ret == pytest.ExitCode.OK
    assert same.parseoutcomes().keys() <= {"passed", "skipped", "xfailed"}
    project.makepyfile(test_a="SCALE = 1.01\n" + SKIPPED)
    result = run(project, "-rA")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    told = [line for line in result.outlines if line.startswith(("FAILED", "ERROR", "SUBFAILED"))]
    for name in (
        *("TestUnit::test_skip", "TestUnit::test_raise", "TestUnit::test_pytest"),
        *("TestUnit::test_import", "TestUnit::test_xfail", "TestUnit::test_subtest"),
        *("test_setup", "test_setup_xfail", "test_import", "test_raise", "test_teardown"),
    ):
        assert [line for line in told if f"test_a.py::{name} " in f"{line} "], name
    if hasattr(BaseException, "add_note"):
        note = "the test went on after this check failed, which fails it"
        assert sum(note in line for line in result.outlines) == 11


@pytest.mark.parametrize("way", ["pytest.skip('no weights')", "pytest.xfail('later')"])
def test_a_skip_in_a_subtest_does_not_hide_a_drift(project: pytest.Pytester, way: str) -> None:
    pytest.importorskip("_pytest.subtests", reason="part of pytest from 9.0 on")
    body = """
    import pytest
    import torch

    def test_parts(truestep, subtests):
        with subtests.test("one"):
            try:
                truestep.check(torch.arange(4.0) * SCALE)
            except Exception:
                pass
            WAY
    """
    source = textwrap.dedent(body).replace("WAY", way)
    project.makepyfile(test_a="SCALE = 1.0\n" + source)
    run(project, "--truestep-update")
    assert run(project).ret == pytest.ExitCode.OK
    project.makepyfile(test_a="SCALE = 1.01\n" + source)
    result = run(project)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*EquivalenceError: drifted*"])


def test_a_drift_that_a_mark_expects_is_expected(project: pytest.Pytester) -> None:
    project.makepyfile(test_a="SCALE = 1.0\n" + MEANT)
    run(project, "--truestep-update")
    project.makepyfile(test_a="SCALE = 1.01\n" + MEANT)
    result = run(project)
    result.assert_outcomes(failed=1, xfailed=2)
    result.stdout.no_fnmatch_line("*the test went on after*")


def test_a_check_that_its_test_does_not_wait_for_fails(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_a="""
        import threading

        begun, go = threading.Event(), threading.Event()

        class Slow(dict):
            def items(self):
                begun.set()
                go.wait()
                return super().items()

        def swallow(check, *args):
            try:
                check(*args)
            except Exception:
                pass

        def test_not_waited_for(truestep):
            thread = threading.Thread(target=swallow, args=(truestep.check, Slow()))
            thread.start()
            begun.wait()

        kept = []

        def test_kept(truestep):
            kept.append(truestep)

        def test_other():
            go.set()
            swallow(kept[0].check, 3)
        """
    )
    result = run(project)
    result.assert_outcomes(failed=1, passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the test ended before its check did: ''"])
    result.stdout.fnmatch_lines(["ENDED AFTER ITS TEST test_a.py::test_kept: no name"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_two_checks_under_one_name_are_an_error(project: pytest.Pytester) -> None:
    body = """
    import torch

    def test_twice(truestep):
        for value in (1.0, 2.0):
            try:
                truestep.check(torch.arange(4.0) * value, name="x")
            except Exception:
                pass

    def test_latents(truestep):
        truestep.check(torch.arange(4.0))
        truestep.check_latent(torch.randn(1, 4, 2, 8, 8))

    def test_apart(truestep):
        truestep.check(torch.arange(4.0), name="x")
        truestep.check(torch.arange(4.0), name="y")
    """
    project.makepyfile(test_a=body)
    result = run(project, "--truestep-update")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*two checks under one name in one test: 'x'"])
    result.stdout.fnmatch_lines(["*two checks under one name in one test: no name"])
    (kept,) = project.path.glob("truestep-references/*/*/*/*twice*")
    from truestep.recording.format import Recording

    assert Recording.open(kept)["tensor"].tolist() == [0, 1, 2, 3]  # the second replaced nothing


MAPPING = """
import torch

def test_mapping(truestep):
    a, b, c = torch.arange(4.0), torch.arange(5.0), torch.arange(6.0)
    truestep.check(GIVEN)

def test_latents(truestep):
    truestep.check_latent({"video": torch.randn(1, 4, 2, 8, 8), "audio": torch.randn(1, 4, 8)})
"""


def test_a_mapping_is_judged_whole(project: pytest.Pytester) -> None:
    def given(text: str) -> pytest.RunResult:
        project.makepyfile(test_a=MAPPING.replace("GIVEN", text))
        return run(project, "-k", "mapping", "--truestep-json=r.json")

    project.makepyfile(test_a=MAPPING.replace("GIVEN", "{'a': a, 'b': b}"))
    result = run(project, "--truestep-update")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*UsageError: check_latent judges one latent"])
    given("{'b': b, 'a': a}").assert_outcomes(passed=1, deselected=1)
    for text in ("{'a': a, 'b': b * 1.01}", "{'a': a}", "{'b': b}", "{'a': a, 'b': b, 'c': c}"):
        given(text).assert_outcomes(failed=1, deselected=1)
    (result_of_last,) = json.loads((project.path / "r.json").read_text())["comparisons"]
    assert [row["name"] for row in result_of_last["rows"]] == ["a", "b", "c"]
    assert result_of_last["unexpected"] == ["c"]


PARITY = """
import pytest
import torch

@pytest.mark.parity(scope="dit", coverage="both")
def test_port(truestep):
    BODY
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("pytest.skip('no weights')", "skipped"),
        ("pytest.xfail('later')", "xfailed"),
        ("assert torch.zeros(3).shape == (3,)", "compared no numbers"),
    ],
)
def test_require_executed(project: pytest.Pytester, body: str, reason: str) -> None:
    project.makepyfile(test_a=PARITY.replace("BODY", body))
    assert run(project).ret == 0
    result = run(project, "--truestep-require-executed")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"NOT EXECUTED test_a.py::test_port: {reason}"])


def test_require_executed_passes_when_numbers_were_compared(project: pytest.Pytester) -> None:
    body = "truestep.check(torch.arange(4.0))"
    other = "\ndef test_other():\n    pass\n"
    project.makepyfile(test_a=PARITY.replace("BODY", body) + other)
    run(project, "--truestep-update")
    assert run(project, "--truestep-require-executed").ret == 0
    assert run(project, "--truestep-require-executed", "-k", "port").ret == 0


def test_plugin_imports_no_torch(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_a="import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules\n"
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=1)


def known(project: pytest.Pytester, text: str, **others: float) -> str:
    values = {"rel_l2": 1e-2, **others}
    body = "".join(f"{key} = {value}\n" for key, value in values.items())
    project.makefile(
        ".toml",
        ledger=f'[known."{text}"]\nreason = "issue 41"\nsince = 2024-10-01\n'
        f'stage = "tensors"\n{body}',
    )
    return "--truestep-known=ledger.toml"


def test_a_known_failure_passes_and_says_so(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    change(project, "1.01")
    result = run(project, known(project, "test_a.py::test_same::x"), "-k", "test_same")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(
        ["KNOWN FAILURE test_a.py::test_same::x: known failure at tensors since 2024-10-01: *"]
    )


def test_a_known_failure_that_is_not_as_stated_fails(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    option = known(project, "test_a.py::test_same::x", rel_l2=0.5)
    result = run(project, option, "-k", "test_same")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*delete the entry*[[]known.test_a.py::test_same::x[]]*"])
    change(project, "1.01")
    result = run(project, option, "-k", "test_same")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*better than known at tensors: tighten me*"])


def test_a_known_failure_of_no_check_fails_a_complete_run(project: pytest.Pytester) -> None:
    run(project, "--truestep-update")
    option = known(project, "test_a.py::test_gone::x")
    result = run(project, option)
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["KNOWN FAILURE OF NO CHECK test_a.py::test_gone::x: delete the entry"]
    )
    assert run(project, option, "-k", "test_same").ret == pytest.ExitCode.OK


@pytest.mark.parametrize(("scale", "text"), [("float('nan')", "not finite"), ("0.0", "one value")])
def test_an_update_does_not_write_what_could_judge_nothing(
    project: pytest.Pytester, scale: str, text: str
) -> None:
    run(project, "--truestep-update")
    kept = {path: path.read_bytes() for path in project.path.rglob("*.safetensors")}
    change(project, scale)
    result = run(project, "--truestep-update=all")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*this cannot be a reference: nothing could be judged by it*"])
    result.stdout.fnmatch_lines([f"*{text}*"])
    assert kept == {path: path.read_bytes() for path in project.path.rglob("*.safetensors")}


def test_an_unreadable_ledger_is_refused_before_any_test(project: pytest.Pytester) -> None:
    result = run(project, "--truestep-known=absent.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*the ledger of known failures cannot be read*"])
