"""Key frames of bundles: small lossless pictures of what a run made, and never more than 1 MB."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Captured, runner
from tests.recording.test_bundling import run
from truestep.calls.pictures import decoded, layout
from truestep.cli.show import show_file
from truestep.errors import FileFormatError, UsageError
from truestep.judge.compare import compare
from truestep.measure.pictures import pixels, png, reduced
from truestep.recording.bundling import LIMIT, bundled, write_bundle
from truestep.recording.format import Recording
from truestep.recording.keyframes import (
    Frames,
    key_frames,
    key_numbers,
    read_key_frames,
)
from truestep.recording.manifest import KEY_FRAMES, Manifest
from truestep.recording.table import tensor_table
from truestep.report.html import render


def made(steps: int, video: torch.Tensor, **settings: Any) -> Recording:
    """A recording of so many steps that decoded a video `b c f h w` in [-1, 1]."""
    plain = run(steps)
    tensors = {name: plain[name] for name in plain} | {"video/frames": video}
    table = tensor_table(tensors)
    fields = {"tool_version": "0", "created": "", "level": "full", "settings": settings}
    return Recording.in_memory(tensors, Manifest.model_validate({**fields, "tensors": table}))


def ramp(frames: int, height: int, width: int) -> torch.Tensor:
    """A smooth video whose first value says the frame."""
    column = torch.linspace(-1, 1, width)
    video = column.expand(1, 3, frames, height, width).clone()
    video[:, 0] = torch.linspace(-1, 1, frames)[:, None, None]
    return video


def noise(frames: int, height: int, width: int) -> torch.Tensor:
    """A video that no coder makes smaller."""
    dice = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, frames, height, width, generator=dice) * 2 - 1


def test_first_middle_and_last_frame_are_kept_losslessly(tmp_path: Path) -> None:
    recording = made(4, ramp(9, 32, 48))
    bundle = write_bundle(recording, tmp_path / "b.safetensors", frames=decoded(recording))
    held = read_key_frames(bundle.manifest.settings, where="b")
    assert held is not None
    assert [*held.pictures] == [0, 4, 8]
    assert (held.total, held.size, held.factor, held.source) == (9, (32, 48), 1, "video/frames")
    for number, data in held.pictures.items():
        expected = (recording["video/frames"][0, :, number] + 1) / 2 * 255
        assert torch.equal(pixels(data), expected.round().permute(1, 2, 0).to(torch.uint8))


@pytest.mark.parametrize(
    ("video", "steps"),
    [((3, 720, 1280), 2), ((1, 1024, 1024), 60), ((81, 480, 832), 300)],
)
def test_the_limit_holds_whatever_was_made(
    tmp_path: Path, video: tuple[int, int, int], steps: int
) -> None:
    content = ramp(*video) if video[0] > 3 else noise(*video)
    recording, path = made(steps, content), tmp_path / "b.safetensors"
    bundle = write_bundle(recording, path, frames=decoded(recording))
    assert path.stat().st_size <= LIMIT
    held = read_key_frames(bundle.manifest.settings, where="b")
    assert held is not None
    first = pixels(held.pictures[0])
    assert min(first.shape[:2]) >= 100  # something is to be seen
    assert bundle.manifest.tensors  # and something is left to be compared
    again = Recording.open(path)
    assert read_key_frames(again.manifest.settings, where="b") == held


def test_long_prompts_and_settings_count(tmp_path: Path) -> None:
    video = noise(3, 360, 640)
    recording, path = made(40, video, prompt="x" * 500_000), tmp_path / "b.safetensors"
    write_bundle(recording, path, frames=decoded(recording))
    assert path.stat().st_size <= LIMIT
    with pytest.raises(UsageError, match="does not fit"):
        bundled(made(40, video, prompt="x" * 1_100_000))


def test_frames_are_as_large_as_there_is_room_for() -> None:
    frames = Frames(
        "v", (noise(3, 256, 256)[0].permute(1, 2, 3, 0) * 127 + 128).byte(), (0, 1, 2), 3
    )
    sizes = []
    for room in (2_000_000, 300_000, 60_000):
        held = key_frames(frames, room)
        assert held is not None
        assert sum(len(base64.b64encode(data)) for data in held.pictures.values()) <= room
        sizes.append(held.factor)
    assert sizes[0] == 1 < sizes[1] < sizes[2]
    assert key_frames(frames, 300) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((1, 3, 9, 32, 48), "float32", (9, 32, 48)),
        ((1, 9, 3, 32, 48), "bfloat16", (9, 32, 48)),
        ((2, 9, 32, 48, 3), "uint8", (9, 32, 48)),
        ((9, 32, 48, 3), "uint8", (9, 32, 48)),
        ((4, 3, 32, 48), "float16", (4, 32, 48)),
        ((3, 9, 32, 48), "float32", (9, 32, 48)),
        ((1, 16, 9, 32, 48), "float32", None),  # a latent
        ((1, 3, 32, 48), "int64", None),
        ((1, 77, 3), "float32", None),
        ((1, 3, 2, 2), "float32", None),
    ],
)
def test_layouts_of_frames_are_told(
    shape: tuple[int, ...], dtype: str, expected: tuple[int, int, int] | None
) -> None:
    laid = layout(shape, dtype)
    if expected is None:
        assert laid is None
        return
    assert laid is not None
    order, total = laid
    own = shape[1:] if len(shape) == 5 else shape
    assert (total, own[order[1]], own[order[2]]) == expected
    assert own[order[3]] == 3


def test_numbers_of_frames() -> None:
    assert [key_numbers(n) for n in (0, 1, 2, 81)] == [(), (0,), (0, 1), (0, 40, 80)]


def test_what_calls_decoded_is_taken_before_what_the_pipeline_made_of_it(tmp_path: Path) -> None:
    import truestep
    from truestep.testing import tiny

    pipe = tiny.pipeline("StableDiffusionPipeline")
    call = tiny.example_call("StableDiffusionPipeline")
    truestep.record(pipe, call=call, floor="none", path=tmp_path / "r.safetensors")
    frames = decoded(Recording.open(tmp_path / "r.safetensors"))
    assert frames is not None
    assert "/decoding/" in f"/{frames.source}"
    seen = pipe(**tiny.example_call("StableDiffusionPipeline")).images
    expected = (torch.as_tensor(seen) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
    assert int((frames.frames.int() - expected.int()).abs().max()) <= 1


def test_two_bundles_show_their_frames_and_where_they_differ(tmp_path: Path) -> None:
    video = ramp(9, 64, 96)
    other = video.clone()
    other[:, :, 8, :32] = -other[:, :, 8, :32]
    places = []
    for name, content in (("a", video), ("b", other), ("c", video)):
        recording = made(3, content)
        places.append(tmp_path / f"{name}.safetensors")
        write_bundle(recording, places[-1], frames=decoded(recording))
    wrong, right = compare(places[1], places[0]), compare(places[2], places[0])
    for result in (wrong, right):
        (media,) = result.media
        assert media.name == "Key frames"
        assert [frame.index for frame in media.frames] == [0, 4, 8]
    (media,) = wrong.media
    same = [frame.actual == frame.reference for frame in media.frames]
    assert same == [True, True, False]
    assert all(frame.actual == frame.reference for frame in right.media[0].frames)
    page = render([wrong])
    assert page.count("data:image/png") == 9
    assert "candidate, frame 8" in page
    bundled(made(3, video)).save(tmp_path / "bare.safetensors")
    alone = compare(places[0], tmp_path / "bare.safetensors")
    assert not alone.media
    assert "key frames are in the actual side alone: truestep show" in alone.notes


def test_the_verbs_tell_write_and_take_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    bundle, show = (runner(monkeypatch, capsys, verb) for verb in ("bundle", "show"))
    path = tmp_path / "run.safetensors"
    run(5).save(path)
    code, out, _ = bundle(str(path))
    assert code == 0
    assert "no decoded output is in the recording (--frames FILE" in " ".join(out.split())
    picture = tmp_path / "made.png"
    picture.write_bytes(png(bytes(range(192)), width=8, height=8))
    code, out, _ = bundle(str(path), "--frames", str(picture))
    assert code == 0
    assert "a picture, 8 x 8, of made.png" in " ".join(out.split())
    small = tmp_path / "run.bundle.safetensors"
    code, out, err = show(str(small), "--frames", str(tmp_path / "shown"))
    assert code == 0
    assert "a picture, 8 x 8, of made.png" in " ".join(out.split())
    (written,) = (tmp_path / "shown").iterdir()
    assert torch.equal(pixels(written.read_bytes()), pixels(picture.read_bytes()))
    code, _, err = show(str(path), "--frames", str(tmp_path / "shown"))
    assert code == 2
    assert "holds no key frames" in err


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told.update(frames={}),
        lambda told: told.update(frames={"0": "!"}),
        lambda told: told.update(frames={"0": base64.b64encode(b"GIF89a" * 20).decode()}),
        lambda told: told.update(size="large"),
        lambda told: told.pop("total"),
        lambda told: told.update(frames={str(n): told["frames"]["0"] for n in range(9)}),
    ],
)
def test_damaged_key_frames_are_refused(tmp_path: Path, damage: Any) -> None:
    recording = made(2, ramp(3, 16, 16))
    bundle = bundled(recording, frames=decoded(recording))
    told = {**bundle.manifest.settings[KEY_FRAMES]}
    told["frames"] = {**told["frames"]}
    damage(told)
    with pytest.raises(FileFormatError, match="the key frames cannot be read"):
        read_key_frames({KEY_FRAMES: told}, where="b")


def test_hostile_pictures_take_no_memory() -> None:
    good = png(bytes(48), width=4, height=4)
    assert pixels(good).shape == (4, 4, 3)
    large = good[:16] + (1 << 20).to_bytes(4, "big") + good[20:]
    rows = b"\0" * (5000 * 13)
    bomb = png(bytes(48), width=4, height=4).replace(
        zlib.compress((b"\0" + bytes(12)) * 4, 3), zlib.compress(rows, 3)
    )
    for data in (large, bomb, good[:40], b"", good[:8] + bytes(60)):
        with pytest.raises(ValueError):  # noqa: PT011 (several messages)
            pixels(data)


def test_pictures_are_made_smaller_by_means() -> None:
    frames = torch.tensor([[0, 10], [20, 30]], dtype=torch.uint8)[None, :, :, None].expand(
        1, 2, 2, 3
    )
    assert reduced(frames, 2).flatten().tolist() == [15, 15, 15]
    assert torch.equal(reduced(frames, 1), frames)


def test_what_is_inside_of_an_engine_is_left_out_of_bundles() -> None:
    recording = made(2, ramp(3, 16, 16), inside={"Model.forward": {}})
    entries = [
        entry if not entry.name.startswith("step/0000") else _inner(entry)
        for entry in recording.manifest.tensors
    ]
    manifest = recording.manifest.model_copy(update={"tensors": tuple(entries)})
    content = {name: recording[name] for name in recording}
    bundle = bundled(Recording.in_memory(content, manifest))
    assert "inside" not in bundle.manifest.settings
    assert not [e for e in bundle.manifest.tensors if e.kind == "module"]
    assert [note for note in bundle.manifest.notes if "of modules and weights are left out" in note]


def _inner(entry: Any) -> Any:
    from dataclasses import replace

    return replace(entry, kind="module")


def test_show_of_a_bundle_names_its_frames(tmp_path: Path, capsys: Captured) -> None:
    recording, path = made(2, ramp(5, 16, 16)), tmp_path / "b.safetensors"
    write_bundle(recording, path, frames=decoded(recording))
    show_file(path, as_json=False)
    assert "frames 0, 2, 4 of 5, 16 x 16, of video/frames" in capsys.readouterr().out
