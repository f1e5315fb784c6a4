"""Public names, import direction, start-up without torch, and the published schema."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import truestep
from truestep.verdict import Results

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "truestep"

LAYERS = (
    "text",
    "errors",
    "turns",
    "guard",
    "files",
    "nests",
    "randomness",
    "reading",
    "magic",
    "standalone",
    "records",
    "verdict",
    "controls",
    "case",
    "environment",
    "tail",
    "noise",
    "rule",
    "divergence",
    "repeats",
    "pairing",
    "growth",
    "models",
    "runtime",
    "recording.manifest",
    "recording.columns",
    "recording.header",
    "recording.numpy_files",
    "recording.torch_files",
    "recording.names",
    "known",
    "measure",
    "comparison.plain",
    "comparison.rounding",
    "comparison.distance",
    "comparison.sketch",
    "comparison.structure",
    "comparison.batches",
    "comparison.audio",
    "comparison.media",
    "comparison.modality",
    "recording.format",
    "comparison.matching",
    "comparison.parameters",
    "comparison.sources",
    "comparison.moments",
    "comparison.latent_gate",
    "comparison.api",
    "recording.judging",
    "recording.capture",
    "recording.implementation",
    "recording.touched",
    "recording.replay",
    "recording.answers",
    "recording.raised",
    "recording.tape",
    "recording.instructions",
    "recording.floor",
    "recording.record",
    "recording.calibration",
    "tracing.naming",
    "tracing.moments",
    "tracing.contexts",
    "tracing.site",
    "tracing.writer",
    "tracing.recovery",
    "tracing.comparing",
    "tracing.tracer",
    "tracing.operators",
    "tracing.hooks",
    "tracing.record",
    "tracing.program",
    "tracing",
    "references",
    "calls.keys",
    "calls.values",
    "calls.trees",
    "calls.rebuilding",
    "calls.randomness",
    "calls.classes",
    "calls.subject",
    "calls.boundaries",
    "calls.arguments",
    "calls.roles",
    "calls.recording",
    "calls.recorder",
    "calls.pairing",
    "calls.seen",
    "calls.forcing",
    "calls.choosing",
    "calls.judging",
    "calls.precision",
    "calls.benign",
    "calls.record",
    "calls.check",
    "calls.guidance",
    "calls",
    "checking",
    "functions",
    "gates",
    "selftest",
    "thresholds",
    "experiment",
    "demo",
    "testing.tiny.autoencoders",
    "testing.tiny.encoders",
    "testing.tiny.facts",
    "testing.tiny.unets",
    "testing.tiny.pictures",
    "testing.tiny.videos",
    "testing.tiny.sounds",
    "testing.tiny.denoisers",
    "testing.tiny.exceptions",
    "testing.tiny.words",
    "testing.tiny.tokenizers",
    "testing.tiny.processors",
    "testing.tiny.schedulers",
    "testing.tiny.weights",
    "testing.tiny.building",
    "testing.tiny.calls",
    "testing",
    "parity",
    "report",
    "cli",
    "pytest_fixture",
    "pytest_marked",
    "pytest_plugin",
)
"""Data flow, first to last: a module imports its own layer and earlier ones at its top level."""

PURE = (
    "divergence",
    "growth",
    "noise",
    "records",
    "rule",
    "tail",
    "verdict",
    "comparison.distance",
    "comparison.sketch",
    "comparison.structure",
    "comparison.audio",
    "comparison.media",
    "comparison.modality",
    "comparison.matching",
    "gates",
    "selftest",
    "thresholds.rule",
    "thresholds.linting",
    "experiment.ablation_records",
    "experiment.attribution",
    "measure.frames",
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


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def layer(module: str) -> int:
    return max(
        (i for i, name in enumerate(LAYERS) if module == name or module.startswith(f"{name}.")),
        default=-1,
    )


def imports(path: Path, *, top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def test_public_names_are_sorted_and_exist() -> None:
    assert truestep.__all__ == [
        "Case",
        "Comparison",
        "Environment",
        "EquivalenceError",
        "Recording",
        "Verdict",
        "ablate",
        "accelerate",
        "assert_equivalent",
        "batch_invariance",
        "capture",
        "check",
        "check_function",
        "check_latent",
        "compare",
        "compare_traces",
        "record",
        "record_function",
        "replay_trace",
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


def test_every_module_has_a_layer() -> None:
    exempt = {"__init__", "__main__", "comparison", "recording"}
    assert [name for name in modules() if name not in exempt and layer(name) < 0] == []


@pytest.mark.parametrize("module", [m for m in modules() if layer(m) >= 0])
def test_imports_go_one_way(module: str) -> None:
    for imported in imports(modules()[module], top_only=True):
        if imported.startswith("truestep."):
            name = imported.removeprefix("truestep.")
            assert layer(name) <= layer(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_no_io(module: str) -> None:
    outside = {"os", "pathlib", "io", "shutil", "subprocess", "tempfile", "socket"}
    found = imports(modules()[module], top_only=False)
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
    "from truestep.cli.app import app; app(['thresholds', 'lint', '-h'], standalone_mode=False)",
    "import truestep.experiment.store, truestep.experiment.table, truestep.report.ab",
    "import truestep.report.ablation",
    "from truestep.cli.app import app; app(['ablate', '--help'], standalone_mode=False)",
    "from truestep.cli.app import app; app(['tiny', '--help'], standalone_mode=False)",
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

    from truestep.judge.latent import write_latent_bundle

    (tmp_path / "plain.json").write_text('{"a": 1}')
    write_latent_bundle(tmp_path / "recording.safetensors", torch.randn(1, 4, 2, 8, 8))

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


def test_no_module_is_crowded() -> None:
    sizes = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: size for name, size in sizes.items() if size > 600} == {}
