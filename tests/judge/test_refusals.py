"""What cannot judge is no reference: random, empty, constant, not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import Case, check, check_function, record, record_function
from truestep.errors import UsageError
from truestep.floors import NoiseFloor
from truestep.judge.refusals import refuse_empty_content, refuse_unsteady
from truestep.judge.rows import measured_run
from truestep.recording.format import Recording
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict

SAMPLES = [
    {"input": torch.randn(1, 16, generator=torch.Generator().manual_seed(i))} for i in (0, 1)
]


def net(*, dropout: float = 0.3) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Dropout(dropout), torch.nn.Linear(32, 16)
    )


def test_a_function_with_dropout_is_refused_and_without_it_recorded() -> None:
    with pytest.raises(UsageError, match="the trusted side differs from itself") as caught:
        record_function(net().train(), SAMPLES)
    text = str(caught.value)
    assert "where    sample/000" in text
    assert "float32 rounds by 1.5e-05 at most" in text
    assert "likely   the dropout 1 is in training mode" in text
    assert text.endswith("hint: call .eval() on it before it is recorded")
    assert check_function(net().eval(), record_function(net().eval(), SAMPLES)).verdict.passed


def test_unseeded_noise_and_state_are_refused_and_seeded_noise_recorded() -> None:
    model, calls = net().eval(), []

    def noisy(input: torch.Tensor) -> torch.Tensor:
        return model(input + 1e-3 * torch.randn_like(input))

    def counting(input: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return model(input) * len(calls)

    def seeded(input: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(input.shape, generator=torch.Generator().manual_seed(1))
        return model(input + 1e-3 * noise)

    for function in (noisy, counting):
        with pytest.raises(UsageError, match="the trusted side differs") as caught:
            record_function(function, SAMPLES)
        assert "random numbers without a seed, or keeps state" in str(caught.value)
    assert check_function(seeded, record_function(seeded, SAMPLES)).verdict is Verdict.IDENTICAL


def test_a_reference_that_was_recorded_of_a_random_function_is_never_equivalent() -> None:
    plain = record_function(net().eval(), SAMPLES, floor=False)
    names = [name for name in plain if "/output/" in name]
    pairs = {name: (plain[name].roll(1, -1), plain[name]) for name in names}
    floor = NoiseFloor(runs=(measured_run("repeat", "", "float32/float32", pairs),))
    manifest = plain.manifest.model_copy(update={"noise_floor": floor})
    random = Recording.in_memory(dict(plain), manifest)
    model = net().eval()
    for candidate in (lambda input: -model(input), lambda input: model(input) * (1 + 1e-7)):
        result = check_function(candidate, random)
        assert result.verdict is Verdict.INCONCLUSIVE
        assert "the reference cannot judge" in result.sentence
    assert check_function(model, random).verdict is Verdict.IDENTICAL
    assert check_function(lambda input: -model(input), plain).verdict is Verdict.DRIFTED


@pytest.mark.parametrize("stage", ["predict", "make_latent", "encode_text", "decode"])
def test_a_pipeline_that_draws_without_a_seed_is_refused(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any], stage: str
) -> None:
    def noise(pipe: Pipeline) -> None:
        original = getattr(pipe, stage)

        def drawn(*args: Any, **kwargs: Any) -> torch.Tensor:
            made: torch.Tensor = original(*args, **kwargs)
            return made + 1e-3 * made.std() * torch.randn_like(made)

        setattr(pipe, stage, drawn)

    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)
    with pytest.raises(UsageError, match="the trusted side differs from itself"):
        record(case, apply=noise)


def test_a_pipeline_that_gives_nothing_to_judge_is_refused(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)
    path = tmp_path / "reference.safetensors"
    record(case, path=path, floor="none")
    before = path.read_bytes()

    def spoiled(value: float) -> Any:
        def apply(pipe: Pipeline) -> None:
            original = pipe.predict
            pipe.predict = lambda *args: torch.full_like(original(*args), value)

        return apply

    for value, text in ((float("nan"), "values are not finite"), (0.0, "one value everywhere (0)")):
        with pytest.raises(UsageError, match="this cannot be a reference") as caught:
            record(case, path=path, apply=spoiled(value))
        assert text in str(caught.value)
    assert path.read_bytes() == before
    assert check(case, path).verdict is Verdict.IDENTICAL


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.full((3, 4), torch.nan), "x: 12 of 12 values are not finite"),
        (torch.tensor([1.0, torch.inf]), "x: 1 of 2 values are not finite"),
        (torch.empty(0, 3), "x: empty"),
        (torch.zeros(2, 3), "x: one value everywhere (0)"),
        (torch.ones(4, dtype=torch.float8_e4m3fn), "x: one value everywhere (1)"),
    ],
)
def test_content_that_judges_nothing(tensor: torch.Tensor, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse_empty_content({"x": tensor}, where="here")
    assert str(caught.value).startswith("this cannot be a reference: nothing could be judged by it")
    assert text in str(caught.value)
    with pytest.raises(UsageError, match="this cannot be a reference"):
        record_function(lambda x: tensor, [{"x": torch.ones(1)}])


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.arange(6.0)},
        {"x": torch.tensor(3.0)},
        {"mask": torch.ones(4, dtype=torch.bool)},
        {"x": torch.arange(6.0), "mask": torch.ones(4)},
    ],
)
def test_content_that_judges(tensors: dict[str, torch.Tensor]) -> None:
    refuse_empty_content(tensors)


def test_rounding_that_changes_from_run_to_run_is_no_reason_to_refuse() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for dtype, off, refused in (
        ("float32", 5e-6, False),
        ("float32", 5e-5, True),
        ("bfloat16", 1e-2, False),
        ("bfloat16", 1e-1, True),
    ):
        run = measured_run("repeat", "", f"{dtype}/{dtype}", {"x": (x + off * x.flip(0), x)})
        if refused:
            with pytest.raises(UsageError):
                refuse_unsteady([run])
        else:
            refuse_unsteady([run])
        refuse_unsteady([run.model_copy(update={"kind": "jitter"})])
