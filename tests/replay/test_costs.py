"""What a check and a recording cost, counted: forwards, look-ups, calls. No clock is looked at."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.counting import calls_inside
from truestep.case import Case
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline

Loaded = tuple[Case, Pipeline, Recording]


def recorded(steps: int, folder: Path, values: Mapping[str, Any], root: Path) -> Loaded:
    case = Case(model=str(folder), **{**values, "steps": steps})
    pipe = load(case)
    path = root / f"{steps}.safetensors"
    record_pipeline(pipe, case=case, floor="none").save(path)
    return case, pipe, Recording.open(path)


@pytest.fixture(scope="module")
def by_steps(
    tiny_wan: dict[str, Path],
    tiny_case: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, Loaded]:
    root = tmp_path_factory.mktemp("costs")
    return {steps: recorded(steps, tiny_wan["wan21"], tiny_case, root) for steps in (25, 50)}


def test_a_check_runs_twelve_forwards_whatever_the_steps(by_steps: dict[int, Loaded]) -> None:
    for case, pipe, recording in by_steps.values():
        cost = check_pipeline(pipe, recording, case=case).cost
        assert cost is not None
        assert cost.forwards == 5 * 2 + 2  # five steps, two passes; two steps once more


def test_a_check_decodes_once_and_encodes_each_text_twice(by_steps: dict[int, Loaded]) -> None:
    case, pipe, recording = by_steps[25]
    counted: Counter[str] = Counter()
    for part, method in (("vae", "decode"), ("text_encoder", "forward")):
        model = getattr(pipe, part)
        original = getattr(model, method)

        def counting(*args: Any, _part: str = part, _run: Any = original, **more: Any) -> Any:
            counted[_part] += 1
            return _run(*args, **more)

        setattr(model, method, counting)
    try:
        check_pipeline(pipe, recording, case=case)
    finally:
        for part, method in (("vae", "decode"), ("text_encoder", "forward")):
            delattr(getattr(pipe, part), method)
    assert counted == {"vae": 1, "text_encoder": 4}


def test_what_a_step_adds_to_a_check_is_bounded(by_steps: dict[int, Loaded]) -> None:
    """A search for similar names, or a comparison that is quadratic, would be thousands."""
    counts = {}
    for steps, (case, pipe, recording) in by_steps.items():

        def run(case: Case = case, pipe: Pipeline = pipe, own: Recording = recording) -> None:
            check_pipeline(pipe, own, case=case)

        run()
        counts[steps] = calls_inside(run, "truestep")
    each = (counts[50] - counts[25]) / 25
    assert each < 400, counts


def test_names_are_looked_up_a_bounded_number_of_times_a_step(
    by_steps: dict[int, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[int] = Counter()
    original = Recording.__getitem__
    for steps, (case, pipe, recording) in by_steps.items():

        def counting(self: Recording, name: str, _steps: int = steps) -> torch.Tensor:
            counts[_steps] += 1
            return original(self, name)

        monkeypatch.setattr(Recording, "__getitem__", counting)
        check_pipeline(pipe, recording, case=case)
    assert (counts[50] - counts[25]) / 25 < 30, counts


def test_a_check_never_searches_for_similar_names(
    by_steps: dict[int, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    import difflib

    def refuse(*_: object, **__: object) -> Iterator[str]:
        raise AssertionError("a check searched for similar names")

    monkeypatch.setattr(difflib, "get_close_matches", refuse)
    case, pipe, recording = by_steps[25]
    check_pipeline(pipe, recording, case=case)


def test_a_recording_costs_its_generation_and_so_many_forwards(
    tiny_wan: dict[str, Path],
    tiny_case: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In forwards of one sample; wider ones count twice. 50 steps run 100 by themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": 50})
    pipe = load(case)
    forwards: Counter[str] = Counter()

    def count(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        latent = kwargs["hidden_states"]
        wide = 2 if latent.dtype is torch.float64 else 1
        forwards["all"] += latent.shape[0] * wide

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    decodes: Counter[str] = Counter()
    decode = pipe.vae.decode

    def decoding(*args: Any, **kwargs: Any) -> Any:
        decodes["all"] += 1
        return decode(*args, **kwargs)

    pipe.vae.decode = decoding
    record_pipeline(pipe, case=case)
    first = forwards["all"] - 100
    decodes.clear()
    record_pipeline(pipe, case=case)
    again = forwards["all"] - first - 200
    counts = {1, min(2, os.cpu_count() or 1), os.cpu_count() or 1}
    more = 2 * len(counts - {torch.get_num_threads()})  # other numbers of threads
    assert first <= 32 + more
    assert again <= 28 + more  # what other instructions give is kept
    assert decodes["all"] == 3  # the run; in higher precision, in a batch
