"""The screen of every verb: a dozen lines no wider than the terminal, on a pass and on a failure.

A verb that is not in the table fails `test_every_verb_is_in_the_table`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.commands import write_cases
from truestep.cli import run_here
from truestep.cli.app import app
from truestep.screen import LINES

SERVER = "http://127.0.0.1:9"
"""Nothing answers there."""

CHANGES = """
def dropped(pipe):
    pipe.transformer.proj_out.bias = None


def same(pipe):
    pass


def port():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained("MODEL", subfolder="transformer")


def wrong():
    model = port()
    model.proj_out.bias.data += 0.1
    return model
"""

DATA = {
    "mcp": "speaks a protocol on stdout",
}
"""Verbs that print no screen, and why."""


@dataclass(frozen=True)
class Screen:
    """What a verb is called with, and the exit code that is expected.

    Attributes:
        words: After the verb; `{root}` is the shared folder.
        slow: It runs a program of its own, or for many seconds.
    """

    words: tuple[str, ...]
    code: int = 0
    slow: bool = False


def at(*words: str, code: int = 0, slow: bool = False) -> Screen:
    return Screen(words, code, slow)


PYTHON = ("--", sys.executable, "-c")
NOTHING = (*PYTHON, "pass")
MODULE = (
    "import torch; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); m.eval(); m(torch.ones(1, 4))"
)
PROFILES = ("--from", "official@f4b06fb", "--to", "official@822ce3c")

TABLE: Mapping[str, tuple[Screen, ...]] = {
    "demo": (at("--output", "story", slow=True),),
    "tiny": (at("FluxPipeline", "new-{width}"), at("NoSuchPipeline", "none", code=2)),
    "record": (
        at("a", "--floor", "none", "--update"),
        at("a", "b", "--floor", "none", "--update"),
        at("a", "--dry-run"),
        at("a", "b", "--dry-run"),
        at("nosuch", code=2),
    ),
    "check": (
        at("a"),
        at("a", "--apply", "change.py:dropped", code=1),
        at("--apply", "change.py:dropped", code=1),
        at("a", "--references", "empty", code=3),
        at("a", "b", "--dry-run"),
    ),
    "compare": (
        at("a.safetensors", "a.safetensors"),
        at("b.safetensors", "a.safetensors", code=1),
        at("moved.npy", "plain.npy", code=1),
    ),
    "weights": (
        at("{model}/transformer", "{model}/transformer"),
        at("w1.safetensors", "w0.safetensors", code=1),
    ),
    "trace compare": (
        at("t.safetensors", "t.safetensors"),
        at("t1.safetensors", "t.safetensors", code=1),
    ),
    "trace record": (
        at("a", "--steps", "0", "--output", "again.safetensors"),
        at("a", "--steps", "9", code=2),
    ),
    "trace run": (
        at("--output", "ran.safetensors", *PYTHON, MODULE, slow=True),
        at(*NOTHING, code=4),
    ),
    "trace batch": (at("a"),),
    "trace replay": (
        at("t.safetensors", "change.py:port"),
        at("t.safetensors", "change.py:wrong", code=1),
    ),
    "trace recorder": (at("--write", "recorder-{width}.py"), at("--write", "change.py", code=2)),
    "trace recover": (at("nosuch.safetensors", code=2),),
    "ab run": (
        at(
            "a",
            "--set",
            "cfg=batched",
            "--rounds",
            "1",
            "--warmup",
            "0",
            "--output",
            "ab-{width}",
            code=4,
        ),
        at(
            "a",
            "--apply",
            "change.py:dropped",
            "--rounds",
            "1",
            "--warmup",
            "0",
            "--output",
            "ab1-{width}",
            code=1,
        ),
        at("recover", "none", code=2),
    ),
    "ab quality": (
        at(
            "builtin:digits",
            "--vs",
            "steps=2",
            "--set",
            "steps=3",
            "--num-prompts",
            "3",
            "--seeds",
            "3",
            "--output",
            "quality-{width}",
            code=4,
        ),
        at("builtin:digits", code=2),
    ),
    "ab ablate": (at("ltx", *PROFILES, slow=True), at("ltx", code=2)),
    "bisect": (
        at("--env", "MANY=1..90", *PYTHON, 'import os; exit(int(os.environ["MANY"]) > 50)'),
        at("--env", "A=0..1", "--env", "B=0..1", *NOTHING, code=4),
        at("--env", "A=0", *NOTHING, code=2),
    ),
    "engine run": (
        at("--output", "one.safetensors", "--", sys.executable, "{program}", slow=True),
        at(*NOTHING, code=4),
    ),
    "engine inject": (at("flux.safetensors", *NOTHING, code=4),),
    "engine check": (
        at("flux.safetensors", "--model", "{flux}"),
        at("flux1.safetensors", "--model", "{flux}", code=1),
    ),
    "engine compare": (
        at("flux.safetensors", "flux.safetensors"),
        at("flux1.safetensors", "flux.safetensors", code=1),
        at("flux1.safetensors", "flux.safetensors", "flux.safetensors", code=1),
    ),
    "engine recover": (at("nosuch.safetensors", code=2),),
    "engine node": (
        at("--write", "node-{width}.py", "--inputs", "flux.safetensors", "--force"),
        at("--write", "change.py", code=2),
    ),
    "engine list": (at(),),
    "parity new": (
        at("acme", "mixer{width}", "--kind", "generic"),
        at("acme", "mixer", "--kind", "nosuch", code=2),
    ),
    "parity run": (at("parity", code=1, slow=True),),
    "parity status": (at("parity", code=1), at("nothing-here", code=2)),
    "parity show": (at("acme/red", "parity"), at("acme/none", "parity", code=2)),
    "parity keys": (
        at("w0.safetensors", "{model}/transformer/diffusion_pytorch_model.safetensors"),
        at("w0.safetensors", code=2),
    ),
    "gate against": (
        at("a", "--baseline", sys.prefix, slow=True),
        at("a", "--baseline", "no-such-revision", code=2),
    ),
    "gate selftest": (
        at("a"),
        at("a", "--gate", "ssim:0.93", "--gate", "psnr:28", "--gate", "mad:10", "--gate", "slice"),
        at("a", "--gate", "nosuch", code=2),
    ),
    "gate thresholds lint": (
        at("limits.json", "--reference", "a.safetensors", code=1),
        at("many.json", "--reference", "a.safetensors", code=1),
        at("change.py", code=2),
    ),
    "gate thresholds write": (
        at("a", "--output", "made-{width}.json", slow=True),
        at("nosuch", "--output", "x.json", code=2),
    ),
    "references list": (at(), at("--history"), at("--references", "many"), at("nosuch", code=2)),
    "references status": (at(), at("--references", "many")),
    "references push": (
        at(),
        at("--references", "many", "--store", "empty", code=3),
    ),
    "references pull": (at(), at("--references", "many", "--store", "empty", code=2)),
    "references verify": (at(), at("--references", "many", "--store", "empty", code=2)),
    "references adopt": (
        at("a.safetensors", "--references", "adopted-{width}"),
        at("plain.npy", code=2),
    ),
    "references promote": (
        at("b", "--reason", "w{width}", "--references", "drafts-{width}"),
        at("b", code=2),
    ),
    "references rollback": (at("a", "--reason", "no", code=2),),
    "references prune": (
        at(),
        at("--older-than", "0"),
        at("--store", "littered", "--older-than", "0"),
    ),
    "show": (
        at("a.safetensors"),
        at("flux.safetensors"),
        at("{model}"),
        at("truestep-references"),
        at("many"),
        at("{root}"),
        at("result.json", "c0"),
        at("profile"),
        at("profile", "diffusers-0.42.1"),
        at("profile", "diffusers-0.42.1", "official@f4b06fb"),
        at("nosuch", code=2),
    ),
    "doctor": (
        at(),
        at("{model}"),
        at("--recipe", "a"),
        at("broken", code=2),
    ),
    "run": (at("a"), at("a", "b", "--latent-only"), at("nosuch", code=2)),
    "perf record": (at("a", "--runs", "2"), at("nosuch", code=2)),
    "perf check": (
        at("a", "--runs", "4", "--history", "fast.sqlite"),
        at("a", "--runs", "4", "--history", "slow.sqlite", code=1),
        at("a", "b", "--runs", "4", "--history", "slow.sqlite", code=1),
        at("a", "--runs", "2", "--history", "none.sqlite", code=3),
        at("a", "--runs", "3", "--history", "few.sqlite", code=4),
    ),
    "perf show": (at("--history", "fast.sqlite"), at("--history", "none.sqlite", code=2)),
    "perf import": (
        at("perf_baselines.json", "--history", "imported.sqlite"),
        at("bad_baselines.json", "--history", "imported.sqlite", code=1),
    ),
    "training record": (
        at("steps.py:trusted", "--no-floor", "--output", "again.safetensors"),
        at("steps.py:nothing", code=2),
    ),
    "training check": (
        at("steps.py:trusted"),
        at("steps.py:fused", code=1),
        at("steps.py:fused", "plain.npy", code=2),
        at("steps.py:fused", "a.safetensors", code=2),
    ),
    "training gap": (
        at("sampled.safetensors", "sampled.safetensors"),
        at("trained.safetensors", "sampled.safetensors", code=1),
        at("plain.npy", "sampled.safetensors", code=2),
    ),
    "sensitivity": (
        at("a", "--change", "gguf:Q4_0", "--keep", "30%", "--probes", "2"),
        at("a", "--change", "int9", code=2),
    ),
    "bundle": (at("a.safetensors", "--output", "bundle.safetensors"), at("plain.npy", code=2)),
    "serve-check": (
        at(SERVER, "--dry-run"),
        at(SERVER, "--dry-run", "--kind", "video", "--seeds", "20"),
        at(SERVER, "--timeout", "1", code=2),
    ),
    "comment": (at("result.json", "--output", "comment.md"), at("plain.npy", code=2)),
    "new test": (at("{flux}", "--output", "test_{width}.py"), at("none", code=2)),
    "skill": (at("--write", "skill-{width}"), at("--write", "skill-60", code=2)),
}


class Place:
    """The shared folder, and the command line in it."""

    def __init__(self, root: Path, **places: Path) -> None:
        self.root, self.places = root, {"root": root, **places}

    def run(self, *words: str, width: int = 80) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a verb, run in this process."""
        import io
        from contextlib import redirect_stderr, redirect_stdout

        out, err = io.StringIO(), io.StringIO()
        filled = [self.filled(word, width) for word in words]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.root)
            patch.setattr(sys, "argv", ["truestep", *filled])
            patch.setenv("COLUMNS", str(width))
            patch.delenv("TRUESTEP_STORE", raising=False)
            code = run_here()
        assert "Traceback" not in err.getvalue(), err.getvalue()
        return code, out.getvalue(), err.getvalue()

    def apart(self, *words: str, width: int) -> tuple[int, str, str]:
        """Likewise in a process of its own: a program that it runs needs a real stderr."""
        environment = {k: v for k, v in os.environ.items() if k != "TRUESTEP_STORE"}
        done = subprocess.run(
            [sys.executable, "-m", "truestep", *(self.filled(word, width) for word in words)],
            cwd=self.root,
            env={**environment, "COLUMNS": str(width)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    def filled(self, word: str, width: int) -> str:
        """A word of the table with the names of places in it."""
        for name, path in {**self.places, "width": width}.items():
            word = word.replace(f"{{{name}}}", str(path))
        return word


@pytest.fixture(scope="module")
def place(
    tiny_wan: dict[str, Path],
    tiny_ltx2: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """A folder with what the verbs are called on."""
    root = tmp_path_factory.mktemp("screens")
    flux = root / "a-folder-of-models" / "flux"
    found = Place(root, model=tiny_wan["wan21"], flux=flux, program=root / "program.py")
    with planted():
        cases(found, tiny_ltx2["2.3"])
        tensors(found)
        engines(found)
        references(found)
        ledgers(root)
        histories(found)
        trainers(found)
        yield found


def ran(place: Place, *words: str, code: int = 0) -> str:
    """What prepares the folder."""
    ended, out, err = place.run(*words)
    assert ended == code, (words, out, err)
    return out


def cases(place: Place, ltx2: Path) -> None:
    """A case file of three cases, their references, results and traces."""
    root = place.root
    write_cases(root, place.places["model"], "a", "b")
    (root / "ltx").mkdir()
    text = (root / "truestep.toml").read_text().replace("steps = 2", "steps = 4")  # as planted runs
    (root / "truestep.toml").write_text(text)
    (root / "change.py").write_text(CHANGES.replace("MODEL", str(place.places["model"])))
    ran(place, "record", "a")
    ran(place, "record", "b", "--floor", "none")
    (root / "truestep.toml").write_text(text + LTX2.format(model=ltx2))
    for name, path in zip(
        "ab", sorted(root.glob("truestep-references/**/*.safetensors")), strict=True
    ):
        shutil.copy(path, root / f"{name}.safetensors")
    ran(place, "check", "a", "--apply", "change.py:dropped", "--json", "result.json", code=1)
    ran(place, "trace", "record", "a", "--steps", "0", "--inputs", "--level", "full", "--output",
        "t.safetensors")  # fmt: skip
    ran(place, "trace", "record", "a", "--steps", "0", "--inputs", "--level", "full", "--output",
        "t1.safetensors", "--apply", "change.py:dropped")  # fmt: skip


LTX2 = """
[case.ltx]
model = "{model}"
prompt = "a red three moving left"
height = 32
width = 32
num_frames = 9
steps = 2
max_sequence_length = 16
settings = {{ stg_blocks = [1], audio_stg_blocks = [1], device = "cpu" }}
"""


def tensors(place: Place) -> None:
    """Files of numbers, weights, and thresholds."""
    root = place.root
    values = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    np.save(root / "plain.npy", values)
    np.save(root / "moved.npy", values + 0.1)
    weights = {f"blocks.{i}.attn.to_q.weight": torch.randn(8, 8) for i in range(20)}
    save_file(weights, root / "w0.safetensors")
    save_file({k: v + 0.1 for k, v in weights.items()}, root / "w1.safetensors")
    limits = {"ssim_threshold": 0.29, "psnr_threshold": 11.7, "mean_abs_diff_threshold": 47.0}
    (root / "limits.json").write_text(json.dumps({"cases": {"a": limits}}))
    each = {f"ltx_2_3_two_stage_ti2v_{i}gpus": {**limits, f"unknown_{i}": 1} for i in range(20)}
    (root / "many.json").write_text(json.dumps({"cases": each}))
    (root / "broken").mkdir()


def engines(place: Place) -> None:
    """Recordings of a pipeline's calls, right and with a fault."""
    from truestep.testing import tiny

    place.places["flux"].parent.mkdir()
    tiny.save("FluxPipeline", place.places["flux"])
    (place.root / "program.py").write_text(PROGRAM)
    size = ("--set", "height=32", "--set", "width=32", "--set", "num_inference_steps=2")
    what = ("--prompt", "a red fox in the snow", *size, "--floor", "none")
    words = ["record", str(place.places["flux"]), *what]
    ran(place, *words, "--output", "flux.safetensors")
    ran(place, *words, "--output", "flux1.safetensors", "--apply", "change.py:dropped")


PROGRAM = """
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

scheduler = FlowMatchEulerDiscreteScheduler()
scheduler.set_timesteps(3)
latent = torch.zeros(1, 4, 8, 8)
for t in scheduler.timesteps:
    latent = scheduler.step(torch.ones_like(latent), t, latent).prev_sample
"""


def references(place: Place) -> None:
    """A store of a team's references, and a lock that names many which nobody has."""
    from truestep.recording.lock import read_lock

    root = place.root
    text = (root / "truestep.toml").read_text()
    (root / "truestep.toml").write_text('[references]\nstore = "store"\n' + text)
    ran(place, "references", "push")
    ran(place, "references", "promote", "a", "--reason", "the first of all")
    for width in (60, 80):
        shutil.copytree(root / "truestep-references", root / f"drafts-{width}")
    many = root / "many"
    many.mkdir()
    lock = read_lock(root / "truestep-references").references
    name = next(name for name, entry in lock.items() if entry.promoted)
    known = json.loads((root / "truestep-references" / "truestep.lock").read_text())
    entry = known["references"][name]
    folder, _, case = name.rpartition("/")
    for number in range(40):
        content = json.dumps(entry)
        for sha in lock[name].named:
            content = content.replace(sha, f"{number:02d}{sha[2:]}")
        known["references"][f"{folder}/{number:02d}-{case}"] = json.loads(content)
    (many / "truestep.lock").write_text(json.dumps(known))
    shutil.copytree(root / "store", root / "littered")
    (root / "empty").mkdir()


def ledgers(root: Path) -> None:
    """A parity ledger of components of each state."""
    from datetime import date

    from truestep.parity.evidence import Evidence
    from truestep.parity.ledger import Component, update_ledger

    folder = root / "parity"
    folder.mkdir()
    (folder / "test_red.py").write_text("def test_nothing():\n    pass\n")
    (root / "nothing-here").mkdir()
    entries = [
        Component(
            family="acme", component=name, kind="generic", test="test_red.py::test_nothing",
            coverage_scope="both", evidence=Evidence(date="2026-11-01", result="failed"),
        )
        for name in ("red", *(f"part{number}" for number in range(20)))
    ]  # fmt: skip
    update_ledger(folder, entries, date(2026, 11, 1))


def trainers(place: Place) -> None:
    """Training steps, right and with a fault, the record of one, and log-probabilities."""
    from tests.documents import BLOCK, ROOT

    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    code = next(block["text"] for block in BLOCK.finditer(text) if block["language"] == "python")
    (place.root / "steps.py").write_text(code)
    ran(place, "training", "record", "steps.py:trusted")
    sampled = torch.randn(30, 4)
    save_file({"log_probability": sampled}, place.root / "sampled.safetensors")
    save_file({"log_probability": sampled + 1e-3}, place.root / "trained.safetensors")


@contextmanager
def planted() -> Iterator[None]:
    """Runs of a planted speed in place of measured ones."""
    from tests.cli.test_perf import Planted
    from truestep.cli import perf

    made = Planted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perf, "_session", made.session)
        patch.setattr(perf, "_measured", made.measured)
        yield


def histories(place: Place) -> None:
    """Histories of runs: of the same speed, of a faster one, and of other tools."""
    from tests.cli.test_perf import SGLANG

    for number in range(6):
        ran(place, "perf", "record", "a", "--runs", "20", "--history", "fast.sqlite", "--label",
            f"commit {number}")  # fmt: skip
    ran(place, "perf", "record", "a", "--runs", "3", "--history", "few.sqlite")
    from tests.experiment.test_baseline import make_run
    from truestep.cli import perf

    def quicker(_: object, __: str, runs: int) -> Iterator[object]:
        return (make_run(0.7) for _ in range(runs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perf, "_measured", quicker)
        for _ in range(3):
            ran(place, "perf", "record", "a", "--runs", "5", "--history", "slow.sqlite")
    (place.root / "perf_baselines.json").write_text(json.dumps(SGLANG))
    bad = json.loads(json.dumps(SGLANG))
    for number in range(20):
        bad["scenarios"][f"broken_scenario_{number}"] = {"expected_e2e_ms": -900.0}
    (place.root / "bad_baselines.json").write_text(json.dumps(bad))


ROWS = [
    pytest.param(verb, screen, id=f"{verb} {number}", marks=[pytest.mark.slow] * screen.slow)
    for verb, screens in TABLE.items()
    for number, screen in enumerate(screens)
]


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize(("verb", "screen"), ROWS)
def test_a_screen_is_a_dozen_lines_as_wide_as_the_terminal(
    verb: str, screen: Screen, width: int, place: Place
) -> None:
    run = place.apart if verb == "parity run" else place.run
    code, out, err = run(*verb.split(), *screen.words, width=width)
    assert code == screen.code, out + err
    lines = out.splitlines()
    assert len(lines) <= LINES, out
    assert not [line for line in lines if too_wide(line, width)], out
    assert "FAILED inconclusive" not in out
    assert lines or err, "a verb says what came of it"
    assert not lines or (lines[0].strip() and not lines[0].startswith(" ")), out


def too_wide(line: str, width: int) -> bool:
    """Whether a line does not fit; a path or an address is not broken, labelled or not."""
    words = line.removesuffix(" \\").split()
    return len(line) > width and not (len(words) <= 2 and len(words[-1]) > width - 20)


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every verb that can be called, with the words before it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from leaves(inner, (*path, name))
    else:
        yield " ".join(path)


def test_every_verb_is_in_the_table() -> None:
    assert {*leaves(app)} == {*TABLE, *DATA}
    for verb, screens in TABLE.items():
        assert screens, verb


def test_a_verb_that_is_new_is_missed_and_a_wide_line_is_seen() -> None:
    group = click.Group("x", commands={"new": click.Command("new")})
    assert [*leaves(group)] == ["new"]
    assert too_wide("a word " * 20, 80)
    assert not too_wide(f"report: /{'x' * 90}", 80)


def test_what_is_listed_is_cut_and_all_of_it_is_printed_with_v(place: Place) -> None:
    _, short, _ = place.run("references", "list", "--references", "many")
    _, whole, _ = place.run("references", "list", "--references", "many", "-v")
    assert short.splitlines()[0].startswith("42 references: 41 promoted, 1 draft;")
    assert " more (-v)" in short
    assert whole.count("  promoted ") == 41
    assert "(-v)" not in whole
