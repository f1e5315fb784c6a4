"""Public names, import direction, start-up without torch, and the published schema."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import truestep
from tests import limits
from tests.imports import (
    KINDS,
    ROOMS,
    SOURCE,
    VOCABULARY,
    Kind,
    against_the_order,
    circles,
    graph,
    imported,
    modules,
    room,
)
from truestep.verdict import Results

ROOT = Path(__file__).parent.parent

PURE = (
    "judge.divergence",
    "judge.growth",
    "judge.floor",
    "floors",
    "records",
    "judge.rule",
    "judge.tail",
    "verdict",
    "measure.distance",
    "measure.sketch",
    "measure.structure",
    "measure.sound",
    "judge.media",
    "judge.modality",
    "judge.pictures",
    "judge.rows",
    "judge.sentence",
    "gates.kinds",
    "serving.judging",
    "serving.plan",
    "gates.selftest",
    "gates.thresholds.rule",
    "gates.thresholds.linting",
    "experiment.ablation_records",
    "experiment.bisecting.changes",
    "experiment.bisecting.outcomes",
    "experiment.bisecting.records",
    "experiment.bisecting.search",
    "experiment.bisecting.sets",
    "experiment.bisecting.telling",
    "experiment.attribution",
    "experiment.baseline",
    "experiment.perf_records",
    "measure.aligning",
    "measure.frames",
    "measure.listening",
    "measure.recolouring",
    "experiment.judging",
    "experiment.planning",
    "experiment.prompts",
    "experiment.records",
    "experiment.statistics",
    "pairing.records",
    "pairing.rename",
    "pairing.content",
    "pairing.fused",
    "pairing.state",
    "pairing.structure",
    "pairing.parameters",
    "pairing.modules",
    "pairing.solve",
    "pairing.activations",
)


def test_public_names_are_sorted_and_exist() -> None:
    assert truestep.__all__ == [
        "CallCase",
        "Case",
        "Comparison",
        "Environment",
        "EquivalenceError",
        "Recording",
        "TrainingStep",
        "Verdict",
        "ablate",
        "accelerate",
        "assert_equivalent",
        "batch_invariance",
        "capture",
        "check",
        "check_function",
        "check_latent",
        "check_training",
        "compare",
        "compare_traces",
        "compare_weights",
        "log_probability_gap",
        "record",
        "record_function",
        "record_training",
        "replay_trace",
        "watch",
    ]
    for name in truestep.__all__:
        assert callable(getattr(truestep, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        truestep.nothing  # noqa: B018


def test_public_names_survive_importing_everything() -> None:
    code = (
        "import truestep, truestep.replay.check, truestep.replay.record, truestep.judge.compare\n"
        "assert callable(truestep.check) and callable(truestep.record)\n"
        "assert callable(truestep.compare)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_is_in_a_room() -> None:
    assert [name for name in modules() if room(name) and room(name) not in ROOMS] == []
    assert all((SOURCE / f"{name}.py").exists() for name in VOCABULARY)


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions count: what is hidden there is a circle all the same."""
    assert circles(graph("top", "lazy")) == []
    assert circles(graph(*KINDS)) == []


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert circles(edges) == [["a", "b", "c"], ["e", "f"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_of_every_kind_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport a\n"
        "if TYPE_CHECKING:\n    from b import c\n"
        "class K:\n    import d\n    def f(self):\n        from e import g\n        import h.i\n"
    )
    assert imported(path, "top") == {"typing", "typing.TYPE_CHECKING", "a", "d"}
    assert imported(path, "lazy") == {"e", "e.g", "h.i"}
    assert imported(path, "typing") == {"b", "b.c"}


@pytest.mark.parametrize("kind", KINDS)
def test_rooms_import_one_way(kind: Kind) -> None:
    assert against_the_order(graph(kind)) == []


def test_an_import_against_the_order_is_found() -> None:
    wrong = {"judge.rows": {"replay.stages", "measure.plain"}, "keys": {"judge.rows"}}
    assert against_the_order(wrong) == [
        "judge.rows imports replay.stages",
        "keys imports judge.rows",
    ]
    assert against_the_order({"cli.app": {"__init__"}}) == ["cli.app imports __init__"]


FAMILY = re.compile(r"(?<![a-z])(wan(?!t)|cosmos|ltx|hunyuan|flux|qwen|mochi|gemma)", re.IGNORECASE)


def test_no_family_is_named_outside_the_runtime_and_engines() -> None:
    """Docstrings may give examples; code may not know them."""
    allowed = ("runtime", "engines", "testing")
    named = {
        name: lines
        for name, path in modules().items()
        if room(name) not in allowed and (lines := families_in(path.read_text("utf-8")))
    }
    assert named == {}


def families_in(text: str) -> list[str]:
    """Lines of code that name a family; comments and lone strings left out."""
    tree = ast.parse(text)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [
        line.strip()
        for number, line in enumerate(text.splitlines(), 1)
        if number not in prose
        and FAMILY.search(line.partition("  #")[0])
        and not line.lstrip().startswith("#")
    ]


def test_named_families_are_found() -> None:
    assert families_in("x = 1  # as Wan does") == []
    assert families_in('"""Like Wan."""\nwanted = 1\nif name == "WanPipeline":\n    pass') == [
        'if name == "WanPipeline":'
    ]


def test_safetensors_files_are_read_in_one_place() -> None:
    """Through the checks of hostile headers: no reader of the safetensors package itself."""
    readers = {"safe_open", "load_file", "load"}
    found = {
        name
        for name, path in modules().items()
        for full in imported(path, *KINDS)
        if full.startswith("safetensors") and full.rpartition(".")[2] in readers
    }
    assert found == set()


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_no_io(module: str) -> None:
    outside = {"os", "pathlib", "io", "shutil", "subprocess", "tempfile", "socket"}
    found = imported(modules()[module], *KINDS)
    assert not found & outside
    assert not [name for name in found if name.startswith(("truestep.cli", "truestep.report"))]
    assert not [name for name in found if name.startswith("truestep.runtime")]


LIGHT = [
    "import truestep",
    "import truestep; truestep.Case, truestep.Verdict, truestep.EquivalenceError",
    "import truestep.pytest_plugin",
    "import truestep.parity",
    "import truestep.recording.store",
    "import truestep.report.html, truestep.report.terminal",
    "from truestep.cli.app import app; app(['--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['check', '--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['parity', 'new', '-h'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['ab', '--help'], standalone_mode=False)",
    "import truestep.judge.known, truestep.gates.thresholds.file",
    "import truestep.dropin.fastvideo, truestep.dropin.sglang, truestep.dropin.diffusers",
    "from truestep.cli.app import app; app(['thresholds', 'lint', '-h'], standalone_mode=False)",
    "import truestep.experiment.store, truestep.experiment.table, truestep.report.ab",
    "import truestep.report.ablation",
    "import truestep.report.markdown, truestep.report.ci, truestep.report.pull_request",
    "import truestep.report.brief, truestep.report.details",
    "from truestep.cli.app import app; app(['ablate', '--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['bisect', '--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['tiny', '--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['serve-check', '-h'], standalone_mode=False)",
    "import truestep.testing.tiny",
    "from truestep.cli.app import app; app(['show', 'profile'], standalone_mode=False)",
]


@pytest.mark.parametrize("code", LIGHT)
def test_no_torch_at_start_up(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {{'torch', 'diffusers', 'av'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


MODELS = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}


@pytest.mark.parametrize(
    ("arguments", "libraries", "most"),
    [
        (["--help"], {"click"}, 7),
        (["show", "plain.json"], {"click"}, 12),
        (["show", "recording.safetensors"], {"click", "xxhash", *MODELS}, 20),
    ],
)
def test_what_is_imported_by_commands_that_must_feel_instant(
    tmp_path: Path, arguments: list[str], libraries: set[str], most: int
) -> None:
    """As whole processes: parent and child of the guard, and what the interpreter adds left out."""
    import torch

    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.recording.table import tensor_table

    (tmp_path / "plain.json").write_text('{"a": 1}')
    tensors = {"latent/final": torch.randn(1, 4, 2, 8, 8)}
    manifest = Manifest(
        tool_version="0", created="now", level="full", tensors=tensor_table(tensors)
    )
    Recording.in_memory(tensors, manifest).save(tmp_path / "recording.safetensors")

    def imported(*code: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *code],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        return {line.rpartition("|")[2].strip() for line in lines}

    found = imported("-m", "truestep", *arguments) - imported("-c", "pass")
    ours = {name for name in found if name.partition(".")[0] == "truestep"}
    others = {name.partition(".")[0] for name in found - ours} - sys.stdlib_module_names
    private = {name for name in others if name.startswith("_sysconfigdata")} | {"org"}  # pickle's
    assert others - private <= libraries
    assert len(ours) <= most, sorted(ours)


def test_models_are_built_when_they_are_first_used() -> None:
    """Comparisons are a tenth of a second to build, which `show` and `doctor` need not spend."""
    code = (
        "from truestep.recording.manifest import Manifest\n"
        "from truestep.verdict import Comparison, Rule\n"
        "assert not Comparison.__pydantic_complete__ and not Manifest.__pydantic_complete__\n"
        "assert Rule(name='x', text='y').name == 'x' and Rule.__pydantic_complete__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


SCHEMAS = runpy.run_path(str(ROOT / "docs" / "schema" / "write.py"))["SCHEMAS"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_current(name: str) -> None:
    path = ROOT / "docs" / "schema" / f"{name}.json"
    assert json.loads(path.read_text()) == SCHEMAS[name].model_json_schema(mode="serialization"), (
        f"{path.name} is stale: make schema"
    )


def test_every_published_schema_is_written_by_make_schema() -> None:
    assert {path.stem for path in (ROOT / "docs" / "schema").glob("*.json")} == set(SCHEMAS)


def test_real_results_fit_the_schema() -> None:
    import jsonschema
    import torch

    schema = json.loads((ROOT / "docs" / "schema" / "results-1.json").read_text())
    x = torch.randn(3, 4)
    results = Results.of(
        [truestep.compare(x, x), truestep.compare(x * float("nan"), x), truestep.compare({}, {})]
    )
    jsonschema.validate(json.loads(results.model_dump_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"verdict": "fine"}, schema)


def test_test_files_have_names_of_their_own() -> None:
    """Folders of tests are no packages: of two files of one name only one could be imported."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_modules_and_functions_keep_to_the_limits(name: str) -> None:
    assert limits.over(modules()[name].read_text("utf-8")) == []


HEAD = '"""A module."""\n\nimport math\n\n'


def test_a_module_of_501_lines_is_found() -> None:
    assert limits.over(HEAD + "\n" * 496) == []
    (found,) = limits.over(HEAD + "\n" * 497)
    assert found == (
        "the module has 501 lines, 500 are allowed: "
        "split it in two that each have one job and a name that says it"
    )
    assert limits.over("# long: it is copied as it is\n" + HEAD + "\n" * 497) == []
    for no_reason in ("# long:\n", "# longer\n", '"""# long: in a text."""\n'):
        assert limits.over(no_reason + HEAD + "\n" * 497)
    assert limits.over(HEAD + "# long: too late to be seen\n" + "\n" * 497)


def test_a_function_of_61_lines_is_found() -> None:
    text = '"""Docstrings\n    do not\n    count."""'
    body = f"\n    {text}\n" + "    pass\n" * 59
    assert limits.over(f"def work():{body}") == []
    (found,) = limits.over(f"def work():{body}    pass\n")
    assert found == ("work has 61 lines of code, 60 are allowed: take out a step that has a name")
    assert limits.over(f"def work():  # long: a table of cases{body}    pass\n") == []
    assert limits.over(f"def work():  # 9 parameters: of the verb{body}    pass\n") == [found]
    inside = "class A:\n    async def work(self):\n" + "        pass\n" * 60
    assert limits.over(inside) == [found.replace("work", "A.work", 1)]


def test_a_function_of_9_parameters_is_found() -> None:
    eight, nine = "a, b, c, d, /, e, *f, g, **h", "a, b, c, d, /, e, *f, g, i, **h"
    assert limits.over(f"def work({eight}): ...") == []
    (found,) = limits.over(f"def work({nine}): ...")
    assert found == (
        "work has 9 parameters, 8 are allowed: make one object of those that go together"
    )
    assert limits.over(f"class A:\n    def work(self, {eight}): ...") == []
    assert limits.over(f"class A:\n    def work(self, {nine}): ...") == [f"A.{found}"]
    reason = "def work(  # {} parameters: the options of a verb\n    {}\n):\n    ...\n"
    assert limits.over(reason.format(9, nine)) == []
    assert limits.over(reason.format("9 parameters, long", nine).replace(" parameters:", ":")) == []
    (other,) = limits.over(reason.format(10, nine))
    assert "8 are allowed, and its reason is for 10: make one object" in other


def test_a_reason_that_nothing_needs_is_found() -> None:
    for reason in (
        "long: once it was",
        "9 parameters: once it had them",
        "9 parameters, long: was",
    ):
        (found,) = limits.over(f"def work():  # {reason}\n    pass\n")
        assert found == "work gives a reason to be over a limit, and is over none: delete it"
    assert limits.over("def work():  # longer: a comment\n    pass\n") == []


def test_no_helper_of_tests_is_taken_for_a_test() -> None:
    """Pytest runs whatever begins with `test`, a helper that runs pytest too."""
    assert taken_for_tests("def tested(*words): ...\ndef test_it(): ...\ndef told(): ...") == [
        "tested"
    ]
    found = {
        path.name: names
        for path in Path(__file__).parent.rglob("test_*.py")
        if (names := taken_for_tests(path.read_text("utf-8")))
    }
    assert found == {}


def taken_for_tests(text: str) -> list[str]:
    """Functions of a test file that pytest takes for tests, and that are not named as one."""
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("test") and not name.startswith("test_")]
