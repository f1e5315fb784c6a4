"""Capture by hooks: names, copies, nests, choices, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import truestep
from tests.replay.models import Outer, given, model
from truestep.errors import UsageError
from truestep.keys import address, module_name, split_call
from truestep.measure.moments import moments
from truestep.measure.sketch import sketch
from truestep.pairing.naming import choose, named_modules
from truestep.recording.format import Recording
from truestep.replay.hooks import Trace


def names(trace: Trace) -> list[str]:
    assert trace.recording is not None
    return [entry.name for entry in trace.recording.manifest.tensors]


def hooks_left(module: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m))
        for m in module.modules()
    )


def test_names_are_in_the_order_in_which_calls_finish() -> None:
    net = model()
    with torch.no_grad(), truestep.capture(net) as trace:
        net(given())
        net(given())
    first = [name for name in names(trace) if "/0/main/" in name]
    assert first == [
        "module/blocks.0.up/0/main/out.0",
        "module/blocks.0.down/0/main/out.0",
        "module/blocks.0/0/main/out.0",
        "module/blocks.1.up/0/main/out.0",
        "module/blocks.1.down/0/main/out.0",
        "module/blocks.1/0/main/out.0",
        "module/blocks.1.up#1/0/main/out.0",
        "module/blocks.1.down#1/0/main/out.0",
        "module/blocks.1#1/0/main/out.0",
        "module/out/0/main/out.0",
        "module/(root)/0/main/out.0",
    ]
    assert names(trace)[11:] == [name.replace("/0/main", "/1/main") for name in first]
    assert (trace.hooks, trace.fired) == (8, 8)  # a ModuleList is never called
    assert trace.recording is not None
    manifest = trace.recording.manifest
    assert manifest.notes == ("8 of 8 hooks fired",)
    assert manifest.forwards == 2
    entry = manifest.tensors[8]
    assert (entry.fqn, entry.call, entry.step, entry.branch) == ("blocks.1", 1, 0, "main")
    assert (entry.kind, entry.order, entry.shape) == ("module", 8, (2, 2, 8))


def test_addresses() -> None:
    found = address("stats/module/blocks.0#12/7/cond/in.hidden_states")
    assert (found.stage, found.fqn, found.call, found.step) == ("module", "blocks.0", 12, 7)
    assert address("module/blocks.0/7/cond/out.0").call == 0
    assert split_call("a::aten.mm.default#3") == ("a::aten.mm.default", 3)
    assert split_call("#3") == ("#3", 0)
    for call in (0, 2):
        name = module_name("a.b", step=3, branch="uncond", slot="out.x", call=call)
        assert address(name).call == call
        assert address(name).fqn == "a.b"


def test_full_tensors_are_copies_that_nothing_reaches() -> None:
    class Scribbler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x).mul_(0)

    net, x = Scribbler(), given()
    kept = x.clone()
    with truestep.capture(net, level="full", inputs=True) as trace:
        net(x)
    assert trace.recording is not None
    assert torch.equal(trace.recording["module/one/0/main/out.0"], kept)
    assert torch.equal(trace.recording["module/(root)/0/main/in.0"], kept)
    assert not trace.recording["module/(root)/0/main/out.0"].any()


@pytest.mark.parametrize("path", [None, "t.safetensors"])
def test_levels_agree_with_the_tensors(tmp_path: Path, path: str | None) -> None:
    net, found = model(), {}
    for level in ("full", "sketch", "stats"):
        place = tmp_path / f"{level}.{path}" if path else None
        with torch.no_grad(), truestep.capture(net, level=level, path=place) as trace:  # type: ignore[arg-type]
            net(given())
        assert trace.recording is not None
        assert trace.recording.path == place
        found[level] = trace.recording
    for entry in found["full"].manifest.tensors:
        exact = moments(found["full"][entry.name])
        for level in ("sketch", "stats"):
            torch.testing.assert_close(
                found[level][f"stats/{entry.name}"], exact, rtol=1e-5, atol=1e-6 * float(exact[5])
            )
        close = float(found["sketch"][f"stats/{entry.name}"][5])
        assert close == pytest.approx(float(exact[5]), rel=1e-12)
        assert torch.equal(
            found["sketch"][f"sketch/{entry.name}"], sketch(found["full"][entry.name])
        )
    saved = found["full"].save(tmp_path / "again.safetensors")
    assert len(saved) == 64
    again = Recording.open(tmp_path / "again.safetensors")
    assert again.manifest.tensors[8].call == 1


def test_a_changed_tensor_is_not_taken_for_the_one_before() -> None:
    """The output of a child that its parent returns is sketched once, unless it was changed."""

    class Parent(nn.Module):
        def __init__(self, change: str) -> None:
            super().__init__()
            self.child, self.change = nn.Linear(8, 1024), change

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.child(x)
            if self.change == "seen":
                y.mul_(2)
            elif self.change == "unseen":
                y.data.mul_(2)  # no version counter sees this
            return y

    for change, factor in (("none", 1), ("seen", 2), ("unseen", 2)):
        net = Parent(change)
        with torch.no_grad(), truestep.capture(net, level="sketch") as trace:
            net(given())
        assert trace.recording is not None
        child = trace.recording["sketch/module/child/0/main/out.0"]
        assert torch.equal(trace.recording["sketch/module/(root)/0/main/out.0"], child * factor)


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("tensor", ["out.0"]),
        ("tuple", ["out.0"]),
        ("list", ["out.0", "out.1.0", "out.1.1.deep"]),
        ("dict", ["out.a", "out.5", "out.with%2Edot%2Fslash"]),
        ("ordered", ["out.sample"]),
        ("dataclass", ["out.sample", "out.extra.0"]),
        ("named", ["out.first", "out.second"]),
        ("complex", ["out.0"]),
        ("expanded", ["out.0"]),
        ("empty", ["out.0"]),
        ("integers", ["out.0"]),
        ("bool", ["out.0"]),
        ("bfloat16", ["out.0"]),
    ],
)
@pytest.mark.parametrize("level", ["stats", "sketch", "full"])
def test_any_output(kind: str, slots: list[str], level: Any, tmp_path: Path) -> None:
    net = Outer(kind)
    with truestep.capture(
        net, select="inner", level=level, path=tmp_path / "t.safetensors"
    ) as trace:
        net(given())
    assert names(trace) == [f"module/inner/0/main/{slot}" for slot in slots]
    recording = trace.recording
    assert recording is not None
    for name in recording:
        recording[name]  # digests agree
    if level == "full" and kind == "bfloat16":
        assert torch.equal(recording[names(trace)[0]], (given() * 2).bfloat16())


def test_model_output_of_a_library() -> None:
    from transformers.utils import ModelOutput

    class Given(nn.Module):
        def forward(self, x: torch.Tensor) -> ModelOutput:
            return ModelOutput(last_hidden_state=x, hidden_states=(x, x), loss=None)

    net = Given()
    with truestep.capture(net) as trace:
        net(given())
    slots = [name.rpartition("/")[2] for name in names(trace)]
    assert slots == ["out.last_hidden_state", "out.hidden_states.0", "out.hidden_states.1"]


@pytest.mark.parametrize("kind", ["none", "text"])
def test_nothing_returned_is_noted(kind: str) -> None:
    net = Outer(kind)
    with truestep.capture(net) as trace:
        net(given())
        net(given())
    kind_name = {"none": "NoneType", "text": "str"}[kind]
    assert f"inner returned no tensor ({kind_name}) (2 times)" in trace.notes
    assert names(trace) == ["module/(root)/0/main/out.0", "module/(root)/1/main/out.0"]


def test_a_tensor_that_cannot_be_stored_is_noted() -> None:
    net = Outer("sparse")
    with truestep.capture(net) as trace:
        assert torch.equal(net(given()), given())
    assert any(
        "inner has tensors that cannot be stored: torch.sparse_coo" in n for n in trace.notes
    )


def test_a_recording_that_fails_names_the_module_and_the_program_goes_on() -> None:
    class Hostile(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise RuntimeError("not today")

    net = Outer("tensor")
    net.inner.forward = lambda x: Hostile(a=x)  # type: ignore[method-assign, assignment]
    with truestep.capture(net) as trace:
        net(given())
    assert "inner could not be recorded: RuntimeError: not today" in trace.notes
    assert names(trace) == ["module/(root)/0/main/out.0"]


def test_inputs_are_recorded_when_the_call_starts() -> None:
    net = model()
    with torch.no_grad(), truestep.capture(net, inputs=True, select="(root),blocks.1") as trace:
        net(given(), mask=torch.ones(8))
    assert [name.removeprefix("module/") for name in names(trace)] == [
        "(root)/0/main/in.0",
        "(root)/0/main/in.mask",
        "blocks.1/0/main/in.0",
        "blocks.1/0/main/out.0",
        "blocks.1#1/0/main/in.0",
        "blocks.1#1/0/main/out.0",
        "(root)/0/main/out.0",
    ]


def test_steps_and_branch() -> None:
    net = model()
    told: list[tuple[str, int, int]] = []
    with (
        torch.no_grad(),
        truestep.capture(
            net, select="out", steps=[1, 9], branch="cond", progress=lambda *a: told.append(a)
        ) as trace,
    ):
        for _ in range(3):
            net(given())
    assert names(trace) == ["module/out/1/cond/out.0"]
    assert trace.notes == ("1 of 1 hooks fired", "steps never reached: 9")
    assert told == [("trace", 1, 10), ("trace", 2, 10), ("trace", 3, 10)]


def test_a_cache_context_says_branch_and_step() -> None:
    from contextlib import contextmanager

    class Cached(nn.Module):
        @contextmanager
        def cache_context(self, name: str, **_: Any) -> Any:
            yield

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    net = Cached()
    with truestep.capture(net) as trace:
        for step in (4, 5):
            with net.cache_context("cond", step_index=step):
                net(given())
            with net.cache_context("uncond"):
                net(given())
    assert [name.split("/")[2:4] for name in names(trace)] == [
        ["4", "cond"],
        ["0", "uncond"],
        ["5", "cond"],
        ["1", "uncond"],
    ]
    assert "cache_context" not in vars(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "blcks.0"}, "blocks.0"),
        ({"select": "blocks.*,!nothing"}, "no module matches 'nothing'"),
        ({"ops": "nowhere"}, "no module matches 'nowhere'"),
        ({"select": " , "}, "no modules were chosen"),
        ({"steps": []}, "no steps were chosen"),
        ({"steps": [-1]}, "no step -1"),
        ({"branch": "a/b"}, "cannot name a branch"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    net = model()
    with (
        pytest.raises(UsageError, match="(?s)" + message),
        truestep.capture(net, path=tmp_path / "t.safetensors", **options),
    ):
        raise AssertionError("unreached")
    assert hooks_left(net) == 0
    assert list(tmp_path.iterdir()) == []


def test_globs() -> None:
    fqns = list(named_modules(model()).modules)
    assert choose(fqns, "blocks.?") == ["blocks.0", "blocks.1"]
    assert choose(fqns, "blocks.*, !*.up") == [
        "blocks.0",
        "blocks.0.down",
        "blocks.1",
        "blocks.1.down",
    ]
    assert choose(fqns, "!blocks*") == ["(root)", "out"]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    net = model()
    with truestep.capture(net, ops="out"):
        net(given())
    assert hooks_left(net) == 0
    path = tmp_path / "t.safetensors"
    made: list[Trace] = []

    def fail() -> None:
        with truestep.capture(net, path=path) as trace:
            made.append(trace)
            net(given())
            raise ValueError("the block")

    with pytest.raises(ValueError, match="the block"):
        fail()
    assert hooks_left(net) == 0
    assert made[0].recording is not None
    assert "partial: the traced block raised ValueError" in Recording.open(path).manifest.notes
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_module_that_raises_does_not_shift_what_follows() -> None:
    net = model()
    with torch.no_grad(), truestep.capture(net, select="blocks.0,out", inputs=True) as trace:
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 3, 7))
        net(given())
    assert names(trace) == [
        "module/blocks.0/0/main/in.0",
        "module/blocks.0/1/main/in.0",
        "module/blocks.0/1/main/out.0",
        "module/out/1/main/in.0",
        "module/out/1/main/out.0",
    ]


def test_tracing_changes_no_output_and_no_gradient() -> None:
    net, x = model(), given().requires_grad_()
    plain = torch.autograd.grad(net(x).square().sum(), x)[0]
    with truestep.capture(net, level="full", inputs=True, ops="*"):
        traced = torch.autograd.grad(net(x).square().sum(), x)[0]
    assert torch.equal(plain, traced)


def test_a_weight_shared_by_two_names_is_one_module() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    net.append(net[0])
    with torch.no_grad(), truestep.capture(net) as trace:
        net(given())
    assert [name.split("/")[1] for name in names(trace)] == ["0", "1", "0#1", "(root)"]


def test_wrapper_prefixes_are_removed() -> None:
    class DataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    class Checkpointed(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._checkpoint_wrapped_module(*args, **kwargs)

    net = model()
    net.blocks[0] = Checkpointed(net.blocks[0])
    wrapped = DataParallel(net)
    with torch.no_grad(), truestep.capture(wrapped) as trace:
        wrapped(given())
    plain = model()
    with torch.no_grad(), truestep.capture(plain) as expected:
        plain(given())
    assert names(trace) == names(expected)
    named = nn.ModuleDict({"module": nn.Linear(1, 1)})  # a name like another
    assert list(named_modules(named).modules) == ["(root)", "module"]


def test_compiled_modules_are_traced_from_outside_and_that_is_said() -> None:
    net = model()
    net.blocks[1].compile(backend="eager")
    compiled = torch.compile(net.blocks[0], backend="eager")
    net.blocks[0] = compiled
    with torch.no_grad():
        plain = net(given())
        with truestep.capture(net, level="full") as trace:
            assert torch.equal(net(given()), plain)
        assert torch.equal(net(given()), plain)
    assert trace.recording is not None
    assert [name.split("/")[1] for name in names(trace)] == [
        "blocks.0",
        "blocks.1",
        "blocks.1#1",
        "out",
        "(root)",
    ]
    for fqn in ("blocks.0", "blocks.1"):
        assert any(f"2 modules inside {fqn} run as one compiled graph" in n for n in trace.notes)
    assert not hasattr(net.blocks[1]._compiled_call_impl, "truestep_layers")


def test_operators_inside_a_module() -> None:
    net = model()
    with torch.no_grad(), truestep.capture(net, select="blocks.1", ops="blocks.1") as trace:
        net(given())
    found = [name.split("/")[1] for name in names(trace)]
    assert "blocks.1::aten.addmm.default" in found
    assert "blocks.1::aten.relu.default" in found
    assert "blocks.1::aten.addmm.default#1" in found
    assert not any("view" in name or "aten.t." in name for name in found)
    assert found.index("blocks.1::aten.relu.default") < found.index("blocks.1")
    assert hooks_left(net) == 0


def test_a_pipeline_says_step_and_branch(
    tiny_wan: dict[str, Path], tiny_case: dict[str, object]
) -> None:
    from truestep.case import Case
    from truestep.runtime.loading import load
    from truestep.runtime.pipeline import generate

    case = Case(model=str(tiny_wan["wan22"]), **tiny_case)  # type: ignore[arg-type]
    pipe = load(case)
    before = (pipe.predict, pipe.encode_text, pipe.decode)
    plain = generate(pipe)
    with truestep.capture(pipe, steps=(0, 3), case=case, select="*,vae*,text_encoder*") as trace:
        assert torch.equal(generate(pipe), plain)
    assert (pipe.predict, pipe.encode_text, pipe.decode) == before
    assert trace.recording is not None
    manifest = trace.recording.manifest
    assert (manifest.case_id, manifest.forwards) == (case.id, 8)
    assert manifest.settings["trace"]["steps"] == [0, 3]
    places = {
        (e.step, e.branch) for e in manifest.tensors if not (e.fqn or "").startswith("text_encoder")
    }
    assert places == {(0, "cond"), (0, "uncond"), (3, "cond"), (3, "uncond")}
    text = {e.branch for e in manifest.tensors if (e.fqn or "").startswith("text_encoder")}
    assert text == {"cond", "uncond"}
    assert hooks_left(pipe.transformer) == hooks_left(pipe.transformer_2) == 0
