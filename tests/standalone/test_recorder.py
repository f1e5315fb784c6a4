"""The file of `truestep trace recorder`: run without truestep, read, judged and damaged with it."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import check_function
from truestep.cli import main
from truestep.cli.recorder import standalone_source
from truestep.errors import FileFormatError
from truestep.judge.rows import measured_run
from truestep.measure.distance import distance
from truestep.measure.moments import moments
from truestep.measure.sketch import sketch
from truestep.recording.format import Recording
from truestep.runtime.changes import one_rounding
from truestep.standalone import recorder
from truestep.verdict import Verdict

BARE = """
import sys

REFUSED = {
    "accelerate", "diffusers", "numpy", "pydantic", "safetensors", "scipy", "transformers",
    "truestep", "xxhash",
}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""

MODEL = """
import dataclasses
import torch

@dataclasses.dataclass
class Pair:
    hidden: object
    rest: object = None

class Block(torch.nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.one = torch.nn.Linear(width, width)
        self.two = torch.nn.Linear(width, width)

    def forward(self, x, scale=None):
        x = self.two(torch.nn.functional.silu(self.one(x)))
        return x if scale is None else x * scale

class Nest(torch.nn.Module):
    def forward(self, x):
        kept = Pair(x.to(torch.bfloat16), {"a/b": [x > 0, None], "i.j": (x * 100).to(torch.int8)})
        x += 1000.0  # a copy is not changed by this
        return kept, (x.to(torch.float16).clone(), torch.arange(3)), "text"

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.nest = Nest()

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=torch.tensor(0.5))
        self.nest(x.clone())
        return {"sample": self.blocks[0](x)}

def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind()
"""


def load_model() -> dict[str, Any]:
    space: dict[str, Any] = {}
    exec(MODEL, space)
    return space


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the emitted file and a model, as in another environment."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "recorder.py").write_text(standalone_source())
    (folder / "model.py").write_text(MODEL)
    return folder


def bare(folder: Path, code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in the folder where only torch and the standard library can be imported."""
    head = f"{BARE}\nsys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", head + textwrap.dedent(code)],
        cwd=folder,
        check=check,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def recorded(emitted: Path) -> Path:
    bare(
        emitted,
        """
        import model, recorder, torch
        samples = [recorder.inputs(i, x=(1, 6, 24), scale=((1,), torch.float32)) for i in range(3)]
        recorder.record(model.make(model.Block), samples, "block.safetensors")
        refused = [name for name in REFUSED if name in sys.modules]
        assert not refused, refused
        """,
    )
    return emitted / "block.safetensors"


@pytest.fixture(scope="module")
def traced(emitted: Path) -> Path:
    bare(
        emitted,
        """
        import model, recorder, torch
        torch.set_num_threads(1)
        made = model.make(model.Model)
        for level in recorder.LEVELS:
            path = f"{level}.safetensors"
            with recorder.capture(made, path=path, inputs=True, level=level) as trace:
                for step in range(2):
                    for branch in ("cond", "uncond"):
                        trace.step(step, branch)
                        made(**recorder.inputs(step, x=(2, 800, 24)))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
        """,
    )
    return emitted / "full.safetensors"


def test_a_function_is_recorded_without_truestep_and_judged_with_it(recorded: Path) -> None:
    space = load_model()
    block = space["make"](space["Block"])
    opened = Recording.open(recorded)
    assert list(opened)[:3] == [
        "sample/0000/input/x",
        "sample/0000/input/scale",
        "sample/0000/output/out",
    ]
    ours = recorder.inputs(1, scale=((1,), torch.float32), x=(1, 6, 24))
    assert torch.equal(opened["sample/0001/input/x"], ours["x"])
    with torch.no_grad():
        assert torch.equal(opened["sample/0001/output/out"], block(**ours))
    assert check_function(block, recorded).verdict is Verdict.IDENTICAL
    environment = opened.manifest.environment
    assert environment["library.torch"] == torch.__version__
    assert environment["attention.kernel"] == "unknown"
    assert "(recorder.py)" in opened.manifest.tool_version


def test_a_measured_floor_passes_rounding_and_sees_a_fault(recorded: Path) -> None:
    space = load_model()
    block = space["make"](space["Block"])
    floor = Recording.open(recorded).manifest.noise_floor
    assert floor is not None
    assert {run.kind for run in floor.runs} >= {"repeat", "jitter"}

    def raised(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = block.double()(x.double(), scale.double()).float()
        block.float()
        return made

    result = check_function(raised, recorded)
    assert result.verdict is Verdict.EQUIVALENT
    assert result.rule.name == "floor/2"
    with torch.no_grad():
        block.one.bias[3] += 1e-4
    assert check_function(block, recorded).verdict is Verdict.DRIFTED


def test_a_trace_holds_every_nest_bit_for_bit(traced: Path) -> None:
    space = load_model()
    model = space["make"](space["Model"])
    opened = Recording.open(traced)
    names = set(opened)
    step = "1/uncond"
    assert {n for n in names if n.startswith("module/nest/1/uncond")} == {
        f"module/nest/{step}/in.0",
        f"module/nest/{step}/out.0.hidden",
        f"module/nest/{step}/out.0.rest.a%2Fb.0",
        f"module/nest/{step}/out.0.rest.i%2Ej",
        f"module/nest/{step}/out.1.0",
        f"module/nest/{step}/out.1.1",
    }
    assert f"module/(root)/{step}/out.sample" in names
    assert f"module/(root)/{step}/in.x" in names
    assert f"module/blocks.0/{step}/in.scale" in names
    assert f"module/blocks.0#1/{step}/out.0" in names
    assert "module/blocks.0#2/1/uncond/out.0" not in names
    with torch.no_grad():
        x = recorder.inputs(1, x=(2, 800, 24))["x"]
        seen: list[torch.Tensor] = []
        model.nest.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        final = model(x)["sample"]
    (given,) = seen
    expected = {
        f"module/(root)/{step}/out.sample": final,
        f"module/blocks.0#1/{step}/out.0": final,
        f"module/nest/{step}/in.0": given,
        f"module/nest/{step}/out.0.hidden": given.to(torch.bfloat16),
        f"module/nest/{step}/out.0.rest.a%2Fb.0": given > 0,
        f"module/nest/{step}/out.0.rest.i%2Ej": (given * 100).to(torch.int8),
        f"module/nest/{step}/out.1.0": (given + 1000.0).to(torch.float16),
        f"module/nest/{step}/out.1.1": torch.arange(3),
    }
    for name, tensor in expected.items():
        assert opened[name].dtype is tensor.dtype
        assert torch.equal(opened[name], tensor), name
    entry = next(e for e in opened.manifest.tensors if e.name == f"module/blocks.0#1/{step}/out.0")
    place = (entry.kind, entry.step, entry.branch, entry.fqn, entry.call)
    assert place == ("module", 1, "uncond", "blocks.0", 1)


@pytest.mark.parametrize("level", ["stats", "sketch"])
def test_smaller_levels_hold_what_truestep_would_have_made(level: str, traced: Path) -> None:
    torch.set_num_threads(1)  # as there: others sum in another order
    full = Recording.open(traced)
    small = Recording.open(traced.with_name(f"{level}.safetensors"))
    assert small.manifest.level == level
    assert [e.name for e in small.manifest.tensors] == [e.name for e in full.manifest.tensors]
    for name in full:
        same = torch.equal(small[f"stats/{name}"], moments(full[name]))
        assert same, name
        if level == "sketch":
            assert torch.equal(small[f"sketch/{name}"], sketch(full[name])), name


@pytest.mark.parametrize("count", [0, 5, 1024, 1025, 16_384, 16_385, 100_000])
def test_sketches_and_moments_of_any_size_agree(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[::97] = float("nan")
    assert torch.equal(recorder._sketch(x), sketch(x))
    assert torch.equal(recorder._moments(x).nan_to_num(-9), moments(x).nan_to_num(-9))


@pytest.mark.parametrize("shape", [(1, 3, 2, 4, 5), (2, 3, 4, 5), (2, 7, 5), (7, 5), (9,), ()])
def test_the_floor_is_measured_as_truestep_measures_it(shape: tuple[int, ...]) -> None:
    dice = torch.Generator().manual_seed(0)
    a, r = (torch.randn(shape, generator=dice) for _ in range(2))
    for actual in (a, r + 1e-4 * a, r):
        (row,) = measured_run("repeat", "", "float32/float32", {"x": (actual, r)}).tensors
        found = recorder._distance("x", actual, r)
        assert found["rel_l2"] == pytest.approx(row.rel_l2, rel=1e-5)
        assert found["max_abs"] == pytest.approx(row.max_abs, rel=1e-5)
        assert found["structure"] == pytest.approx(row.structure, rel=1e-3, abs=1e-9)
    bad = r.clone().reshape(-1)
    bad[0] = float("nan")
    found = recorder._distance("x", bad.reshape(shape), r)
    metrics = distance(bad.reshape(shape), r)
    assert float(found["rel_l2"]) == pytest.approx(metrics.rel_l2, nan_ok=True)
    assert found["structure"] == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_jitter_is_one_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = recorder._rounded(x, torch.Generator().manual_seed(1))
    theirs = one_rounding(x, torch.Generator().manual_seed(1))
    moved = (ours != x).float().mean().item()
    assert 0.06 < moved < 0.11
    assert distance(ours, x).rel_l2 == pytest.approx(distance(theirs, x).rel_l2, rel=0.1)


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32]
DTYPES += [torch.float64, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def test_every_dtype_survives_bit_for_bit(tmp_path: Path) -> None:
    dice = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 8), generator=dice, dtype=torch.uint8)
    tensors = {
        str(d)[6:]: raw.bool() if d is torch.bool else raw.view(d) for d in DTYPES
    }  # NaN payloads included
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "strided": raw.t()}
    recorder.record(lambda **given: given, [tensors], tmp_path / "r.safetensors", floor=False)
    opened = Recording.open(tmp_path / "r.safetensors")
    for name, tensor in tensors.items():
        for side in ("input", "output"):
            found = opened[f"sample/0000/{side}/{name}"]
            assert found.dtype is tensor.dtype
            assert found.shape == tensor.shape
            assert bytes(recorder._bytes(found.contiguous())) == bytes(
                recorder._bytes(tensor.contiguous())
            )
    again = tmp_path / "again.safetensors"
    opened.save(again)
    assert all(len(e.digest) == 16 for e in Recording.open(again).manifest.tensors)


Named = namedtuple("Named", "first second")


@dataclass
class Field:
    hidden: torch.Tensor
    none: None = None


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (torch.ones(2), {"out"}),
        ((torch.ones(2), [torch.ones(1)], None), {"out.0", "out.1.0"}),
        ({"a/b": torch.ones(2), "n": 3}, {"a/b", "n"}),
        (Field(torch.ones(2)), {"hidden"}),
        (Named(torch.ones(2), torch.ones(2)), {"out.first", "out.second"}),
    ],
)
def test_outputs_are_named_by_the_way_to_them(result: Any, names: set[str], tmp_path: Path) -> None:
    recorder.record(lambda x: result, [{"x": torch.ones(1)}], tmp_path / "r")
    found = {name for name in Recording.open(tmp_path / "r") if "/output/" in name}
    assert found == {f"sample/0000/output/{name}" for name in names}


def test_what_is_not_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    result = {"x": torch.ones(1), "cache": object(), "turned": turned}
    result |= {"meta": torch.ones(1).to("meta"), "sparse": torch.eye(2).to_sparse()}
    with recorder.capture(torch.nn.Identity(), path=tmp_path / "r") as trace:
        trace.module(result)
        trace.module(result)
    opened = Recording.open(tmp_path / "r")
    assert opened.manifest.notes == (
        "values of type object are not recorded",
        "complex tensors are recorded as pairs of real numbers",
        "tensors like torch.strided float32 on meta are not recorded",
        "tensors like torch.sparse_coo float32 on cpu are not recorded",
    )
    assert opened["module/(root)/0/main/out.turned"].tolist() == [[1.0, -2.0]]
    assert capsys.readouterr().err.count("recorder: ") == 4


def test_wrong_use_is_an_error_and_leaves_no_hook(tmp_path: Path) -> None:
    space = load_model()
    model, path = space["Model"](), tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match=r"no module fits 'block\.\*'; the closest are blocks"):
        recorder.capture(model, path=path, select="block.*")
    with pytest.raises(ValueError, match="level 'half' is none of stats, sketch, full"):
        recorder.capture(model, path=path, level="half")
    with pytest.raises(ValueError, match="at least one sample"):
        recorder.record(model, [], path)
    with pytest.raises(ValueError, match="holds no tensor"):
        recorder.record(lambda x: "text", [{"x": torch.ones(1)}], path)
    trace = recorder.capture(model, path=path)
    with pytest.raises(ValueError, match="one plain word"):
        trace.step(0, "a/b")
    with pytest.raises(ValueError, match="nothing was recorded"), trace:
        pass
    with pytest.raises(RuntimeError, match="cannot be multiplied"), trace:
        model(torch.ones(1, 25))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_names_are_those_of_the_module_under_its_wrappers(tmp_path: Path) -> None:
    space = load_model()
    model = space["Model"]()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    wrapped = type("DistributedDataParallel", (torch.nn.Module,), {})()
    wrapped.module = model
    wrapped.forward = model.forward
    path = tmp_path / "t.safetensors"
    with torch.no_grad(), recorder.capture(wrapped, path=path, select="(root), blocks.?"):
        wrapped(torch.ones(1, 24))
        wrapped(torch.ones(1, 24))
    manifest = Recording.open(path).manifest
    once = [("blocks.0", 0), ("blocks.1", 0), ("blocks.0", 1), ("(root)", 0)]
    assert [(e.fqn, e.call) for e in manifest.tensors] == once * 2
    assert [e.step for e in manifest.tensors] == [0] * 4 + [1] * 4
    assert manifest.notes == ("blocks.0 is compiled: modules inside it are not recorded",)


@pytest.mark.parametrize(
    "select", ["*", "blocks.*, !*.two", "!*.two,blocks.*", "!blocks.*", "(root),nest", "*.one"]
)
def test_modules_are_chosen_as_truestep_chooses_them(select: str, tmp_path: Path) -> None:
    from truestep.pairing.naming import choose, named_modules

    model = load_model()["Model"]()
    model.add_module("a/b", torch.nn.Identity())
    named = named_modules(model).modules
    chosen = recorder.capture(model, path=tmp_path / "t", select=select).chosen
    assert list(chosen) == choose(named, select)
    assert all(chosen[name] is named[name] for name in chosen)


def test_every_flipped_bit_is_seen(recorded: Path, tmp_path: Path) -> None:
    good, path = recorded.read_bytes(), tmp_path / "bad.safetensors"
    dice = torch.Generator().manual_seed(0)
    places = [*range(16), *torch.randint(0, len(good), (400,), generator=dice).tolist()]
    unseen = []
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        try:
            opened = Recording.open(path)
            for name in opened:
                opened[name]
        except FileFormatError:
            continue
        unseen.append((place, good[place]))
    # The padding after the header says nothing: a flipped bit there changes no value.
    assert all(byte == ord(" ") for _, byte in unseen), unseen


def test_a_kill_in_the_middle_leaves_no_half_file(emitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"what was there before")
    code = f"""
    import recorder, os, signal, torch
    real = recorder._bytes
    def slow(tensor):
        slow.calls += 1
        if slow.calls == 5:  # two tensors: two digests each make four, then one is written
            os.kill(os.getpid(), signal.SIGKILL)
        return real(tensor)
    slow.calls = 0
    recorder._bytes = slow
    recorder.record(lambda x: x, [{{"x": torch.ones(100000)}}, {{"x": torch.ones(9)}}],
                    {str(path)!r}, floor=False)
    """
    assert bare(emitted, code, check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"what was there before"


PROGRAM = """
import sys
import helper
import model
import torch

made = model.make(model.Model)
assert sys.argv[1:] == ["--steps", "2"], sys.argv
assert __name__ == "__main__"
for step in range(2):
    made(torch.full((1, 4, 24), helper.VALUE))
made.blocks[0](torch.zeros(1, 24))
if helper.FAIL:
    raise RuntimeError("the program failed")
sys.exit(helper.STATUS)
"""


@pytest.fixture
def program(emitted: Path, tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(PROGRAM)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("VALUE, FAIL, STATUS = 0.5, False, 0\n")
    return tmp_path


def run(emitted: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["run", "--output", "t.safetensors", *options]
    arguments += ["--", "script.py", "--steps", "2"]
    code = f"import os, recorder\nos.chdir({str(folder)!r})\nrecorder.main({arguments!r})"
    return bare(emitted, code, check=False)


def test_a_program_is_traced_without_an_edit(emitted: Path, program: Path) -> None:
    done = run(emitted, program, "--class", "Model", "--select", "blocks.?", "--level", "sketch")
    assert done.returncode == 0, done.stderr
    assert "recorder: wrote t.safetensors" in done.stderr
    opened = Recording.open(program / "t.safetensors")
    assert [(e.fqn, e.step, e.call) for e in opened.manifest.tensors] == [
        ("blocks.0", 0, 0), ("blocks.1", 0, 0), ("blocks.0", 0, 1),
        ("blocks.0", 1, 0), ("blocks.1", 1, 0), ("blocks.0", 1, 1), ("blocks.0", 1, 2),
    ]  # fmt: skip
    assert opened.manifest.forwards == 2


def test_a_program_that_fails_or_lacks_the_class_writes_nothing(
    emitted: Path, program: Path
) -> None:
    done = run(emitted, program, "--class", "Modell")
    assert done.returncode == 2
    assert "no Modell was called; the closest are Model" in done.stderr
    done = run(emitted, program, "--class", "Model", "--select", "blokcs.*")
    assert done.returncode == 1
    assert "no module fits 'blokcs.*'; the closest are blocks" in done.stderr
    (program / "helper.py").write_text("VALUE, FAIL, STATUS = 0.5, False, 7\n")
    assert run(emitted, program, "--class", "Model").returncode == 7
    (program / "helper.py").write_text("VALUE, FAIL, STATUS = 0.5, True, 0\n")
    assert "the program failed" in run(emitted, program, "--class", "Model").stderr
    assert not (program / "t.safetensors").exists()


def test_the_file_is_python_39_and_has_a_licence(emitted: Path) -> None:
    text = (emitted / "recorder.py").read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    assert "SPDX-License-Identifier: Apache-2.0" in text
    assert ast.get_docstring(tree)
    imported = {
        (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported - set(sys.stdlib_module_names) == {"torch"}
    done = subprocess.run(
        [sys.executable, emitted / "recorder.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "run" in done.stdout


def test_the_verb_writes_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["truestep", "trace", "recorder", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    path = tmp_path / "new" / "recorder.py"
    assert verb("--write", str(path))[0] == 0
    assert path.read_text() == standalone_source()
    assert path.read_text().startswith("# Written by truestep ")
    assert 'VERSION = "source"' not in path.read_text()
    path.write_text("mine")
    code, _, err = verb("--write", str(path))
    assert (code, path.read_text()) == (2, "mine")
    assert f"hint: truestep trace recorder --write {path} --force" in err
    assert verb("--write", str(path), "--force")[0] == 0
    assert path.read_text() == standalone_source()
    code, out, _ = verb("--write", "-")
    assert (code, out) == (0, standalone_source())
    code, _, err = verb("--write", str(path / "below"))
    assert code == 2
    assert "the recorder could not be written" in err


def test_a_rewritten_manifest_of_either_digest_is_damaged(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for digest in ("sha256:", "sha256:" + "0" * 64, "0" * 32, "md5:0", ""):
        header["__metadata__"]["truestep_digest"] = digest
        text = json.dumps(header).encode()
        path = tmp_path / "r.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(FileFormatError, match="manifest is damaged"):
            Recording.open(path)


def test_the_environment_stays_as_it_was() -> None:
    before = torch.get_num_threads(), os.getcwd()
    runs = recorder._benign_runs(lambda x: x, [{"x": torch.ones(3)}], [{"out": torch.ones(3)}], str)
    assert len(runs) >= 4
    assert (torch.get_num_threads(), os.getcwd()) == before


def test_a_function_that_differs_from_itself_is_refused(tmp_path: Path) -> None:
    x, path = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "r"
    with pytest.raises(ValueError, match="differs from itself when it is called again"):
        recorder.record(lambda x: x + torch.randn_like(x), [{"x": x}], path)
    assert not path.exists()
