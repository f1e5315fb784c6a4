"""`truestep run` on an audio-video model: an mp4 with sound, and a second stage."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Run, runner

CASE = """
[case.clip]
model = "{model}"
prompt = "a red one"
steps = 2
height = 32
width = 32
num_frames = 9
max_sequence_length = 16
settings = {{ profile = "diffusers-0.42.1", stg_scale = 0, audio_stg_scale = 0, device = "cpu" }}

[case.mute]
model = "builtin:digits"
prompt = "a red one"
"""


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_ltx2: dict[str, Path],
) -> Run:
    """`truestep run` in a folder with a small LTX-2 case, and one without sound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truestep.toml").write_text(CASE.format(model=tiny_ltx2["2.3"]))
    return runner(monkeypatch, capsys, "run")


def decoded(path: Path) -> dict[str, Any]:
    """Frames, frame rate, seconds of sound and its sample rate of an mp4."""
    import av

    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        return {
            "frames": [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)],
            "fps": video.average_rate,
            "rate": audio.rate,
            "channels": audio.channels,
            "seconds": float(audio.duration * audio.time_base),
        }


def samples(path: Path) -> Any:
    import av
    import numpy as np

    with av.open(str(path)) as container:
        return np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)


def test_run_writes_a_video_with_its_sound(run: Run, tmp_path: Path) -> None:
    from truestep.recording.format import Recording

    code, out, err = run("clip", "--output", "out")
    assert code == 0, err
    (video,) = tmp_path.glob("out/*.mp4")
    (latent,) = tmp_path.glob("out/*.safetensors")
    assert f"video: {Path('out') / video.name}" in out
    recording = Recording.open(latent)
    waveform = recording["audio/waveform"]
    found = decoded(video)
    assert len(found["frames"]) == recording["video/frames"].shape[2]
    assert found["fps"] == 24  # what the model is told by default
    assert found["rate"] == recording.manifest.settings["sample_rate"] == 48000
    assert found["channels"] == waveform.shape[1] == 2
    assert found["seconds"] == pytest.approx(waveform.shape[2] / 48000, abs=0.05)
    heard = samples(video)[:, : waveform.shape[2]]
    assert heard.std() == pytest.approx(float(waveform.float().std()), rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "fps"),
    [(("--set", "fps=12"), Fraction(12)), (("--fps", "29.97"), Fraction(2997, 100))],
)
def test_frames_a_second_are_the_models_or_the_asked_ones(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], fps: Fraction
) -> None:
    code, _, err = run("clip", *arguments)
    assert code == 0, err
    (video,) = tmp_path.glob("truestep-output/*.mp4")
    assert float(decoded(video)["fps"]) == pytest.approx(float(fps), rel=1e-3)


def test_run_refines_a_clip_in_a_second_stage(run: Run, tmp_path: Path) -> None:
    from bench.faults.tiny import build_tiny_upsampler

    folder = build_tiny_upsampler(tmp_path / "latent_upsampler")
    code, out, err = run("clip", "--refine", str(folder))
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[2::3]] == ["latent", "latent"]
    assert "second stage: 3 steps in" in lines[4]
    sizes = [decoded(tmp_path / line.split()[1]) for line in lines if "video:" in line]
    assert len(sizes) == 2
    assert sizes[0]["seconds"] == pytest.approx(sizes[1]["seconds"])
    recordings = sorted(tmp_path.glob("truestep-output/*.safetensors"))
    assert len(recordings) == 2


def test_an_upsampler_that_is_none_is_refused_before_the_first_stage(
    run: Run, tmp_path: Path
) -> None:
    code, out, err = run("clip", "--refine", "nowhere")
    assert code == 2
    assert "the latent upsampler cannot be used" in err
    assert not out
    assert not (tmp_path / "truestep-output").exists()


def test_a_second_stage_of_video_alone_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("mute", "--refine", "nowhere")
    assert code == 2
    assert "only an LTX-2 case has a second stage" in err
