"""What pytest prints of a check that fails, what an update leaves, and what a run leaves behind."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch  # noqa: F401  pytester unloads what a run imported, and torch cannot load twice

import truestep.judge.compare  # likewise what it needs
import truestep.judge.latent
import truestep.parity
import truestep.replay.functions
from truestep.pytest_failures import MOST
from truestep.recording.remote.address import address
from truestep.recording.remote.opening import open_store
from truestep.recording.team import Note, promote
from truestep.report.answer import headline
from truestep.verdict import Comparison, Results

pytest_plugins = ["pytester"]

LEAN = ("cacheprovider", "xdist", "hypothesispytest", "anyio")  # a second each to import

FIXTURE = """
import contextlib

import pytest
import torch

def many(scale, size=8):
    return {f"layer.{at}": torch.linspace(-1, 1, size) * scale * (at + 1) for at in range(40)}

@contextlib.contextmanager
def around():
    yield

def test_many(truestep):
    given = many(SCALE, SIZE)
    # a test of many lines
    # is not printed
    # from its beginning
    # to its check
    # nor are its
    # own comments
    with around():
        truestep.check(given, name="all")

def test_latent(truestep):
    values = torch.linspace(-1, 1, SIZE * 64).reshape(1, SIZE, 1, 8, 8)
    truestep.check_latent(values * SCALE)
"""

MARKER = """
import pytest
import torch
from truestep.parity import Loaded, Parity

def official(x):
    return {f"layer.{at}": x * (at + 1) for at in range(40)}

def port(x):
    return {name: value[..., :SIZE] * SCALE for name, value in official(x).items()}

PARITY = Parity(
    family="tiny",
    component="block",
    kind="generic",
    coverage="both",
    official=lambda: OFFICIAL,
    port=lambda: Loaded(port),
    inputs=lambda generator: {"x": torch.randn(4, 8, generator=generator)},
)

@pytest.mark.parity(scope="block", coverage="both")
def test_port(truestep):
    truestep.check_parity(PARITY)

@pytest.mark.parity(scope="block", coverage="both")
def test_plain():
    import truestep

    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    truestep.assert_equivalent(port(x), official(x))
"""

WORDS = {
    "drift": "FAILED drifted: ",
    "missing": "ReferenceNotFoundError: this check has no reference yet",
    "non-finite": "FAILED invalid: ",
    "incomparable": "INCOMPARABLE ",
}
CHANGED = {
    "drift": ("1.01", "8"),
    "missing": ("1.0", "8"),
    "non-finite": ("float('nan')", "8"),
    "incomparable": ("1.0", "7"),
}


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    return pytester


def run(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    return project.runpytest(*(text for name in LEAN for text in ("-p", f"no:{name}")), *args)


def write(project: pytest.Pytester, text: str, scale: str = "1.0", size: str = "8") -> None:
    project.makepyfile(test_a=f"SCALE, SIZE = {scale}, {size}\n" + textwrap.dedent(text))


def failures(result: pytest.RunResult) -> dict[str, list[str]]:
    """What is printed of every failure, by test."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in result.outlines:
        head = re.fullmatch(r"_+ (?:ERROR at \w+ of )?(\w+) _+", line)
        if head:
            lines = found.setdefault(head[1], [])
        elif line.startswith("==="):
            lines = []
        else:
            lines.append(line)
    return found


def of_ours() -> set[str]:
    """Every line of truestep's source that says something."""
    source = Path(truestep.__file__).parent.rglob("*.py")
    every = {line.strip() for path in source for line in path.read_text("utf-8").splitlines()}
    return {line for line in every if len(line) > 12 and not line.startswith("import ")}


def assert_brief(result: pytest.RunResult, word: str, *names: str) -> None:
    printed, ours = failures(result), of_ours()
    assert printed.keys() == set(names)
    for name, lines in printed.items():
        assert 3 <= len(lines) <= MOST == 20, (name, lines)
        first, second = lines[:2]
        assert re.fullmatch(rf"test_a\.py:\d+: in {name}", first), lines
        assert second.strip().startswith("truestep."), lines
        answer = [line for line in lines if line.startswith("E   ")]
        assert answer[0].startswith(f"E   {word}"), lines
        assert not [line for line in lines if "src/truestep" in line or "truestep/" in line], lines
        told = {line.strip() for line in lines if not line.startswith("E ")}
        assert told & ours <= {second.strip()}, told & ours


@pytest.mark.parametrize("what", WORDS)
def test_a_failing_check_prints_its_answer_and_no_source_of_ours(
    project: pytest.Pytester, what: str
) -> None:
    write(project, FIXTURE)
    if what != "missing":
        run(project, "--truestep-update").assert_outcomes(passed=2)
    write(project, FIXTURE, *CHANGED[what])
    result = run(project, "--truestep-json=r.json")
    result.assert_outcomes(failed=2)
    assert_brief(result, WORDS[what], "test_many", "test_latent")
    for name, lines in failures(result).items():
        assert any(f"pytest test_a.py::{name} --truestep-update" in line for line in lines)
    if what == "missing":
        return
    told = Results.model_validate_json((project.path / "r.json").read_text()).comparisons
    for comparison, lines in zip(told, failures(result).values(), strict=True):
        assert f"E   {headline(comparison)}" in lines


@pytest.mark.parametrize("what", WORDS)
def test_a_failing_parity_test_prints_its_answer_and_no_source_of_ours(
    project: pytest.Pytester, what: str
) -> None:
    official = "'absent.safetensors'" if what == "missing" else "Loaded(official)"
    text = MARKER.replace("OFFICIAL", official)
    write(project, text, *CHANGED[what])
    result = run(project)
    if what == "missing":
        result.assert_outcomes(failed=1, passed=1)
        assert_brief(result, "FileFormatError: ", "test_port")
    else:
        result.assert_outcomes(failed=2)
        assert_brief(result, WORDS[what], "test_port", "test_plain")


def test_what_the_code_under_test_raises_is_shown_without_frames_of_ours(
    project: pytest.Pytester,
) -> None:
    text = MARKER.replace("OFFICIAL", "Loaded(official)")
    write(project, text.replace("Loaded(port)", "1 / 0"))
    result = run(project, "-k", "test_port", "--tb=long")
    result.assert_outcomes(failed=1, deselected=1)
    (lines,) = failures(result).values()
    assert any("1 / 0" in line for line in lines)
    assert not [line for line in lines if re.search(r"truestep/\w|contextlib", line)], lines


def test_full_trace_shows_all_frames(project: pytest.Pytester) -> None:
    write(project, FIXTURE)
    result = run(project, "--full-trace", "-k", "test_many")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*truestep/pytest_fixture.py:*"])


def test_results_say_test_and_prompt(project: pytest.Pytester) -> None:
    text = """
    import pytest
    import torch

    @pytest.mark.parametrize("prompt", ["a <b>red</b> \\u202e cat"])
    def test_prompt(truestep, prompt):
        truestep.check(torch.arange(4.0))

    def test_none(truestep):
        truestep.check(torch.arange(4.0))
    """
    write(project, text)
    run(project, "--truestep-update")
    run(project, "--truestep-json=r.json", "--truestep-report=r.html").assert_outcomes(passed=2)
    first, second = json.loads((project.path / "r.json").read_text())["comparisons"]
    prompt = "a <b>red</b> \u202e cat"
    assert first["prompt"] == prompt
    assert first["test"].startswith("test_a.py::test_prompt[")
    assert (second["test"], second["prompt"]) == ("test_a.py::test_none", "")
    page = (project.path / "r.html").read_text("utf-8")
    assert "<b>red</b>" not in page
    assert f"“{html.escape('a <b>red</b>')}" in page
    assert "<dt>test</dt><dd><code>test_a.py::test_none</code>" in page


def candidates(project: pytest.Pytester) -> list[Path]:
    return sorted(project.path.rglob("*.candidate"))


@pytest.mark.parametrize("workers", [(), ("-p", "xdist", "-n", "2")])
def test_no_candidate_is_left_behind(project: pytest.Pytester, workers: tuple[str, ...]) -> None:
    def go(*args: str) -> pytest.RunResult:
        return project.runpytest(*workers, *args) if workers else run(project, *args)

    write(project, FIXTURE)
    go().assert_outcomes(failed=2)
    made = candidates(project)
    assert len(made) == 2
    kept = [path.read_bytes() for path in made]
    go("--truestep-update").assert_outcomes(passed=2)
    assert candidates(project) == []
    for path, content in zip(made, kept, strict=True):  # the reference came by another way
        path.write_bytes(content)
    write(project, FIXTURE, "1.01")
    go().assert_outcomes(failed=2)
    assert candidates(project) == made  # and is another one: what was made is evidence
    write(project, FIXTURE)
    go().assert_outcomes(passed=2)
    assert candidates(project) == []


def test_a_candidate_of_a_test_that_is_gone_is_removed_by_a_complete_run(
    project: pytest.Pytester,
) -> None:
    write(project, FIXTURE)
    run(project)
    assert len(candidates(project)) == 2
    write(project, FIXTURE.replace("test_latent", "test_renamed"))
    run(project, "-k", "test_many")
    assert len(candidates(project)) == 2
    run(project)
    assert [("renamed" in p.name, "many" in p.name) for p in candidates(project)] == [
        (False, True),
        (True, False),
    ]


def kept(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("not replaced")]


def test_an_update_says_what_it_does_not_replace(project: pytest.Pytester) -> None:
    write(project, FIXTURE)
    assert kept(run(project, "--truestep-update")) == []
    (line,) = kept(run(project, "--truestep-update"))
    assert line.startswith("not replaced (there already): default/cpu/any/test-a-py-test-latent-")
    assert line.endswith("; --truestep-update=all replaces them")
    assert "test-a-py-test-many-all-" in line
    assert kept(run(project)) == []
    text = FIXTURE.replace("values * SCALE)", "values * SCALE, slice_spec=SPEC)")
    spec = "SPEC = SliceSpec(kind='first', ranges=((0, 1), (0, 1), (0, 1), (0, 3), (0, 3)))"
    write(project, f"from truestep.judge.latent import SliceSpec\n{spec}\n{text}")
    there, rule = kept(run(project, "--truestep-update"))
    assert there.startswith("not replaced (there already): ")
    assert "test-many" in there
    assert "test-latent" not in there
    assert rule.startswith("not replaced (there already, made by another rule than the test's of")
    assert "test-latent" in rule
    assert "test-many" not in rule
    assert kept(run(project, "--truestep-update=all")) == []


def test_an_update_says_that_a_promoted_reference_stays(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUESTEP_CACHE", str(project.path / "cache"))
    monkeypatch.setenv("TRUESTEP_STORE", str(project.path / "store"))
    remote = open_store(address(str(project.path / "store")))
    write(project, FIXTURE)
    run(project, "--truestep-update")
    root = project.path / "truestep-references"
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")]
    for name in names:
        note = Note("why", "Ada", "c0ffee")
        promote(root, name, remote, judge=lambda *_: ("identical", "the same"), note=note)
    before = {name: (root / name).read_bytes() for name in names}
    write(project, FIXTURE, "1.01")
    result = run(project, "--truestep-update=all")
    result.assert_outcomes(passed=2)
    (line,) = kept(result)
    assert line.startswith("not replaced (promoted: what was made is a draft beside it): ")
    assert "written: " not in result.stdout.str()
    assert before == {name: (root / name).read_bytes() for name in names}


def test_an_update_says_that_what_it_keeps_is_judged_otherwise(project: pytest.Pytester) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    write(project, FIXTURE)
    run(project, "--truestep-update")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm first"):
        assert os.system(f"git {words}") == 0
    write(project, FIXTURE.replace('name="all")', 'name="all", tolerance=0.5)'))
    there, otherwise = kept(run(project, "--truestep-update", "--truestep-locked=HEAD"))
    assert there.startswith("not replaced (there already): ")
    assert otherwise.startswith(
        "not replaced, and now judged otherwise: 1 rule was changed in test_a.py since "
    )


def test_a_page_of_a_case_has_its_prompt_once(tmp_path: Path) -> None:
    from truestep.report import html as page
    from truestep.verdict import Rule, Side, Verdict

    def made(**fields: object) -> str:
        comparison = Comparison(
            verdict=Verdict.IDENTICAL, sentence="identical: all", rule=Rule(name="a", text="b"),
            actual=Side(label="x"), reference=Side(label="y"), **fields,
        )  # fmt: skip
        page.write_many(tmp_path / "r.html", [comparison])
        return (tmp_path / "r.html").read_text("utf-8")

    for case in ({"prompt": "a cat"}, {"call": {"prompt": "a cat"}}, {}):
        text = made(case=case, prompt="" if case else "a cat")
        assert text.count('<p class="prompt">“a cat”</p>') == 1
    assert '<p class="prompt">' not in made(case={"call": {"prompt": ["two", "texts"]}})
