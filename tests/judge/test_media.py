"""Frames as PNG: lossless, amplified, magenta where there is no number. Sounds as they are."""

from __future__ import annotations

import base64
import io
import math
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from truestep.judge.media import MAGENTA, frame_media, sound_media
from truestep.verdict import Media, Sound


def pixels(uri: str) -> np.ndarray:  # type: ignore[type-arg]
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_frames_are_lossless() -> None:
    frames = torch.rand(1, 3, 5, 6, 7) * 2 - 1
    media = frame_media(frames, frames, name="v")
    assert (media.gain, media.width, media.height) == (1, 7, 6)
    assert [frame.index for frame in media.frames] == [0, 2, 4]
    expected = ((frames[0, :, 2] + 1) / 2 * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(media.frames[1].actual), expected)
    assert not pixels(media.frames[1].difference).any()


def test_small_differences_are_made_visible() -> None:
    frames = torch.zeros(1, 3, 2, 4, 4)
    other = frames.clone()
    other[0, 0, 1, 2, 3] = 1e-3
    media = frame_media(other, frames, name="v")
    assert media.gain == 1024
    shown = pixels(media.frames[1].difference)
    assert shown[2, 3].tolist() == [round(1e-3 / 2 * 1024 * 255), 0, 0]


def test_one_rounding_step_is_visible() -> None:
    frames = torch.full((1, 3, 1, 2, 2), 0.5)
    other = torch.nextafter(frames, torch.ones(()))
    media = frame_media(other, frames, name="v")
    assert media.gain == 2**24
    assert pixels(media.frames[0].difference).min() == 128
    assert media.frames[0].actual == media.frames[0].reference


@pytest.mark.parametrize("size", [2.0, 1.0, 0.3, 1e-4, 1e-30])
def test_gains_are_powers_of_two_that_clip_nothing(size: float) -> None:
    frames = torch.zeros(1, 3, 1, 2, 2)
    media = frame_media(frames + size, frames, name="v")
    assert math.log2(media.gain).is_integer()
    assert size / 2 * media.gain <= 1
    assert size / 2 * media.gain > 0.5 or media.gain in {1, 2**24}


def test_dtypes_may_differ() -> None:
    frames = torch.rand(1, 3, 2, 4, 4) * 2 - 1
    media = frame_media(frames.bfloat16(), frames, name="v")
    assert media.gain >= 128
    assert pixels(media.frames[0].difference).any()


def test_only_the_first_sample_is_shown() -> None:
    frames = torch.zeros(2, 3, 1, 4, 4)
    other = frames.clone()
    other[1] = 1
    assert not pixels(frame_media(other, frames, name="v").frames[0].difference).any()


def test_what_is_not_finite_is_magenta() -> None:
    frames = torch.zeros(1, 3, 1, 4, 4)
    bad = frames.clone()
    bad[0, 1, 0, 0, 0] = float("nan")
    media = frame_media(bad, frames, name="v")
    assert tuple(pixels(media.frames[0].actual)[0, 0]) == MAGENTA
    assert tuple(pixels(media.frames[0].difference)[0, 0]) == MAGENTA
    assert tuple(pixels(media.frames[0].reference)[0, 0]) != MAGENTA
    assert tuple(pixels(media.frames[0].actual)[0, 1]) != MAGENTA
    assert frame_media(bad, bad, name="v").gain == 1


def test_long_videos_show_first_last_and_even_steps() -> None:
    frames = torch.zeros(1, 3, 81, 2, 2)
    shown = [f.index for f in frame_media(frames + 0.1, frames, name="v").frames]
    assert shown == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    few = frame_media(frames + 0.1, frames, name="v", limit=2).frames
    assert [f.index for f in few] == [0, 80]
    assert len(frame_media(frames, frames, name="v", limit=1).frames) == 1
    with pytest.raises(ValueError, match="at least one frame"):
        frame_media(frames, frames, name="v", limit=0)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [((1, 3, 2, 4, 4), (1, 3, 3, 4, 4)), ((1, 4, 2, 4, 4),) * 2, ((1, 3, 0, 4, 4),) * 2],
)
def test_what_is_not_two_videos_is_refused(own: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not two videos"):
        frame_media(torch.zeros(own), torch.zeros(theirs), name="v")


RATE = 24_000


def played(uri: str) -> tuple[np.ndarray, wave.Wave_read]:  # type: ignore[type-arg]
    """Samples `n c` as the standard library reads them."""
    data = base64.b64decode(uri.removeprefix("data:audio/wav;base64,"))
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getsampwidth(), file.getcomptype()) == (2, "NONE")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()), file


def hum(samples: int = RATE // 2, *, channels: int = 2, hertz: float = 3000) -> torch.Tensor:
    times = torch.arange(samples) / RATE
    return (torch.sin(2 * math.pi * hertz * times) * 0.25).expand(1, channels, -1).clone()


def listen(actual: torch.Tensor, reference: torch.Tensor, **options: float) -> Media:
    return sound_media(actual, reference, name="s", sample_rate=RATE, **options)  # type: ignore[arg-type]


def heard(media: Media) -> Sound:
    assert media.sound is not None
    return media.sound


def seen(media: Media) -> list[np.ndarray]:  # type: ignore[type-arg]
    pictures = heard(media).spectrograms
    assert pictures is not None
    return [pixels(uri) for uri in (pictures.actual, pictures.reference, pictures.difference)]


@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_are_as_loud_as_they_are(channels: int) -> None:
    quiet, loud = hum(channels=channels) * 0.01, hum(channels=channels) * 8
    sound = heard(listen(quiet, loud))
    samples, file = played(sound.actual)
    assert (file.getframerate(), file.getnchannels()) == (RATE, channels)
    assert np.array_equal(samples, (quiet[0].T * 32767).round().numpy())
    cut = played(sound.reference)[0]
    assert np.array_equal(cut, (loud[0].T.clamp(-1, 1) * 32767).round().numpy())
    assert abs(cut).max() == 32767
    assert sound.metrics.peak_reference == pytest.approx(2, rel=1e-3)
    assert sound.seconds_shown == 0.5


def test_a_hum_is_a_line_at_its_frequency() -> None:
    media = listen(hum(hertz=6000), hum(hertz=3000))
    own, theirs, difference = seen(media)
    assert own.shape == theirs.shape == difference.shape == (media.height, media.width, 3)
    assert (media.height, media.width) == (256, RATE // 2 // 256 + 1)
    middle = media.width // 2
    for picture, share in ((own, 0.5), (theirs, 0.25)):
        row = int(picture[:, middle, 0].argmax())
        assert row == pytest.approx(256 * (1 - share), abs=2)
        level = picture[row, middle, 0] / 255 * 100 - 100
        assert level == pytest.approx(20 * math.log10(0.25), abs=0.5)
    assert difference[:, middle, 0].max() == 255
    assert heard(media).difference_db == pytest.approx(88, abs=1)


def test_equal_sounds_have_no_difference() -> None:
    media = listen(hum(), hum())
    own, theirs, difference = seen(media)
    assert np.array_equal(own, theirs)
    assert not difference.any()
    assert heard(media).difference_db == 0


def test_swapped_channels_differ_in_the_picture() -> None:
    one_sided = hum()
    one_sided[:, 1] = 0
    assert seen(listen(one_sided.flip(1), one_sided))[2].any()
    assert seen(listen(one_sided, hum()))[2].any()  # beneath a channel that is equal


def test_the_shorter_sound_goes_on_as_silence_in_its_picture() -> None:
    media = listen(hum(RATE // 4), hum(RATE // 2))
    own, theirs, difference = seen(media)
    assert own.shape == theirs.shape
    assert not own[:, -10:].any()
    assert theirs[:, -10:].any()
    assert difference[:, -10:].any()
    sound = heard(media)
    assert len(played(sound.actual)[0]) == RATE // 4
    assert sound.metrics.rel_l2 is None
    assert sound.metrics.seconds_difference == -0.25


def test_mono_beside_stereo_is_shown() -> None:
    media = listen(hum(channels=1), hum(channels=2))
    assert not seen(media)[2].any()
    assert heard(media).metrics.correlation is None


def test_what_is_not_finite_is_silent_and_magenta() -> None:
    bad = hum()
    bad[0, 1, RATE // 4] = math.nan
    media = listen(bad, hum())
    own, theirs, difference = seen(media)
    middle = media.width // 2
    assert tuple(own[100, middle]) == tuple(difference[100, middle]) == MAGENTA
    assert tuple(own[100, 0]) != MAGENTA
    assert not (theirs == MAGENTA).all(-1).any()
    assert played(heard(media).actual)[0][RATE // 4, 1] == 0
    assert math.isnan(heard(media).metrics.rel_l2 or 0)
    assert seen(listen(bad * math.nan, bad * math.nan))[2].any()


def test_long_sounds_are_played_from_the_start_and_measured_whole() -> None:
    reference = hum(3 * RATE)
    actual = reference.clone()
    actual[..., -1] = 1
    media = listen(actual, reference, limit_s=2)
    sound = heard(media)
    assert len(played(sound.actual)[0]) == 2 * RATE
    assert sound.seconds_shown == 2
    assert sound.metrics.seconds_actual == 3
    assert sound.metrics.rel_l2 is not None
    assert sound.metrics.rel_l2 > 0
    assert heard(listen(hum(10 * RATE), hum(10 * RATE))).seconds_shown == 10
    assert listen(hum(10 * RATE), hum(10 * RATE)).width == 640
    with pytest.raises(ValueError, match="at least one sample"):
        listen(actual, reference, limit_s=0)


def test_only_the_first_sample_is_played_and_all_are_measured() -> None:
    two = hum().repeat(2, 1, 1)
    other = two.clone()
    other[1] = 0
    media = listen(other, two)
    assert not seen(media)[2].any()
    assert heard(media).metrics.level_db == pytest.approx(-3.01, abs=0.01)


def test_measured_keeps_the_numbers_alone() -> None:
    media = listen(hum(), hum() * 0.5)
    bare = media.measured()
    assert heard(bare).metrics == heard(media).metrics
    assert len(bare.model_dump_json()) < 600
    frames = torch.zeros(1, 3, 1, 4, 4)
    assert frame_media(frames, frames, name="v").measured().frames == ()


def test_a_check_shows_the_sound_of_both_sides() -> None:
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest
    from truestep.replay.judging import _sound
    from truestep.replay.kept import Replay

    def shown(actual: torch.Tensor | None, **settings: object) -> tuple[Media, ...]:
        manifest = Manifest(tool_version="0", created="", level="full", settings=settings)
        recording = Recording.in_memory({"audio/waveform": hum()}, manifest)
        made = {} if actual is None else {"audio/waveform": actual}
        return _sound(Replay(outputs=made), recording)

    (media,) = shown(hum() * 0.5, sample_rate=RATE)
    assert media.name == "audio/waveform"
    assert heard(media).sample_rate == RATE
    assert heard(media).metrics.level_db == pytest.approx(-6.02, abs=0.01)
    assert shown(hum(RATE), sample_rate=RATE) != ()
    assert shown(None, sample_rate=RATE) == ()
    assert shown(hum()) == ()
    assert shown(hum()[0], sample_rate=RATE) == ()
