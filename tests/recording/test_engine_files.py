"""Files of other engines: ComfyUI's latents, FastVideo's traces, SGLang's trajectories, dumps."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import truestep
from tests.commands import Run, runner
from truestep.errors import FileFormatError
from truestep.recording.readers import load
from truestep.verdict import Verdict

SEED = torch.Generator().manual_seed(0)
LATENT = torch.randn(1, 16, 3, 8, 8, generator=SEED)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line."""
    return runner(monkeypatch, capsys)


Original = Callable[[str, str, Mapping[str, Mapping[str, Any]]], Any]


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Original:
    """A module of an unpacked wheel, without what its packages import; VARIABLE=FOLDER."""

    def load_it(variable: str, inside: str, stubs: Mapping[str, Mapping[str, Any]]) -> Any:
        folder = os.environ.get(variable, "")
        if not folder or not (Path(folder) / inside).exists():
            pytest.skip(f"{variable} names no folder that holds {inside}")
        name = inside.removesuffix(".py").replace("/", ".")
        packages = [name.rsplit(".", count)[0] for count in range(name.count("."), 0, -1)]
        logger = {"init_logger": logging.getLogger}
        known = {f"{packages[0]}.logger": logger, **{key: {} for key in packages}, **stubs}
        for module, content in known.items():
            made = ModuleType(module)
            vars(made).update(content)
            if module in packages:
                made.__path__ = [str(Path(folder, *module.split(".")))]
            monkeypatch.setitem(sys.modules, module, made)
            parent, _, last = module.rpartition(".")
            if parent in known and parent in sys.modules:
                setattr(sys.modules[parent], last, made)
        before = set(sys.modules)
        found = import_module(name)
        for module in set(sys.modules) - before:
            monkeypatch.setitem(sys.modules, module, sys.modules.pop(module))
        return found

    return load_it


def comfy(path: Path, latent: torch.Tensor, *, mark: bool = True) -> Path:
    """A file as ComfyUI's SaveLatent writes it."""
    tensors = {"latent_tensor": latent.contiguous()}
    tensors |= {"latent_format_version_0": torch.tensor([])} if mark else {}
    save_file(tensors, path, metadata={"prompt": '{"1": {}}'})
    return path


def test_a_comfyui_latent_is_one_latent(tmp_path: Path, run: Run) -> None:
    a, b = comfy(tmp_path / "a.latent", LATENT), comfy(tmp_path / "b.latent", LATENT + 1e-7)
    assert list(load(a, label="").tensors) == ["latent/final"]
    assert truestep.compare(a, a).verdict is Verdict.IDENTICAL
    assert truestep.compare(b, a).verdict is Verdict.EQUIVALENT
    assert truestep.compare(comfy(b, 1.01 * LATENT), a).verdict is Verdict.DRIFTED
    assert truestep.check_latent(a, LATENT).verdict is Verdict.IDENTICAL
    code, out, _ = run("show", str(a))
    assert code == 0
    assert "a ComfyUI latent" in " ".join(out.split())
    assert "in the space of its VAE" in out
    assert "holds its prompt" in out
    assert run("compare", str(a), str(a))[0] == 0


def test_a_latent_of_an_old_comfyui_is_scaled_as_there(tmp_path: Path, run: Run) -> None:
    old = comfy(tmp_path / "a.latent", LATENT * 0.18215, mark=False)
    new = comfy(tmp_path / "b.latent", LATENT)
    result = truestep.compare(old, new)
    assert result.verdict is Verdict.EQUIVALENT
    assert "1 / 0.18215" in result.notes[0]
    assert "1 / 0.18215" in run("show", str(old))[1]


def test_a_latent_in_another_space_is_told(tmp_path: Path) -> None:
    mean, std = torch.randn(16, generator=SEED), 1 + torch.rand(16, generator=SEED)
    shape = (1, 16, 1, 1, 1)
    saved = comfy(tmp_path / "a.latent", LATENT * std.view(shape) + mean.view(shape))
    result = truestep.compare(saved, {"latent/final": LATENT})
    assert result.verdict is Verdict.DRIFTED
    assert "in the space of its VAE" in result.notes[-1]
    other = comfy(tmp_path / "b.latent", 2 * LATENT)
    assert truestep.compare(saved, other).notes == ()  # both are in it


@pytest.mark.parametrize("name", ["trajectory", "list", "rollout"])
def test_a_trajectory_of_sglang_is_read_step_by_step(name: str, tmp_path: Path, run: Run) -> None:
    steps = torch.randn(2, 5, 4, 3, 8, 8, generator=SEED)
    times, sigmas = torch.arange(5.0), torch.arange(6.0)
    content: dict[str, Any] = {"trajectory_latents": steps, "trajectory_timesteps": times}
    if name == "list":
        content["trajectory_latents"] = [x.clone() for x in steps.unbind(1)]
    if name == "rollout":
        content = {"latents": steps, "timesteps": times, "sigmas": sigmas}
    path = tmp_path / "a.pt"
    torch.save(content, path)
    first = 0 if name == "rollout" else 1
    tensors = load(path, label="").tensors
    latents = [f"step/{first + i:04d}/latent" for i in range(4)]
    more = ["schedule/sigmas"] if name == "rollout" else []
    assert list(tensors) == ["schedule/timesteps", *latents, "latent/final", *more]
    assert torch.equal(tensors["latent/final"], steps[:, -1])
    assert "of SGLang" in run("show", str(path))[1] or "SGLang rollout" in run("show", str(path))[1]
    changed = tmp_path / "b.pt"
    key = "latents" if name == "rollout" else "trajectory_latents"
    kept = steps.clone()
    kept[:, 3:] *= 1.1
    torch.save({**content, key: kept}, changed)
    result = truestep.compare(changed, path)
    assert result.first_divergence is not None
    assert result.first_divergence.name == f"step/{first + 3:04d}/latent"
    assert truestep.compare(path, path).verdict is Verdict.IDENTICAL


def dump(folder: Path, name: str, value: Any, *, index: int, step: int = 0, rank: int = 0) -> Path:
    """A file as SGLang's dumper writes it."""
    tags = {"step": step, "rank": rank, "dump_index": index, "name": name}
    folder.mkdir(exist_ok=True)
    path = folder / ("___".join(f"{k}={v}" for k, v in tags.items()) + ".pt")
    torch.save({"value": value, "meta": {**tags, "world_size": 1}}, path)
    return path


def test_a_dump_of_sglang_is_called_as_its_meta_says(tmp_path: Path, run: Run) -> None:
    path = dump(tmp_path / "d", "q_proj", LATENT, index=7, step=3)
    assert list(load(path, label="").tensors) == ["q_proj"]
    out = run("show", str(path))[1]
    assert "a dump of SGLang" in out
    assert "dump_index: 7" in out
    assert truestep.compare(path, path).verdict is Verdict.IDENTICAL


def test_folders_of_dumps_are_compared_in_the_order_they_were_written(
    tmp_path: Path, run: Run
) -> None:
    for side, start in (("a", 1), ("b", 40)):
        for number, name in enumerate(("embed", "attn", "mlp", "attn", "out")):
            value: Any = LATENT * (number + 1)
            if side == "b" and number >= 3:
                value = value * 1.1
            dump(tmp_path / side, name, [value, value], index=start + number)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert list(load(a, label="").tensors)[:3] == [
        "step=0/rank=0/name=embed/0",
        "step=0/rank=0/name=embed/1",
        "step=0/rank=0/name=attn/0",
    ]
    assert truestep.compare(a, a).verdict is Verdict.IDENTICAL
    result = truestep.compare(b, a)
    assert result.first_divergence is not None
    assert result.first_divergence.name == "step=0/rank=0/name=attn/0#1"
    assert (result.missing, result.unexpected) == ((), ())
    assert "a folder of SGLang's dumps" in " ".join(run("show", a)[1].split())


def test_passes_of_sglang_are_compared_in_folders(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        for number in range(3):
            x = LATENT * (2 if side == "b" and number == 2 else 1)
            torch.save({"model.norm": x, "pair": [x, x]}, tmp_path / side / f"Pass0000{number}.pt")
    result = truestep.compare(tmp_path / "b", tmp_path / "a")
    assert result.first_divergence is not None
    assert result.first_divergence.name == "Pass00002/model.norm"
    assert len(result.rows) == 9


def test_a_dump_that_needs_code_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "d", "x", {"a": Path("b")}, index=1)
    for what in (path, path.parent):
        with pytest.raises(FileFormatError, match="needs code to be unpickled"):
            load(what, label="")


def line(module: str, x: torch.Tensor, *, step: int | None = 0, **more: Any) -> dict[str, Any]:
    """A record as FastVideo's trace writes it."""
    values = {"abs_mean": float(x.abs().mean()), "max": float(x.max()), "sum": float(x.sum())}
    return {"module": module, "tensor": "out", "step": step, **values, **more}


def trace(path: Path, lines: list[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + end)
    return path


def layers(x: torch.Tensor, at: int = 99, gain: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    return [
        line(f"blocks.{i}", x * (i + 1) * (gain if i >= at else 1), step=step, **more)
        for step in range(2)
        for i in range(4)
    ]


SHAPE = {"shape": list(LATENT.shape), "dtype": "torch.float32"}


def test_activation_traces_name_the_first_module_that_differs(tmp_path: Path, run: Run) -> None:
    a = trace(tmp_path / "a.jsonl", layers(LATENT, **SHAPE))
    b = trace(tmp_path / "b.jsonl", layers(LATENT, at=2, gain=1.1, **SHAPE))
    c = trace(tmp_path / "c.jsonl", layers(LATENT * (1 + 1e-7), **SHAPE))
    assert truestep.compare(a, a).verdict is Verdict.IDENTICAL
    assert truestep.compare(c, a).verdict is Verdict.EQUIVALENT
    result = truestep.compare(b, a)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert (result.first_divergence.fqn, result.first_divergence.step) == ("blocks.2", 0)
    assert "what leaves them as they are was not seen" in result.notes[0]
    code, out, _ = run("show", str(a))
    assert code == 0
    assert "16 tensors" in out
    assert "an activation trace of FastVideo" in " ".join(out.split())
    assert run("compare", str(b), str(a))[0] == 1


def test_a_trace_without_shape_and_dtype_is_judged_as_bfloat16(tmp_path: Path) -> None:
    a = trace(tmp_path / "a.jsonl", layers(LATENT))
    b = trace(tmp_path / "b.jsonl", layers(LATENT * 1.004))
    tensors = load(a, label="").tensors
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {t.numel() for t in tensors.values()} == {2}
    result = truestep.compare(b, a)
    assert result.verdict is not Verdict.DRIFTED
    assert any("sums were left out" in note for note in result.notes)
    far = trace(b, layers(LATENT * 1.1))
    assert truestep.compare(far, a).verdict is Verdict.DRIFTED


def test_calls_shapes_nan_and_errors_of_a_trace(tmp_path: Path) -> None:
    twice = [line("m", LATENT, step=None), line("m", 2 * LATENT, step=None)]
    a = trace(tmp_path / "a.jsonl", [{**x, "tensor": "out[1]"} for x in twice])
    assert list(load(a, label="").tensors) == ["module/m/0/trace/out.1", "module/m#1/0/trace/out.1"]
    good = trace(tmp_path / "g.jsonl", [line("m", LATENT, **SHAPE)])
    for wrong in (
        {"max": math.nan},
        {"max": "<error: RuntimeError('x')>"},
        {"shape": [1, 16, 3, 8, 9]},
        {"module": "n"},
    ):
        b = trace(tmp_path / "b.jsonl", [{**line("m", LATENT, **SHAPE), **wrong}])
        assert not truestep.compare(b, good).verdict.passed, wrong


def test_a_trace_that_was_cut_off_is_read_to_its_last_line(tmp_path: Path) -> None:
    path = trace(tmp_path / "a.jsonl", layers(LATENT, **SHAPE), '\n{"module": "x", "ten')
    assert len(load(path, label="").tensors) == 16


@pytest.mark.parametrize(
    "text",
    [
        '{"module": "m", "tensor": "out", "step": 0, "sum": 1.0}\n',
        '{"module": "m"}\n',
        '{"module": "m", "tensor": "out", "step": "x", "max": 1}\n',
        '{"module": "m", "tensor": "out", "step": 0, "max": 1}',
        '{"module": "m", \n',
        '{"module": "m", "tensor": "out", "step": -1, "max": 1}\n',
    ],
)
def test_a_damaged_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="activation trace"):
        load(path, label="")


def test_a_file_that_comfyui_wrote(run: Run) -> None:
    """4 steps of a tiny random model, written by SaveLatent of ComfyUI a125cd84."""
    path = Path(__file__).parent / "files" / "comfyui.latent"
    tensors = load(path, label="").tensors
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "latent/final": (1, 16, 3, 8, 8)
    }
    assert truestep.compare(path, path).verdict is Verdict.IDENTICAL
    assert "holds its prompt" in run("show", str(path))[1]


def test_a_trace_that_fastvideo_wrote(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = {"FASTVIDEO_TRACE_ACTIVATIONS": True, "FASTVIDEO_TRACE_LAYERS": "", **TRACED}
    hooks = original(
        "TRUESTEP_FASTVIDEO",
        "fastvideo/hooks/activation_trace.py",
        {"fastvideo.envs": envs | {"FASTVIDEO_TRACE_OUTPUT": str(tmp_path / "a.jsonl")}},
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    manager = hooks.attach_activation_trace(model)
    for step in range(2):
        with hooks.trace_step(step):
            model(torch.ones(2, 8))
    hooks.detach_activation_trace(manager)
    tensors = load(tmp_path / "a.jsonl", label="").tensors
    assert list(tensors) == [
        f"module/{module}/{step}/trace/out.0{end}"
        for step in range(2)
        for module in range(2)
        for end in ("", ".shape")
    ]
    assert tensors["module/1/0/trace/out.0"].dtype == torch.float32
    assert tensors["module/1/0/trace/out.0"].shape == (4,)


TRACED = {"FASTVIDEO_TRACE_STATS": "abs_mean,sum,max,std,shape,dtype", "FASTVIDEO_TRACE_STEPS": ""}


UNUSED = {
    "zmq": {},
    "sglang.srt.managers": {},
    "sglang.srt.managers.io_struct": dict.fromkeys(("sock_recv", "sock_send", "wrap_as_pickle")),
    "sglang.srt.runtime_context": dict.fromkeys(("get_parallel", "get_server_args", "get_serving")),
    "sglang.srt.utils": {"get_device": lambda: "cpu"},
}
"""What its dumper imports for servers."""


def test_a_dump_that_sglang_wrote(original: Original, tmp_path: Path) -> None:
    dumper = original("TRUESTEP_SGLANG", "sglang/srt/debug_utils/dumper.py", UNUSED)
    config = dumper.DumperConfig(enable=True, dir=str(tmp_path), exp_name="x")
    own = dumper._Dumper(config=config)
    own.dump("embed", LATENT)
    own.dump("pair", [LATENT, 2 * LATENT])
    names = list(load(tmp_path / "x", label="").tensors)
    assert [name.rpartition("name=")[2].partition("/")[0] for name in names] == [
        "embed",
        "pair",
        "pair",
    ]
    assert truestep.compare(tmp_path / "x", tmp_path / "x").verdict is Verdict.IDENTICAL
