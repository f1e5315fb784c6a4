"""Two files of media: every planted change is found, no harmless one is, and nothing more said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import truestep
from tests import media
from tests.media import Array
from truestep.errors import FileFormatError, UsageError
from truestep.judge.media_files import MediaOptions
from truestep.recording.clips import read_clip
from truestep.verdict import Comparison, Verdict


def kinds(result: Comparison) -> list[str]:
    assert result.evidence is not None
    return [finding.kind for finding in result.evidence.findings]


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media.write_mp4(tmp_path_factory.mktemp("trusted") / "a.mp4", media.moving())


@pytest.mark.parametrize("name", media.PLANTED)
def test_a_planted_change_of_frames_is_found(name: str, trusted: Path, tmp_path: Path) -> None:
    kind, verdict, change = media.PLANTED[name]
    path = media.write_mp4(tmp_path / "b.mp4", change(media.moving()))
    result = truestep.compare(path, trusted)
    assert kind in kinds(result)
    assert result.verdict is Verdict(verdict)
    assert set(kinds(result)) <= {kind, "other number of frames", "other size"}


SMALL = {"limited", "full", "gamma"}
"""Changes of this clip that are hardly larger than what a coarse encoder loses."""


@pytest.mark.parametrize("name", media.PLANTED)
def test_a_planted_change_beneath_a_coarse_encoder_is_found_or_nothing_is(
    name: str, tmp_path: Path
) -> None:
    kind, _, change = media.PLANTED[name]
    clip = media.moving()
    reference = media.write_mp4(tmp_path / "a.mp4", clip, crf=24)
    told = kinds(
        truestep.compare(media.write_mp4(tmp_path / "b.mp4", change(clip), crf=26), reference)
    )
    if name in SMALL:
        assert set(told) <= {kind, "brightness"}  # a gain and an offset are as near as a gamma is
    else:
        assert kind in told


TWINS: dict[str, Callable[[Array], Array]] = {
    "encoded again": lambda x: x,
    "noise": lambda x: media.noisy(x, 6),
    "cast that cuts": lambda x: media.levels(np.floor(x * 0.998)),
    "one level": lambda x: media.levels(x + 0.5),
    "blur": lambda x: media.levels((x.astype(float) + np.roll(x, 1, 1) + np.roll(x, 1, 2)) / 3),
    "patches": lambda x: media.levels(
        x + np.kron(np.random.default_rng(2).normal(0, 8, (len(x), 6, 8, 3)), np.ones((1, 8, 8, 1)))
    ),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("crf", [18, 35])
def test_a_harmless_twin_has_no_finding(name: str, crf: int, trusted: Path, tmp_path: Path) -> None:
    path = media.write_mp4(tmp_path / "b.mp4", TWINS[name](media.moving()), crf=crf)
    result = truestep.compare(path, trusted)
    assert kinds(result) == []
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.exit_code == 4
    assert "media cannot tell a harmless change from a fault" in result.sentence


def test_a_black_reference_is_invalid_and_two_black_sides_are_said(tmp_path: Path) -> None:
    picture = media.write_png(tmp_path / "a.png", media.moving()[0])
    black = media.write_png(tmp_path / "b.png", media.moving()[0] * 0)
    result = truestep.compare(picture, black)
    assert result.verdict is Verdict.INVALID
    assert result.sentence.startswith("invalid: the picture of the reference side is black")
    both = truestep.compare(black, media.write_png(tmp_path / "c.png", media.moving()[0] * 0))
    assert any("there is nothing to compare" in note for note in both.notes)
    assert not truestep.compare(picture, picture).notes[1:]


@pytest.mark.parametrize("seed", range(1, 6))
def test_another_seed_has_no_finding(seed: int, trusted: Path, tmp_path: Path) -> None:
    result = truestep.compare(media.write_mp4(tmp_path / "b.mp4", media.moving(seed)), trusted)
    assert kinds(result) == []
    assert result.verdict is Verdict.INCONCLUSIVE


def test_what_does_not_move_has_no_order(tmp_path: Path) -> None:
    """Frames of a still clip with noise: any order is as good."""
    still = np.repeat(media.moving()[:1], 12, 0)
    a = media.write_frames(tmp_path / "a", media.noisy(still, 3, 1))
    b = media.write_frames(tmp_path / "b", media.noisy(still, 3, 2))
    assert kinds(truestep.compare(a, b)) == []


def test_two_changes_at_once_are_both_found(trusted: Path, tmp_path: Path) -> None:
    changed = media.PLANTED["limited"][2](media.PLANTED["shift"][2](media.moving()))
    result = truestep.compare(media.write_mp4(tmp_path / "b.mp4", changed), trusted)
    assert sorted(kinds(result)) == ["colour range", "frame shift"]


def test_a_black_leader_that_is_shifted_is_a_shift(tmp_path: Path) -> None:
    leader = np.concatenate([media.moving()[:3] * 0, media.moving()])
    reference = media.write_mp4(tmp_path / "a.mp4", leader[:-1])
    for name, clip in (("late", np.concatenate([leader[:1], leader[:-2]])), ("early", leader[1:])):
        result = truestep.compare(media.write_mp4(tmp_path / f"{name}.mp4", clip), reference)
        assert kinds(result) == ["frame shift"]
    other = media.write_mp4(tmp_path / "c.mp4", media.blacked(leader[:-1]))
    assert kinds(truestep.compare(other, reference)) == ["black frames"]


def test_a_finding_tells_its_place_and_its_proof(trusted: Path, tmp_path: Path) -> None:
    path = media.write_mp4(tmp_path / "b.mp4", media.swapped(media.moving()))
    result = truestep.compare(path, trusted)
    assert result.evidence is not None
    (finding,) = result.evidence.findings
    assert finding.frames == (3, 7)
    assert finding.before is not None
    assert finding.after is not None
    assert finding.before > 4 * finding.after
    assert "its frames 3 and 7 are in each other's place (explains 9" in result.sentence
    worst = min(result.evidence.scores, key=lambda score: score.psnr_db)
    assert worst.actual in (3, 7)


def test_equal_frames_are_identical_and_a_copy_is_said(trusted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(trusted, tmp_path / "copy.mp4"))
    result = truestep.compare(copy, trusted)
    assert result.verdict is Verdict.IDENTICAL
    assert result.sentence == "identical: 12 frames agree bit for bit"
    assert result.notes == ("the two files are the same, byte for byte: is one a copy?",)
    assert result.hint == ""


def test_equal_frames_in_two_files_are_identical_once_decoded(tmp_path: Path) -> None:
    clip = media.moving()
    a = media.write_frames(tmp_path / "a", clip)
    b = media.write_frames(tmp_path / "b", clip, first=7)
    (b / "frame_7.png").write_bytes((b / "frame_7.png").read_bytes())
    from PIL import Image

    Image.fromarray(clip[0]).save(b / "frame_7.png", compress_level=0)
    result = truestep.compare(a, b)
    assert result.verdict is Verdict.IDENTICAL
    assert result.sentence == "identical: 12 frames agree bit for bit once decoded"
    assert [note.partition(":")[0] for note in result.notes[1:]] == [
        "names on the actual side only",
        "names on the reference side only",
    ]
    assert "frame_0.png" in result.notes[1]
    assert "frame_12.png" in result.notes[2]


def test_a_video_and_its_frames_are_identical_in_rgb(trusted: Path, tmp_path: Path) -> None:
    clip = read_clip(trusted)
    assert clip.frames is not None
    frames = media.write_frames(tmp_path / "a", clip.frames.numpy())
    result = truestep.compare(frames, trusted)
    assert result.verdict is Verdict.IDENTICAL
    assert result.sentence.endswith("agree bit for bit once decoded to RGB at 8 bits")
    changed = clip.frames.numpy().copy()
    changed[3, 5, 5, 1] ^= 1
    other = truestep.compare(media.write_frames(tmp_path / "b", changed), trusted)
    assert other.verdict is Verdict.INCONCLUSIVE
    assert "1 of 12 frames differ" in other.sentence


def test_layouts_that_hold_more_than_rgb_are_not_identical_in_it(tmp_path: Path) -> None:
    from PIL import Image

    picture = media.moving()[0]
    media.write_png(tmp_path / "a.png", picture)
    rgba = np.concatenate([picture, np.full((48, 64, 1), 90, np.uint8)], 2)
    Image.fromarray(rgba).save(tmp_path / "b.png")
    result = truestep.compare(tmp_path / "a.png", tmp_path / "b.png")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "and differ in what that does not hold" in result.sentence


def test_pictures_that_agree_in_8_bits_alone_are_not_identical(tmp_path: Path) -> None:
    from PIL import Image

    deep = (media.moving()[0, :, :, 0].astype(np.uint16) * 257) // 2 * 2
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep + 1).save(tmp_path / "b.png")
    result = truestep.compare(tmp_path / "a.png", tmp_path / "b.png")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "agree in RGB at 8 bits" in result.sentence
    assert "what is below 8 bits" in result.not_looked_at


def test_transparency_is_said_to_be_left_out(tmp_path: Path) -> None:
    from PIL import Image

    rgba = np.concatenate([media.moving()[0], np.full((48, 64, 1), 90, np.uint8)], 2)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    rgba[0, 0, 3] = 91
    Image.fromarray(rgba).save(tmp_path / "b.png")
    result = truestep.compare(tmp_path / "a.png", tmp_path / "b.png")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "transparency" in result.not_looked_at


# --- sizes, lengths, rates -----------------------------------------------------------------------


def test_other_lengths_are_incomparable_and_what_both_have_is_measured(
    trusted: Path, tmp_path: Path
) -> None:
    path = media.write_mp4(tmp_path / "b.mp4", media.moving()[:9])
    result = truestep.compare(path, trusted)
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.exit_code == 3
    assert "it has 9 frames, the reference 12" in result.sentence
    assert result.missing == ("frame 9", "frame 10", "frame 11")
    assert result.evidence is not None
    assert len(result.evidence.scores) == 9
    back = truestep.compare(trusted, path)
    assert back.unexpected == ("frame 9", "frame 10", "frame 11")


def test_other_size_and_rate_are_incomparable(trusted: Path, tmp_path: Path) -> None:
    size = truestep.compare(media.write_mp4(tmp_path / "b.mp4", media.moving()[:, :40]), trusted)
    assert size.verdict is Verdict.INCOMPARABLE
    assert "its frames are 64x40, the reference's 64x48" in size.sentence
    rate = truestep.compare(media.write_mp4(tmp_path / "c.mp4", media.moving(), fps=12), trusted)
    assert rate.verdict is Verdict.INCOMPARABLE
    assert "it has 12 frames a second, the reference 8 (1 s against 1.5 s)" in rate.sentence
    ntsc = media.write_mp4(tmp_path / "d.mp4", media.moving(), fps=24000 / 1001)
    film = media.write_mp4(tmp_path / "e.mp4", media.moving(), fps=24)
    assert kinds(truestep.compare(ntsc, film)) == []


def test_marks_of_colours_are_told_where_both_sides_have_them(
    trusted: Path, tmp_path: Path
) -> None:
    new = media.write_mp4(tmp_path / "a.mp4", media.moving(), matrix="bt709")
    assert "colour marks" not in kinds(truestep.compare(new, trusted))
    old = media.write_mp4(tmp_path / "b.mp4", media.moving(), matrix="smpte170m")
    result = truestep.compare(new, old)
    assert "colour marks" in kinds(result)
    assert result.evidence is not None
    texts = [finding.text for finding in result.evidence.findings]
    assert "its colours are marked BT.709, the reference's BT.601" in texts


def test_a_gif_is_compared_with_the_video_it_was_made_of(trusted: Path, tmp_path: Path) -> None:
    gif = media.write_gif(tmp_path / "b.gif", media.moving())
    assert kinds(truestep.compare(gif, trusted)) == []
    late = media.write_gif(tmp_path / "c.gif", media.swapped(media.moving()))
    assert kinds(truestep.compare(late, gif)) == ["swapped frames"]


def test_a_picture_against_a_video_and_a_sound_against_a_picture(
    trusted: Path, tmp_path: Path
) -> None:
    picture = media.write_png(tmp_path / "a.png", media.moving()[0])
    assert truestep.compare(picture, trusted).verdict is Verdict.INCOMPARABLE
    sound = media.write_wav(tmp_path / "a.wav", media.tones())
    result = truestep.compare(sound, picture)
    assert result.verdict is Verdict.INCOMPARABLE
    assert kinds(result) == ["no frames", "no sound"]


# --- sound ---------------------------------------------------------------------------------------

HEARD: dict[str, tuple[str, str, Callable[[Array], Array]]] = {
    "gain": ("sound gain", "inconclusive", lambda x: x * 0.7),
    "polarity": ("polarity", "drifted", lambda x: -x),
    "swapped": ("channels swapped", "drifted", lambda x: x[::-1]),
    "later": ("sound offset", "inconclusive", lambda x: np.roll(x, 90, 1)),
    "silent": ("silence", "invalid", lambda x: x * 0),
    "short": ("other length of sound", "incomparable", lambda x: x[:, :-400]),
    "mono": ("other channels", "incomparable", lambda x: x[:1]),
}


@pytest.mark.parametrize("name", HEARD)
def test_a_planted_change_of_sound_is_found(name: str, tmp_path: Path) -> None:
    kind, verdict, change = HEARD[name]
    reference = media.write_wav(tmp_path / "a.wav", media.tones())
    result = truestep.compare(media.write_wav(tmp_path / "b.wav", change(media.tones())), reference)
    assert kinds(result) == [kind]
    assert result.verdict is Verdict(verdict)


def test_a_sample_that_is_not_finite_and_another_rate(tmp_path: Path) -> None:
    sound = media.tones()
    reference = media.write_wav(tmp_path / "a.wav", sound, floating=True)
    broken = sound.copy()
    broken[0, 5] = np.nan
    result = truestep.compare(media.write_wav(tmp_path / "b.wav", broken, floating=True), reference)
    assert result.verdict is Verdict.INVALID
    assert result.sentence.startswith("invalid: 1 sample of the actual side")
    rate = truestep.compare(media.write_wav(tmp_path / "c.wav", sound, rate=22050), reference)
    assert rate.verdict is Verdict.INCOMPARABLE
    assert "its sound has 22,050 Hz, the reference's 16,000" in rate.sentence
    pcm = media.write_wav(tmp_path / "d.wav", sound, rate=22050, floating=True)
    assert "the samples are the same" in truestep.compare(pcm, reference).sentence


def test_next_to_silent_is_no_silence(tmp_path: Path) -> None:
    quiet = media.tones() * 2.0**-14
    reference = media.write_wav(tmp_path / "a.wav", quiet, floating=True)
    silent = media.write_wav(tmp_path / "b.wav", quiet * 0, floating=True)
    assert kinds(truestep.compare(silent, reference)) == []
    louder = media.write_wav(tmp_path / "c.wav", quiet * 1000, floating=True)
    assert kinds(truestep.compare(silent, louder)) == ["silence"]


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 0.1])
def test_noise_in_a_sound_is_no_finding(sigma: float, tmp_path: Path) -> None:
    reference = media.write_wav(tmp_path / "a.wav", media.tones())
    noise = np.random.default_rng(0).normal(0, sigma, media.tones().shape)
    result = truestep.compare(media.write_wav(tmp_path / "b.wav", media.tones() + noise), reference)
    assert kinds(result) == []
    assert result.verdict is Verdict.INCONCLUSIVE


def test_a_video_with_sound_is_judged_by_both(tmp_path: Path) -> None:
    clip, sound = media.moving(), media.tones(seconds=1.5)
    reference = media.write_mp4(tmp_path / "a.mp4", clip, sound=sound)
    copy = truestep.compare(Path(shutil.copy(reference, tmp_path / "b.mp4")), reference)
    assert copy.verdict is Verdict.IDENTICAL
    assert copy.sentence == "identical: 12 frames and 24,576 samples agree bit for bit"
    turned = truestep.compare(media.write_mp4(tmp_path / "c.mp4", clip, sound=-sound), reference)
    assert turned.verdict is Verdict.DRIFTED
    assert kinds(turned) == ["polarity"]
    assert {m.name: m.verdict for m in turned.modalities}["audio"] is Verdict.DRIFTED
    again = truestep.compare(media.write_mp4(tmp_path / "e.mp4", clip, sound=sound), reference)
    assert kinds(again) == []
    mute = truestep.compare(media.write_mp4(tmp_path / "d.mp4", clip), reference)
    assert mute.verdict is Verdict.INCOMPARABLE
    assert kinds(mute) == ["no sound"]


# --- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the file is empty"),
        (b"hello", "it is a text file"),
        (b"\0\0\0\x18ftypmp42abcdefghijklmnop", "it is cut short or damaged, perhaps"),
    ],
)
def test_what_cannot_be_decoded_is_one_clear_error(
    content: bytes, text: str, trusted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "b.mp4"
    path.write_bytes(content)
    for sides in ((path, trusted), (trusted, path)):
        with pytest.raises(FileFormatError) as caught:
            truestep.compare(*sides)
        assert caught.value.what == "the video cannot be read"
        assert caught.value.where == str(path)
        assert text in caught.value.measured
        assert "Errno" not in caught.value.measured


def test_a_file_that_is_not_there_is_named(trusted: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the video cannot be read") as caught:
        truestep.compare(tmp_path / "none.mp4", trusted)
    assert caught.value.measured == "no such file"


def test_media_and_tensors_are_no_pair(trusted: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UsageError, match="media are compared with media"):
        truestep.compare(trusted, tmp_path / "a.npy")
    with pytest.raises(UsageError, match="media are compared with media: give two paths"):
        truestep.compare(trusted, np.zeros(3))
    with pytest.raises(UsageError, match="without a tolerance"):
        truestep.compare(trusted, trusted, tolerance=1e-3)
    with pytest.raises(UsageError, match="are for pictures, videos and sounds"):
        truestep.compare(np.zeros(3), np.zeros(3), media=MediaOptions(same_seed=[trusted]))


# --- other runs ----------------------------------------------------------------------------------


def drifting(clip: Array, size: float, seed: int) -> Array:
    """A run with one seed: large soft patches of its own."""
    draw = np.random.default_rng(seed).normal(0, size, (len(clip), 6, 8, 3))
    return media.levels(clip + np.kron(draw, np.ones((1, 8, 8, 1))))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reruns, other seeds, and a copy among the reruns."""
    folder = tmp_path_factory.mktemp("runs")
    clip = media.moving()
    for name in ("reruns", "few", "seeds"):
        (folder / name).mkdir()
    for at in range(18):
        media.write_mp4(folder / "reruns" / f"{at}.mp4", drifting(clip, 4, at))
    for at in range(3):
        shutil.copy(folder / "reruns" / f"{at}.mp4", folder / "few" / f"{at}.mp4")
        media.write_mp4(folder / "seeds" / f"{at}.mp4", media.moving(20 + at))
    media.write_mp4(folder / "reference.mp4", drifting(clip, 4, 100))
    media.write_mp4(folder / "far.mp4", drifting(clip, 14, 101))
    media.write_mp4(folder / "near.mp4", drifting(clip, 4, 102))
    return folder


def placed(runs: Path, actual: str, same: str = "", others: str = "") -> Comparison:
    options = MediaOptions([runs / same] if same else [], [runs / others] if others else [])
    return truestep.compare(runs / actual, runs / "reference.mp4", media=options)


def test_few_runs_place_a_difference_and_decide_nothing(runs: Path) -> None:
    result = placed(runs, "far.mp4", "few", "seeds")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.evidence is not None
    ladder = result.evidence.ladder
    assert ladder is not None
    assert ladder.place == "between reruns and other seeds"
    assert ladder.p_value == pytest.approx(1 / 5)
    assert "18 different reruns could decide" in result.sentence
    assert [run.role for run in ladder.runs] == [
        "reference", *["same seed"] * 3, "actual", *["other seed"] * 3
    ]  # fmt: skip


def test_enough_runs_decide_that_it_is_another(runs: Path) -> None:
    result = placed(runs, "far.mp4", "reruns", "seeds")
    assert result.verdict is Verdict.DRIFTED
    assert result.evidence is not None
    assert result.evidence.ladder is not None
    assert result.evidence.ladder.p_value == pytest.approx(1 / 20)
    assert "media do not show whether" in result.sentence


def test_a_run_among_the_reruns_is_never_called_equivalent(runs: Path) -> None:
    result = placed(runs, "near.mp4", "reruns", "seeds")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.evidence is not None
    assert result.evidence.ladder is not None
    assert result.evidence.ladder.place == "within reruns"
    assert result.sentence.startswith("inconclusive: within reruns: ")


def test_other_seeds_alone_place_it(runs: Path) -> None:
    near = placed(runs, "near.mp4", others="seeds")
    far = truestep.compare(
        runs / "seeds" / "0.mp4",
        runs / "reference.mp4",
        media=MediaOptions(other_seeds=[runs / "seeds" / "1.mp4", runs / "seeds" / "2.mp4"]),
    )
    for result, places in (
        (near, ["nearer than other seeds"]),
        (far, ["nearer than other seeds", "as far as another seed"]),
    ):
        assert result.verdict is Verdict.INCONCLUSIVE
        assert result.evidence is not None
        assert result.evidence.ladder is not None
        assert result.evidence.ladder.place in places


def test_copies_count_once_and_reruns_that_do_not_vary_are_no_measure(
    runs: Path, tmp_path: Path
) -> None:
    for at in range(20):
        shutil.copy(runs / "reference.mp4", tmp_path / f"{at}.mp4")
    result = truestep.compare(
        runs / "far.mp4", runs / "reference.mp4", media=MediaOptions([tmp_path])
    )
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "20 reruns that agree bit for bit with another run are left out" in result.sentence


def test_the_run_under_test_is_no_rerun_and_runs_have_one_size(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the run under test is among the trusted runs"):
        truestep.compare(
            runs / "reruns" / "0.mp4",
            runs / "reference.mp4",
            media=MediaOptions([runs / "reruns"]),
        )
    media.write_mp4(tmp_path / "b.mp4", media.moving()[:5])
    with pytest.raises(UsageError, match="of another size than the reference") as caught:
        truestep.compare(
            runs / "far.mp4", runs / "reference.mp4", media=MediaOptions([tmp_path / "b.mp4"])
        )
    assert "5 frames of 64x48; the reference has 12 frames of 64x48" in caught.value.measured
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="the folder of runs holds no media"):
        truestep.compare(
            runs / "far.mp4", runs / "reference.mp4", media=MediaOptions([tmp_path / "empty"])
        )
