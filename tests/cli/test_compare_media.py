"""`truestep compare` of finished media: what is printed, written and returned."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest

from tests import media
from tests.commands import Run, runner

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "results-1.json"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The verb in a folder with a trusted clip, one of another encoder, and a shifted one."""
    monkeypatch.chdir(tmp_path)
    clip = media.moving()
    media.write_mp4(Path("trusted.mp4"), clip)
    media.write_mp4(Path("again.mp4"), clip, crf=28)
    media.write_mp4(Path("shifted.mp4"), media.PLANTED["shift"][2](clip))
    return runner(monkeypatch, capsys, "compare")


def test_a_difference_of_pictures_alone_is_inconclusive(run: Run) -> None:
    code, out, err = run("again.mp4", "trusted.mp4")
    lines = out.splitlines()
    assert code == 4
    assert err == ""
    assert lines[0].startswith("UNDECIDED 12 of 12 frames differ: PSNR ")
    said, _, rest = out.partition("\n  of ")
    assert said.replace("\n ", "").endswith(
        "; media cannot tell a harmless change from a fault, nor where it was made"
    )
    assert "\n  media        12 frames of 64x48, 8 a second, h264 yuv420p" in rest
    assert "\n  not looked at latents, stages and modules, which media do not hold" in rest
    assert "equivalent:" not in out
    hint = next(line for line in lines if line.startswith("hint: "))
    assert "--same-seed-of, --other-seeds" in hint


def test_a_shifted_clip_is_said_in_the_first_line(run: Run) -> None:
    code, out, _ = run("shifted.mp4", "trusted.mp4")
    assert code == 1
    assert out.startswith("FAILED drifted: its frames are the reference's 1 frame later")
    assert "  finding      its frames are the reference's 1 frame later" in out


def test_the_same_file_passes(run: Run) -> None:
    shutil.copy("trusted.mp4", "copy.mp4")
    code, out, _ = run("copy.mp4", "trusted.mp4")
    assert code == 0
    assert out.startswith("PASSED identical: 12 frames agree bit for bit")
    assert "  frames       bit for bit the same" in out
    assert "is one a copy?" in out


def test_sounds_are_told_in_a_line(run: Run) -> None:
    media.write_wav(Path("a.wav"), media.tones())
    media.write_wav(Path("b.wav"), -media.tones())
    code, out, _ = run("b.wav", "a.wav", "--report", "report.html")
    assert code == 1
    assert "  sound        correlation -1, level " in out
    assert "  finding      its polarity is turned: it is the reference times -1" in out
    assert "data:audio/wav" in Path("report.html").read_text()
    media.write_wav(Path("c.wav"), media.tones()[:, :-99])
    code, out, _ = run("c.wav", "a.wav")
    assert code == 3
    assert "  sound        correlation 1, level +0 dB, spectrum 0 dB" in out
    assert "its sound has 15,901 samples, the reference's 16,000" in out.splitlines()[0]


def test_other_runs_are_listed_by_their_distance(run: Run) -> None:
    for name in ("reruns", "seeds"):
        Path(name).mkdir()
    for at in range(2):
        clip = media.noisy(media.moving(), 2, at)
        media.write_mp4(Path(f"reruns/{at}.mp4"), clip)
        media.write_mp4(Path(f"seeds/{at}.mp4"), media.moving(9 + at))
    words = ("again.mp4", "trusted.mp4", "--same-seed-of", "reruns", "--other-seeds", "seeds")
    code, out, _ = run(*words, "-v")
    assert code == 4
    assert " levels  same seed  reruns/0.mp4" in out
    assert " levels  other seed seeds/1.mp4" in out
    assert "(2 reruns up to " in " ".join(out.split())
    assert ", 2 other seeds from " in " ".join(out.split())


def test_json_is_that_of_its_schema_and_a_report_is_written(run: Run) -> None:
    code, out, _ = run("shifted.mp4", "trusted.mp4", "--json", "--report", "report.html")
    assert code == 1
    result = json.loads(out)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    evidence = result["comparisons"][0]["evidence"]
    assert evidence["level"] == "media"
    assert [finding["kind"] for finding in evidence["findings"]] == ["frame shift"]
    assert len(evidence["scores"]) == 12
    page = Path("report.html").read_text()
    assert "What the media show" in page
    assert "its frames are the reference" in page
    assert "PSNR of every frame" in page
    assert len(re.findall(r"<figure[ >]", page)) == 9


def test_two_folders_list_all_and_return_the_worst(run: Run) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy("trusted.mp4", f"{folder}/same.mp4")
    shutil.copy("again.mp4", "a/clip.mp4")
    shutil.copy("trusted.mp4", "b/clip.mp4")
    assert run("a", "b")[0] == 4
    Path("a/only.mp4").write_bytes(Path("trusted.mp4").read_bytes())
    code, out, _ = run("a", "b")
    assert code == 3
    assert "\nMISSING only.mp4 [a/only.mp4]: " in out
    assert out.startswith("3 cases: 1 inconclusive, 1 missing, 1 identical\n")
    _, out, _ = run("a", "b", "-v")
    assert "  note         only.mp4 is on the actual side only (a)" in out
    Path("b/only.mp4").write_bytes(b"\0")
    code, out, _ = run("a", "b", "--report", "report.html")
    assert code == 1
    assert "\nFAILED only.mp4 [a/only.mp4]: invalid: " in out
    assert "the video cannot be read" in Path("report.html").read_text()


def test_frames_and_runs_are_told_apart_by_an_option(run: Run) -> None:
    media.write_frames(Path("a"), media.moving())
    media.write_frames(Path("b"), media.PLANTED["shift"][2](media.moving()))
    code, out, _ = run("b", "a")
    assert code == 1
    assert "its frames are the reference's 1 frame later" in out
    code, out, _ = run("b", "a", "--runs")
    assert code == 4
    assert out.startswith("12 cases: ")
    assert "11 inconclusive" in out.splitlines()[0]
    assert len(out.splitlines()) <= 12
    for name, at in (("cat", 0), ("dog", 1)):
        for folder in ("c", "d"):
            Path(folder).mkdir(exist_ok=True)
            media.write_png(Path(folder) / f"{name}.png", media.moving()[at])
    assert "2 cases: 2 identical" in run("c", "d")[1]
    assert "identical: 2 frames agree bit for bit" in run("c", "d", "--frames")[1]


def test_what_cannot_be_decoded_is_an_error_of_two_lines(run: Run) -> None:
    Path("bad.mp4").write_text("no video")
    code, out, err = run("bad.mp4", "trusted.mp4")
    assert code == 2
    assert out == ""
    assert err.splitlines()[0].endswith("the video cannot be read")
    assert "it is a text file" in err


def test_options_of_media_are_refused_for_tensors(run: Run) -> None:
    import numpy as np

    np.save("a.npy", np.zeros(3))
    code, _, err = run("a.npy", "a.npy", "--other-seeds", "trusted.mp4")
    assert code == 2
    assert "are for pictures, videos and sounds" in err
    code, _, err = run("again.mp4", "trusted.mp4", "--tolerance", "0.1")
    assert code == 2
    assert "media are judged without a tolerance" in err


def test_names_of_files_cannot_act_on_a_terminal(run: Run) -> None:
    name = "a\x1b[31m\nPASSED.mp4"
    shutil.copy("again.mp4", name)
    _, out, _ = run(name, "trusted.mp4")
    assert "\x1b" not in out
    assert not any(line.startswith("PASSED") for line in out.splitlines())


def test_the_perceptual_metric_says_how_to_install_it(run: Run) -> None:
    pytest.importorskip("av")
    try:
        import pycvvdp  # noqa: F401
    except Exception:
        code, _, err = run("again.mp4", "trusted.mp4", "--perceptual")
        assert code == 2
        assert "pip install 'truestep[perceptual]'" in err or "cannot be loaded" in err
    else:
        code, out, _ = run("again.mp4", "trusted.mp4", "--perceptual")
        assert code == 4
        assert "JOD by ColorVideoVDP" in out
