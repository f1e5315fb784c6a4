"""The fault corpus: complete, documented, and every entry can be applied."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.faults import registry
from bench.faults.draws import DRAWS
from bench.faults.registry import BENIGN, FAMILIES, FAULTS, Fault, NotApplicable
from bench.faults.subjects import subjects
from truestep.case import Case
from truestep.cli.common import load_change
from truestep.keys import STAGES
from truestep.runtime.applying import apply_change
from truestep.runtime.loading import load
from truestep.runtime.pipeline import generate

FOLDER = Path(registry.__file__).parent
ENTRIES = [*FAULTS.values(), *BENIGN.values()]
CASE = Case(
    model="builtin:digits",
    prompt="a red three moving left",
    steps=3,
    num_frames=3,
    settings={"device": "cpu"},
)

# One expert; an encoder without dropout.
NOT_ON_DIGITS = {
    "encoder-in-train-mode",
    "expert-boundary-by-index",
    "expert-boundary-moved",
    "experts-exchanged",
    "second-scale-ignored",
}

# Two clips, an image, equal widths (LTX-2.0); one expert; no convolution, no dropout.
NOT_ON_LTX2 = {
    "std-scope-changed": "one clip",
    "token-sigma-lost": "no image",
    "token-sigma-lost-in-x0": "no image",
    "cross-sigma-of-tokens": "one sigma",
    "contexts-swapped": "different widths",
    "encoder-in-train-mode": "no dropout",
    "expert-boundary-by-index": "one expert",
    "expert-boundary-moved": "one expert",
    "experts-exchanged": "one expert",
    "input-kernel-transposed": "no convolution",
}

# A few of each kind: stage, weights, hook, replaced forward, state.
RUN = (
    "text-cut-short",
    "guidance-hundredth-more",
    "timestep-truncated",
    "gelu-exact",
    "shift-scale-swapped",
    "softmax-in-bfloat16",
    "weight-scaled",
    "batch-neighbour-leaks",
    "attention-written-out",
    "guidance-batched",
    "linears-transposed",
    "text-padding-collapsed",
)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The digits pipeline; entries are given copies of it."""
    return load(CASE)


@pytest.fixture(scope="module")
def expected(plain: Any) -> torch.Tensor:
    return generate(copy.deepcopy(plain))


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 40
    assert len(BENIGN) >= 15
    assert {entry.family for entry in ENTRIES} == set(FAMILIES)


def test_no_name_hides_another() -> None:
    written = sum(
        len(re.findall(r"^@(?:fault|benign)\(", _code(family), re.MULTILINE)) for family in FAMILIES
    )
    assert written == len(ENTRIES) == len({entry.name for entry in ENTRIES})


def _code(family: str) -> str:
    return (FOLDER / f"{family}.py").read_text("utf-8")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_documented(entry: Fault) -> None:
    assert entry.acts
    assert entry.note.endswith(".")
    assert entry.subjects
    assert entry.subjects <= {"wan", "ltx2", "module"}
    if entry.family == "benign":
        assert entry.source
    else:
        assert entry.note.startswith("Bug: ")
        assert not entry.bits
        assert entry.source == "constructed" or entry.source.startswith("https://github.com/")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_applies(entry: Fault, plain: Any) -> None:
    pipe = copy.deepcopy(plain)
    if entry.name in NOT_ON_DIGITS or entry.subjects == {"ltx2"}:
        with pytest.raises(NotApplicable):
            entry.apply(pipe)
        return
    entry.apply(pipe)


@pytest.fixture(scope="module")
def joint() -> Any:
    """A tiny pipeline of video and sound; entries are given copies of it."""
    subject, draw = subjects(("tiny-ltx2",))[0], DRAWS[0]
    return subject.load(draw, "float32")


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if "ltx2" in e.subjects], ids=lambda entry: entry.name
)
def test_every_entry_applies_to_video_and_sound(entry: Fault, joint: Any) -> None:
    pipe = copy.deepcopy(joint)
    if entry.name in NOT_ON_LTX2:
        with pytest.raises(NotApplicable, match=NOT_ON_LTX2[entry.name]):
            entry.apply(pipe)
        return
    entry.apply(pipe)


@pytest.mark.parametrize(
    "name",
    [
        *("uncond-text-zeroed", "uncond-one-step-late", "guidance-in-bfloat16", "noise-scaled"),
        *(
            "block-repeated",
            "block-output-in-bfloat16",
            "text-cache-without-key",
            "rope-in-bfloat16",
        ),
        *(
            "batch-neighbour-leaks",
            "step-cache-left-on",
            "step-index-stale",
            "latent-changed-in-place",
        ),
        *("batch-row-one", "text-in-batch", "inputs-strided", "outputs-copied", "keys-reversed"),
    ],
)
def test_entries_of_any_pipeline_run_on_video_and_sound(name: str, joint: Any) -> None:
    entry = FAULTS.get(name) or BENIGN[name]
    expected = generate(copy.deepcopy(joint))
    made = generate(apply_change(copy.deepcopy(joint), entry.apply))
    apart = [float((a - r).norm() / r.norm()) for a, r in zip(made, expected, strict=True)]
    assert max(apart) < 1e-4 if entry.family == "benign" else max(apart) > 1e-5


def test_faults_of_video_and_sound_say_where_they_must_be_seen() -> None:
    own = [entry for entry in FAULTS.values() if entry.family == "joint"]
    assert len(own) >= 8
    for entry in own:
        assert entry.stage in STAGES
        assert entry.modality in (None, "audio", "video")
        assert entry.branch in (None, "cond", "uncond", "perturbed", "modality")
    assert sum(entry.modality is not None for entry in own) >= 16


@pytest.mark.parametrize("name", RUN)
def test_faults_change_the_latent_and_twins_do_not(
    name: str, plain: Any, expected: torch.Tensor
) -> None:
    pipe = copy.deepcopy(plain)
    entry = FAULTS.get(name) or BENIGN[name]
    latent = generate(apply_change(pipe, entry.apply))
    relative = float((latent - expected).norm() / expected.norm())
    assert relative < 1e-5 if entry.family == "benign" else relative > 1e-5


def test_the_command_line_finds_an_entry(plain: Any) -> None:
    change = load_change(f"{FOLDER / 'transformer.py'}:gelu_exact")
    assert change is not None
    assert change.entry.family == "transformer"  # type: ignore[attr-defined]
    pipe = copy.deepcopy(plain)
    apply_change(pipe, change)
    assert pipe.transformer.blocks[0].ffn.net[0].approximate == "none"


def test_the_readme_shows_the_registry() -> None:
    text = registry.README.read_text("utf-8")
    assert registry.updated(text) == text, "run python -m bench.faults.registry"
