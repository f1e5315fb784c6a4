"""A record that is killed goes on from its last finished benign run, and gives what it would have.

Real processes are killed by SIGKILL, inside a forward of the model. A change that is applied to the
pipeline counts forwards in a file and kills its process at one of a number.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.commands import command
from truestep.recording.format import Recording
from truestep.recording.partial import beside
from truestep.testing import tiny

CHANGE = """
import os, signal

def counted(pipe):
    def count(module, arguments):
        with open(os.environ["COUNT"], "ab") as file:
            file.write(b".")
        if os.path.getsize(os.environ["COUNT"]) == int(os.environ["DIES_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
    pipe.transformer.register_forward_pre_hook(count)
"""

SIZE = ("--set", "height=32", "--set", "width=32", "--set", "num_inference_steps=2")
FLUX = ("flux", "--prompt", "a cat", *SIZE, "--set", "device=cpu")
NARROW = (*FLUX, "--set", "dtype=bfloat16")
DIGITS = ("builtin:digits", "--prompt", "a red three", "--set", "steps=2", "--set", "device=cpu")


@dataclass
class Told:
    """How a command ended, and the forwards that it made."""

    code: int
    out: str
    err: str
    forwards: int


@dataclass
class Recorder:
    """`truestep record` of one case in a folder of its own, which may be killed."""

    folder: Path
    patch: pytest.MonkeyPatch
    words: tuple[str, ...] = FLUX
    options: tuple[str, ...] = ("--output", "r.safetensors", "--apply", "change.py:counted")

    def __call__(self, *options: str, dies_at: int = 0, cache: str = "cache") -> Told:
        count = self.folder / "count"
        count.write_bytes(b"")
        self.patch.setenv("COUNT", str(count))
        self.patch.setenv("DIES_AT", str(dies_at))
        self.patch.setenv("XDG_CACHE_HOME", str(self.folder / cache))
        words = (*self.words, *self.options, *options)
        done = command("record", *words, cwd=self.folder)
        return Told(done.returncode, done.stdout, done.stderr, count.stat().st_size)

    @property
    def left(self) -> Path:
        return self.folder / "r.safetensors.partial"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny.save("FluxPipeline", folder / "flux")
    return folder / "flux"


@pytest.fixture
def recorder(tmp_path: Path, flux: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    shutil.copytree(flux, tmp_path / "flux")
    (tmp_path / "change.py").write_text(CHANGE)
    return Recorder(tmp_path, monkeypatch)


def differing(actual: Path, reference: Path) -> list[str]:
    """Fields of two recordings that differ, but for when they were made and how long that took."""
    one, other = Recording.open(actual), Recording.open(reference)
    times = {"created": "", "timings_s": {}}
    mine, its = (each.manifest.model_copy(update=times) for each in (one, other))
    # As text: NaN is not itself.
    found = [k for k in type(mine).model_fields if repr(getattr(mine, k)) != repr(getattr(its, k))]
    same = list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
    return found if same else [*found, "tensors"]


def resumed_at(told: Told) -> int:
    """How many benign runs a command went on from."""
    found = re.search(r"goes on (?:after its trusted run|from its (\d+) of \d+ benign)", told.err)
    assert found, told
    return int(found[1] or 0)


@pytest.mark.parametrize(
    "words",
    [
        FLUX,
        pytest.param(NARROW, marks=pytest.mark.slow),
        pytest.param(DIGITS, marks=pytest.mark.slow),
    ],
    ids=["flux", "bfloat16", "runtime"],
)
def test_what_is_killed_goes_on_and_gives_the_same(
    recorder: Recorder, words: tuple[str, ...]
) -> None:
    """Killed in the trusted run, in the first benign runs, and late; each time gone on with."""
    recorder.words, folder = words, recorder.folder
    whole = recorder(cache="one")
    assert whole.code == 0, whole
    shutil.move(folder / "r.safetensors", folder / "whole.safetensors")
    assert "stopped" not in whole.err

    assert recorder("--resume", dies_at=2, cache="two").code == 1
    assert not (recorder.left / "journal").exists()
    first = recorder("--resume", dies_at=whole.forwards // 3, cache="two")
    assert "nothing was finished at r.safetensors.partial: recorded from the beginning" in first.err
    kept = (recorder.left / "journal").read_bytes()
    again = recorder("--resume", dies_at=whole.forwards // 3, cache="two")
    assert (recorder.left / "journal").read_bytes().startswith(kept)
    last = recorder("--resume", cache="two")
    assert last.code == 0, last
    assert [0 < told.forwards < whole.forwards for told in (first, again, last)] == [True] * 3
    assert 0 <= resumed_at(again) < resumed_at(last)
    made = len(Recording.open(folder / "r.safetensors").manifest.noise_floor.runs)  # type: ignore[union-attr]
    assert f" of {made} benign runs" in last.err
    assert differing(folder / "r.safetensors", folder / "whole.safetensors") == []
    assert sorted(path.name for path in folder.glob("r.*")) == ["r.safetensors"]


def test_what_is_left_is_named_and_is_taken_for_nothing_else(recorder: Recorder) -> None:
    folder, journal = recorder.folder, recorder.left / "journal"
    told = recorder(dies_at=12)
    assert told.code == 1
    assert re.search(r"kept: .*r\.safetensors\.partial/ \(2 files\)", told.err)
    assert re.search(r"hint: truestep record flux .* --resume$", told.err, re.MULTILINE)
    kept = journal.read_bytes()

    told = recorder(dies_at=2)  # whoever sees the line and stops it has lost nothing
    assert re.search(
        r"^a record that was stopped is at r\.safetensors\.partial: --resume goes on from its "
        r"\d+ of \d+ benign runs$",
        told.err,
        re.MULTILINE,
    )
    assert journal.read_bytes() == kept

    weights = next((folder / "flux" / "transformer").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "change.py").write_text(CHANGE + "# changed\n")
    for options, differs in (
        (("--resume",), ("weights.transformer: ", "model.weights: ", "apply: counted ")),
        (
            ("--resume", "--floor", "final", "--set", "num_inference_steps=3"),
            ("floor: final, there steps", "case.call.num_inference_steps: 3, there 2"),
        ),
    ):
        told = recorder(*options)
        assert (told.code, told.forwards) == (2, 0), told
        assert "the record that was stopped is not of what is recorded now" in told.err
        assert all(text in told.err for text in differs), told.err
        assert re.search(r"hint: truestep record .*--resume.* --no-resume  # records", told.err)
        assert journal.read_bytes() == kept
    weights.write_bytes(content)
    (folder / "change.py").write_text(CHANGE)

    run = next(recorder.left.glob("run.*"))
    content = run.read_bytes()
    run.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = recorder("--resume", dies_at=1)
    assert told.forwards == 1, "the trusted run is made again"
    assert f"r.safetensors.partial/{run.name} is damaged: recorded from the beginning" in told.err
    run.write_bytes(content)

    (folder / "r.safetensors").unlink(missing_ok=True)
    with beside(folder / "r.safetensors", resume=False):
        told = recorder("--resume")
    assert (told.code, told.forwards) == (2, 0)
    assert "another process records this now" in told.err
    assert journal.read_bytes() == kept
