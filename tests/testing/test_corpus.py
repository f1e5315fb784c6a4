"""The corpus of families: subjects are themselves, faults bite and are named, twins are quiet."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from truestep.errors import UsageError
from truestep.testing import corpus
from truestep.testing.corpus.editing import around, edit, with_function
from truestep.testing.corpus.running import free_run, is_named

FAULTS = [
    ("flux", "packed-by-channel-last"),
    ("flux", "guidance-embedding-of-one"),
    ("sdxl", "adapter-scale"),
    ("sdxl", "pooled-by-mean"),
    ("wan-i2v", "frame-mask-inverted"),
    ("wan-i2v", "image-layer"),
    ("klein-kv", "cache-not-given"),
    ("klein-kv", "condition-ids-scale"),
]
TWINS = [
    ("flux", "packed-by-unfolding"),
    ("sdxl", "plain-processors"),
    ("wan-i2v", "norms-in-double"),
    ("klein-kv", "copied"),
]


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(corpus.subjects()) >= 20
    assert len(corpus.faults()) >= 60
    assert len(corpus.twins()) >= 20
    names = set(corpus.subjects())
    for entry in (*corpus.faults().values(), *corpus.twins().values()):
        assert set(entry.subjects) <= names, entry.name
        assert entry.subjects, entry.name
        assert entry.note.endswith("."), entry.name
        assert bool(entry.at) == (entry.kind == "fault"), entry.name
    assert all(corpus.faults(name) and corpus.twins(name) for name in names)


@pytest.mark.parametrize(
    ("subject", "name"), sorted([*FAULTS, *TWINS], key=lambda entry: entry[0])
)  # a subject's after each other: its recording is made once
def test_a_fault_is_named_where_it_is_and_a_twin_passes(subject: str, name: str) -> None:
    if (subject, name) in TWINS:
        twin = corpus.twins(subject)[name]
        outcome = corpus.run(corpus.TRUESTEP, corpus.subjects()[subject], twin)
        assert (outcome.passed, outcome.right, outcome.named) == (True, True, None), outcome
        return
    entry = corpus.faults(subject)[name]
    outcome = corpus.run(corpus.TRUESTEP, corpus.subjects()[subject], entry)
    assert outcome.effect > 1e-6
    assert (outcome.passed, outcome.right, outcome.named) == (False, True, True), outcome


def test_a_model_with_some_weights_in_float32_is_judged_in_float32_too() -> None:
    subject, entry = corpus.SUBJECTS["wan-i2v"], corpus.faults()["exact-gelu"]
    first = next(subject.build(0, "bfloat16").transformer.parameters())
    assert first.dtype == torch.float32
    outcome = corpus.run("truestep", subject, entry, dtype="bfloat16")
    assert not outcome.passed, outcome
    assert "raised to float32" in outcome.sentence
    assert outcome.named


def test_a_gate_of_ones_own_is_asked_about_outputs() -> None:
    subject = corpus.subjects()["sdxl"]
    seen: list[tuple[Any, Any]] = []

    def exact(trusted: Any, candidate: Any) -> bool:
        seen.append((trusted, candidate))
        return all(torch.equal(a, b) for a, b in zip(trusted, candidate, strict=True))

    caught = corpus.run(exact, subject, corpus.faults("sdxl")["adapter-scale"])
    assert not caught.passed
    assert caught.right
    assert caught.place == ""
    quiet = corpus.run(exact, subject, corpus.twins("sdxl")["idle-hooks"])
    assert quiet.passed
    assert quiet.right
    assert quiet.effect == 0
    blind = corpus.run(lambda *_: True, subject, corpus.faults("sdxl")["adapter-scale"])
    assert blind.passed
    assert not blind.right
    trusted, candidate = seen[0]
    assert trusted[0].shape == candidate[0].shape == (1, 3, 32, 32)


def test_a_candidate_that_raises_is_caught_by_any_gate() -> None:
    @corpus.fault("sdxl", at="run.run*")
    def broken(pipe: Any) -> None:
        """Raises."""
        around(pipe.vae, "decode", lambda call, *a, **k: 1 / 0)

    outcome = corpus.run(lambda *_: True, corpus.subjects()["sdxl"], broken.entry)  # type: ignore[attr-defined]
    assert not outcome.passed
    assert math.isinf(outcome.effect)
    assert outcome.sentence == "raised ZeroDivisionError: division by zero"


def test_an_entry_is_for_its_subjects_alone() -> None:
    entry = corpus.faults()["adapter-scale"]
    with pytest.raises(UsageError) as error:
        corpus.run(corpus.TRUESTEP, corpus.subjects()["flux"], entry)
    assert error.value.what == "'adapter-scale' is not for 'flux'"
    assert error.value.measured == "it is for sdxl"


def test_every_input_of_a_subject_matters_and_draws_differ() -> None:
    subject = corpus.subjects()["sdxl"]
    first = free_run(subject.build(), subject)
    assert torch.equal(first[0], corpus.trusted_side(subject).outputs[0])
    assert not torch.equal(first[0], corpus.trusted_side(subject, 1).outputs[0])
    assert subject.inputs(0)["prompt"] != subject.inputs(1)["prompt"]


class Counter:
    """Something whose methods are edited."""

    start = 1

    def count(self, steps: int) -> int:
        """Count on."""
        return self.start + steps

    def ranked(self, steps: int) -> int:
        """Count by a helper of the module."""
        return helper(steps)

    @staticmethod
    def double(value: int) -> int:
        """Twice."""
        return value * 2


def helper(value: int) -> int:
    return value + 1


def test_an_edit_changes_one_object_and_can_be_edited_again() -> None:
    counter, other = Counter(), Counter()
    edit(counter, "count", ("self.start + steps", "self.start - steps"))
    assert (counter.count(3), other.count(3)) == (-2, 4)
    edit(counter, "count", ("self.start", "10"))
    assert counter.count(3) == 7
    assert "10 - steps" in inspect.getsource(type(counter).count)
    edit(counter, "double", ("value * 2", "value * 3"))
    assert (counter.double(2), other.double(2)) == (6, 4)
    assert type(counter).__name__ == "Counter"
    assert isinstance(counter, Counter)


def test_a_helper_is_exchanged_for_one_object() -> None:
    counter = Counter()
    with_function(counter, "ranked", "helper", lambda value: -value)
    assert (counter.ranked(3), Counter().ranked(3), helper(3)) == (-3, 4, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: edit(c, "count", ("nowhere", "")), "Counter.count does not say 'nowhere'"),
        (lambda c: edit(c, "missing", ("a", "b")), "Counter has no method missing"),
        (lambda c: with_function(c, "ranked", "gone", abs), "Counter.ranked uses no gone"),
        (lambda c: around(c, "missing", abs), "Counter has no missing"),
    ],
)
def test_what_is_not_there_cannot_be_changed(change: Any, said: str) -> None:
    with pytest.raises(corpus.NotApplicable) as error:
        change(Counter())
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("place", "model", "right"),
    [
        ("unet.forward in sample", "unet", True),
        ("transformer.forward in sample", "transformer", True),
        ("transformer.forward in sample", "unet", False),
        ("unet.forward out sample", "unet", False),
        ("vae.decode in z.0", "unet", True),
        ("vae.decode out z", "unet", False),
    ],
)
def test_a_place_is_compared_by_pattern(place: str, model: str, right: bool) -> None:
    @corpus.fault("sdxl", at=("denoiser.forward in sample", "vae.decode in z*"))
    def planted(pipe: Any) -> None:
        """Nothing."""

    assert is_named(planted.entry, place, model) is right  # type: ignore[attr-defined]
