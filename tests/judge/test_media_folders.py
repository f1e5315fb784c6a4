"""Two folders of runs: every file is compared or listed, whichever side lacks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import truestep
from tests import media
from truestep.errors import FileFormatError, UsageError
from truestep.judge.media_files import MediaOptions
from truestep.judge.media_folders import are_runs, compare_folders, matched, runs_by_name
from truestep.verdict import Comparison, Verdict


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of four runs: equal, changed, damaged, one each alone; and a folder of frames."""
    ours, trusted = tmp_path / "ours", tmp_path / "trusted"
    for folder in (ours, trusted):
        folder.mkdir()
        media.write_frames(folder / "owl", media.moving(3))
        (folder / "notes.txt").write_text("seed 0")
    for name in ("cat", "dog", "bad"):
        media.write_mp4(trusted / f"{name}.mp4", media.moving(len(name)))
    shutil.copy(trusted / "cat.mp4", ours / "cat.mp4")
    media.write_mp4(ours / "dog.mp4", media.moving(3)[..., ::-1])
    (ours / "bad.mp4").write_bytes(b"")
    media.write_png(ours / "ours.png", media.moving()[0])
    media.write_png(trusted / "theirs.png", media.moving()[0])
    return ours, trusted


def by_name(results: list[Comparison]) -> dict[str, Verdict]:
    return {result.case_id or "": result.verdict for result in results}


def test_every_run_of_both_sides_is_told(sides: tuple[Path, Path]) -> None:
    results = compare_folders(*sides)
    assert by_name(results) == {
        "bad.mp4": Verdict.INVALID,
        "cat.mp4": Verdict.IDENTICAL,
        "dog.mp4": Verdict.DRIFTED,
        "ours.png": Verdict.MISSING,
        "owl": Verdict.IDENTICAL,
        "theirs.png": Verdict.MISSING,
    }
    told = {result.case_id: result for result in results}
    assert told["bad.mp4"].sentence.startswith("invalid: the video cannot be read: the file is emp")
    assert told["ours.png"].sentence.startswith("missing: ours.png is on the actual side only")
    assert told["ours.png"].unexpected == ("ours.png",)
    assert told["theirs.png"].missing == ("theirs.png",)
    back = {result.case_id: result for result in compare_folders(*reversed(sides))}
    assert back["ours.png"].missing == ("ours.png",)
    assert back.keys() == told.keys()


def test_which_folders_are_runs(sides: tuple[Path, Path]) -> None:
    ours, trusted = sides
    assert are_runs(ours, trusted)
    assert not are_runs(ours, trusted / "cat.mp4")
    frames = ours / "owl", trusted / "owl"
    assert not are_runs(*frames)
    assert are_runs(*frames, MediaOptions(frames=False))
    assert not are_runs(ours, trusted, MediaOptions(frames=True))
    with pytest.raises(UsageError, match="two folders of runs are several comparisons"):
        truestep.compare(ours, trusted)
    with pytest.raises(UsageError, match="is compared with another folder of runs"):
        truestep.compare(ours, trusted / "cat.mp4")


def test_names_that_differ_in_the_suffix_alone_are_one(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    media.write_gif(tmp_path / "a" / "x.gif", media.moving())
    media.write_mp4(tmp_path / "b" / "x.mp4", media.moving())
    (result,) = compare_folders(tmp_path / "a", tmp_path / "b")
    assert result.case_id == "x.gif"
    assert result.verdict is not Verdict.MISSING


NAMES = st.dictionaries(
    st.sampled_from(["a.png", "a.gif", "b.png", "b.mp4", "c/a.png", "c.wav"]),
    st.builds(Path, st.just("x")),
)


@given(NAMES, NAMES)
def test_no_name_is_lost_or_used_twice(actual: dict[str, Path], reference: dict[str, Path]) -> None:
    own = {name: Path("a") / name for name in actual}
    other = {name: Path("b") / name for name in reference}
    pairs = list(matched(own, other))
    assert sorted(a for _, a, _ in pairs if a) == sorted(own.values())
    assert sorted(r for _, _, r in pairs if r) == sorted(other.values())
    for name in own.keys() & other.keys():
        assert (name, own[name], other[name]) in pairs


def test_runs_in_folders_are_called_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    media.write_png(tmp_path / "set" / "a.png", media.moving()[0])
    media.write_frames(tmp_path / "set" / "clip", media.moving(frames=3))
    assert [*runs_by_name(tmp_path)] == ["set/a.png", "set/clip"]


def test_one_file_for_two_prompts_is_said(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for at, name in enumerate(("cat", "dog")):
        media.write_png(tmp_path / "b" / f"{name}.png", media.moving(at)[0])
        media.write_png(tmp_path / "a" / f"{name}.png", media.moving(0)[0])
    results = compare_folders(tmp_path / "a", tmp_path / "b")
    for result, other in zip(results, ("dog", "cat"), strict=True):
        assert any(
            f"its file is that of {other}.png, byte for byte" in note for note in result.notes
        )
    same = compare_folders(tmp_path / "a", tmp_path / "a")
    assert not any("prompt or seed" in note for result in same for note in result.notes)


def test_other_runs_of_folders_are_found_by_name(sides: tuple[Path, Path], tmp_path: Path) -> None:
    ours, trusted = sides
    (ours / "bad.mp4").unlink()
    for path in (ours / "ours.png", trusted / "theirs.png", trusted / "bad.mp4"):
        path.unlink()
    rerun = tmp_path / "rerun"
    shutil.copytree(trusted, rerun)
    media.write_mp4(rerun / "dog.mp4", media.noisy(media.moving(3), 3))
    results = compare_folders(ours, trusted, options=MediaOptions([rerun]))
    told = {result.case_id: result.evidence for result in results}
    dog = told["dog.mp4"]
    assert dog is not None
    assert dog.ladder is not None
    assert dog.ladder.place == "beyond reruns"
    (rerun / "dog.mp4").write_bytes(b"")
    with pytest.raises(FileFormatError, match="the video cannot be read"):
        compare_folders(ours, trusted, options=MediaOptions([rerun]))
    (rerun / "dog.mp4").unlink()
    with pytest.raises(UsageError, match="lacks one of that name") as caught:
        compare_folders(ours, trusted, options=MediaOptions([rerun]))
    assert caught.value.measured == "no dog.mp4 in it"
