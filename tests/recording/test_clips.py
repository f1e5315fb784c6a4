"""Media that are decoded to be compared: whatever the file, all of it or an error that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import media
from truestep.errors import FileFormatError
from truestep.recording import clips
from truestep.recording.clips import is_media, is_sequence, read_clip


def test_a_png_is_read_to_the_level(tmp_path: Path) -> None:
    picture = media.moving()[0]
    clip = read_clip(media.write_png(tmp_path / "a.png", picture))
    assert clip.what == "picture"
    assert clip.frames is not None
    assert np.array_equal(clip.frames[0].numpy(), picture)
    assert clip.fps is None
    assert clip.unseen == ()


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    video = media.moving(frames=12)
    clip = read_clip(media.write_frames(tmp_path / "a", video))
    assert clip.frames is not None
    assert np.array_equal(clip.frames.numpy(), video)
    assert clip.names[1:3] == ("frame_1.png", "frame_2.png")
    assert clip.names[-1] == "frame_11.png"


def test_a_video_has_its_rate_and_its_sound(tmp_path: Path) -> None:
    path = media.write_mp4(tmp_path / "a.mp4", media.moving(), sound=media.tones(seconds=1.5))
    clip = read_clip(path)
    assert (clip.what, clip.count, clip.fps, clip.seconds) == ("video", 12, 8.0, 1.5)
    assert clip.sound is not None
    assert clip.sample_rate == media.RATE
    assert len(clip.sound) == 2
    assert clip.form == "h264 and aac yuv420p stereo"


def test_a_gif_has_the_rate_of_its_delays(tmp_path: Path) -> None:
    clip = read_clip(media.write_gif(tmp_path / "a.gif", media.moving(), delay_ms=100))
    assert (clip.what, clip.count, clip.fps) == ("video", 12, 10.0)


def test_a_wav_is_read_to_the_bit_and_keeps_what_is_not_finite(tmp_path: Path) -> None:
    sound = media.tones().astype(np.float32)
    sound[1, 3] = np.inf
    clip = read_clip(media.write_wav(tmp_path / "a.wav", sound, floating=True))
    assert clip.sound is not None
    assert torch.equal(clip.sound, torch.from_numpy(sound))


def test_a_file_is_what_it_begins_as(tmp_path: Path) -> None:
    path = media.write_png(tmp_path / "a.png", media.moving()[0])
    renamed = path.rename(tmp_path / "a.mp4")
    assert read_clip(renamed).what == "picture"
    assert is_media(renamed)


def test_ten_bits_are_said_not_to_be_compared(tmp_path: Path) -> None:
    path = media.write_mp4(tmp_path / "a.mp4", media.moving(), pixels="yuv420p10le")
    clip = read_clip(path)
    assert clip.unseen == ("what is below 8 bits",)


def test_a_damaged_video_keeps_what_can_be_decoded(tmp_path: Path) -> None:
    """An index at the front, and the end cut off."""
    import av

    whole = media.write_mp4(tmp_path / "a.mp4", media.moving(frames=40), crf=20)
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "c.mp4").write_bytes(data[: len(data) * 2 // 3])
    clip = read_clip(tmp_path / "c.mp4")
    assert 0 < clip.count < 40
    assert clip.broken
    assert read_clip(tmp_path / "b.mp4").broken == ""


@pytest.mark.parametrize("form", ["mp4", "gif", "png", "wav"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_is_an_error_of_ours_or_a_clip(
    form: str, tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(_whole(tmp_path, form).read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"b.{form}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    told = None
    try:
        clip = read_clip(path)
    except FileFormatError as error:
        told = error
    if told is None:
        assert clip.count or clip.sound is not None
    else:
        assert told.where == str(path)
        assert told.measured


def _whole(folder: Path, form: str) -> Path:
    """A file that is written once: an encoder gives another each time."""
    path = folder / f"a.{form}"
    write: dict[str, Any] = {"mp4": media.write_mp4, "gif": media.write_gif}
    if path.exists():
        return path
    if form == "wav":
        return media.write_wav(path, media.tones(seconds=0.2))
    if form == "png":
        return media.write_png(path, media.moving()[0])
    return Path(write[form](path, media.moving(frames=4)))


def test_what_is_too_large_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = media.write_mp4(tmp_path / "a.mp4", media.moving())
    monkeypatch.setattr(clips, "MOST_BYTES", 3 * 48 * 64 * 3)
    with pytest.raises(FileFormatError) as caught:
        read_clip(path)
    assert "decoded it is larger than" in caught.value.measured


def test_which_folders_are_frames_and_which_are_runs(tmp_path: Path) -> None:
    video = media.moving(frames=3)
    assert is_sequence(media.write_frames(tmp_path / "numbered", video))
    named = tmp_path / "named"
    named.mkdir()
    for name in ("cat", "dog"):
        media.write_png(named / f"{name}.png", video[0])
    assert not is_sequence(named)
    assert is_media(named)
    videos = tmp_path / "videos"
    videos.mkdir()
    for at in range(2):
        media.write_mp4(videos / f"{at}.mp4", video)
    assert not is_sequence(videos)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a1_2", "a2_3"):
        media.write_png(two / f"{name}.png", video[0])
    assert not is_sequence(two)


def test_weights_and_other_folders_are_no_media(tmp_path: Path) -> None:
    assert not is_media(tmp_path)
    assert not is_media(tmp_path / "none.safetensors")
    assert not is_media(np.zeros(3))
    media.write_png(tmp_path / "a.png", media.moving()[0])
    assert is_media(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert not is_media(tmp_path)


def test_pictures_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    folder = media.write_frames(tmp_path / "a", media.moving(frames=3))
    media.write_png(folder / "frame_3.png", media.moving()[0, :20])
    with pytest.raises(FileFormatError) as caught:
        read_clip(folder)
    assert "no frames of one size: 64x20, 64x48" in caught.value.measured
