"""Recordings of calls: of any subject, written, read and hostile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calls.conftest import TINY, Tiny
from truestep.calls.check import check
from truestep.calls.keys import key_of
from truestep.calls.record import record
from truestep.calls.recording import CallRecording, read
from truestep.calls.subject import subject_of
from truestep.environment import Environment
from truestep.errors import FileFormatError, UsageError
from truestep.recording.header import manifest_digest
from truestep.recording.manifest import DIGEST_KEY, METADATA_KEY
from truestep.runtime.identity import device_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calls") / "sd.safetensors"
    record(TINY["sd"].subject()).write(path)
    return path


def test_a_recorded_run_gives_what_a_plain_run_gives(tiny: Tiny) -> None:
    plain = tiny.subject().run()
    subject = tiny.subject()
    classes = {name: type(part) for name, part in subject.components.items()}
    recording = record(subject)
    assert {name: type(part) for name, part in subject.components.items()} == classes
    assert all(type(part).__mro__[1] is not type(part) for part in subject.components.values())
    (run,) = recording.by_method["run", "run"]
    name = next(iter(run.output["fields"]))[1]["array"]
    images = plain.images if hasattr(plain, "images") else plain.frames
    assert torch.equal(recording.recording[name], torch.from_numpy(images))


def test_a_file_holds_every_call_and_each_tensor_once(saved: Path) -> None:
    recording = read(saved)
    stages = [call.stage for call in recording.calls]
    assert stages[:4] == ["text", "text", "schedule", "latent"]
    assert stages[-2:] == ["decoding", "decoding"]
    assert recording.steps == 3
    (first, *_) = recording.by_method["unet", "forward"]
    assert first.parameters[:3] == ("sample", "timestep", "encoder_hidden_states")
    assert first.arguments["sample"].keys() == {"tensor"}
    assert first.dtype == "float32"
    names = list(load_file(saved))
    assert [str(key_of(name)) for name in names] == names
    contents = {(t.dtype, t.shape, t.numpy().tobytes()) for t in load_file(saved).values()}
    assert len(contents) == len(names)
    # the text is the same at every step
    texts = [c.arguments["encoder_hidden_states"] for c in recording.by_method["unet", "forward"]]
    assert texts[0] == texts[1] == texts[2]


def test_recordings_of_modules_and_functions() -> None:
    module = torch.nn.Linear(3, 2)
    inputs = torch.randn(4, 3)
    (call,) = record(subject_of(module, inputs)).calls
    assert (call.component, call.method, call.stage) == ("module", "forward", "output")
    assert set(call.arguments) == {"input"}

    def double(x: torch.Tensor, *, scale: float = 2.0) -> dict[str, torch.Tensor]:
        return {"doubled": module(x) * scale}

    (called,) = record(subject_of(double, inputs)).calls
    assert (called.component, called.arguments.keys()) == ("function", {"x"})
    inner = record(subject_of(double, inputs, components={"linear": module})).calls
    assert [c.component for c in inner] == ["linear", "run"]


def test_nothing_to_record_is_an_error() -> None:
    with pytest.raises(UsageError, match="nothing was recorded"):
        record(subject_of(lambda: "text"))
    with pytest.raises(UsageError, match="cannot be run"):
        subject_of(object())


@pytest.mark.parametrize("scales", [(0.7, 0.0), (0.0, 0.7), (0.0, 0.0), (0.7, float("nan"))])
def test_a_model_may_be_silent_at_some_calls_not_at_all(scales: tuple[float, ...]) -> None:
    control = torch.nn.Linear(3, 3)

    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return control(x) * scale

    silenced = Scaled()

    def called(x: torch.Tensor) -> torch.Tensor:
        return sum((silenced(x, scale) for scale in scales), x)

    subject = subject_of(called, torch.randn(2, 3), components={"control": silenced})
    if sum(scales) == 0.7:
        assert [c.component for c in record(subject).calls] == ["control", "control", "run"]
        return
    with pytest.raises(UsageError, match="nothing could be judged") as error:
        record(subject)
    assert error.value.where == "control.forward"


def test_generators_of_the_caller_start_every_run_where_they_did() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(4, generator=generator)

    subject = subject_of(draw, generator, components={"nothing": torch.nn.Identity()})
    first = subject.run()
    assert subject.run().equal(first)
    (drawn, _) = [*record(subject).calls, None]
    assert drawn is not None
    assert (drawn.component, drawn.method) == ("random", "randn")


def rewritten(saved: Path, tmp_path: Path, change: Any) -> Path:
    """The same file with a changed manifest whose digest is right."""
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        manifest = json.loads(file.metadata()[METADATA_KEY])
    change(manifest)
    text = json.dumps(manifest)
    path = tmp_path / "changed.safetensors"
    save_file(load_file(saved), path, {METADATA_KEY: text, DIGEST_KEY: manifest_digest(text)})
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["calls"][0].update(output={"pickle": "x"}), "tagged 'pickle'"),
        (lambda m: m["calls"][0].update(output={"tensor": "gone"}), "which is not there"),
        (lambda m: m["calls"][0].update(arguments={"a": [1]}), "neither plain nor tagged"),
        (lambda m: m["calls"][0].update(random=[["", "gone"]]), "which is not there"),
        (lambda m: m["calls"][0].update(extra=1), "manifest is not valid"),
        (lambda m: m["calls"][0].update(call="one"), "manifest is not valid"),
        (lambda m: m.update(calls=[]), "holds no calls"),
    ],
)
def test_hostile_call_tables_are_refused(
    saved: Path, tmp_path: Path, change: Any, text: str
) -> None:
    with pytest.raises(FileFormatError, match=text):
        read(rewritten(saved, tmp_path, change))


def test_a_damaged_tensor_is_refused_when_it_is_read(saved: Path, tmp_path: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data)
    recording = read(path)
    with pytest.raises(FileFormatError, match="damaged"):
        [recording.recording[name] for name in recording.recording]


def test_calls_are_values(saved: Path) -> None:
    recording = read(saved)
    again = CallRecording(recording.recording)
    assert again.calls == recording.calls
    with pytest.raises(dataclasses.FrozenInstanceError):
        recording.calls[0].step = 1  # type: ignore[misc]


class Placed(torch.nn.Module):
    """Seems to have weights on devices."""

    def __init__(self, *places: str) -> None:
        super().__init__()
        self.places = places

    def parameters(self, recurse: bool = True) -> Any:
        return [SimpleNamespace(device=torch.device(place)) for place in self.places]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("cpu", "cpu")], "cpu"),
        ([()], "cpu"),
        ([("cpu", "meta")], "cpu"),
        ([("cpu",), ("meta", "cuda:1")], "cuda:1"),
        ([("xpu:0",)], "xpu:0"),
    ],
)
def test_a_subject_is_where_its_weights_are(places: list[tuple[str, ...]], expected: str) -> None:
    parts = {str(at): Placed(*each) for at, each in enumerate(places)}
    assert device_of({**parts, "scheduler": object()}) == (expected)


def test_the_environment_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    current = Environment.current

    def told(device: str | None = None, *, attention: str | None = None) -> Environment:
        asked.append(str(device))
        return current("cpu", attention=attention)

    monkeypatch.setattr("truestep.calls.recording.Environment.current", told)
    monkeypatch.setattr("truestep.calls.check.Environment.current", told)
    monkeypatch.setattr("truestep.calls.recorder.device_of", lambda subject: "cuda:0")
    monkeypatch.setattr("truestep.calls.check.device_of", lambda subject: "cuda:1")
    subject = subject_of(torch.nn.Linear(3, 3), torch.randn(2, 3))
    assert check(subject, record(subject, floor=False)).verdict.passed
    assert asked == ["cuda:0", "cuda:1"]
