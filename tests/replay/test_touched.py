"""A change that touched nothing is said to have touched nothing; every kind of touch is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.recording.format import Recording
from truestep.replay.check import check
from truestep.replay.record import record
from truestep.replay.touched import snapshot, touched
from truestep.report.terminal import lines
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def reference(case: Case) -> Recording:
    return record(case)


def adapter_that_fits_nothing(pipe: Pipeline) -> None:
    """A LoRA of another family: none of its names is among the weights."""
    weights = dict(pipe.transformer.named_parameters())
    lora = {"transformer.single_blocks.0.attn.to_q": torch.ones(2, 2)}
    for name, update in lora.items():
        if f"{name}.weight" in weights:
            weights[f"{name}.weight"].data += update


def test_a_change_that_touched_nothing_says_so_in_its_first_line(
    case: Case, reference: Recording
) -> None:
    result = check(case, reference, apply=adapter_that_fits_nothing)
    assert result.verdict is Verdict.IDENTICAL
    assert "touched nothing" in next(iter(lines(result)))
    assert result.sentence.endswith(
        "the change touched nothing: no weight, buffer, class, hook, configuration or setting "
        "differs"
    )


def test_a_setting_that_has_its_value_already_touches_nothing(
    case: Case, reference: Recording
) -> None:
    result = check(case, reference, settings={"guidance_scale": case.guidance_scale})
    assert "touched nothing" in result.sentence


def test_a_check_without_a_change_says_nothing_of_one(case: Case, reference: Recording) -> None:
    assert "touched" not in str(check(case, reference))


def test_a_change_that_acts_without_effect_is_not_called_idle(
    case: Case, reference: Recording
) -> None:
    result = check(case, reference, settings={"text_cache": True})
    assert result.verdict is Verdict.IDENTICAL
    assert "touched" not in result.sentence


def test_expecting_a_difference_is_unmet_where_there_is_none(
    case: Case, reference: Recording
) -> None:
    result = check(case, reference, apply=adapter_that_fits_nothing, expect="different")
    assert result.verdict is Verdict.UNMET
    assert result.exit_code == 1
    assert result.sentence.startswith("unmet: expected different, but identical: ")
    met = check(case, reference, settings={"guidance_scale": 3.0}, expect="different")
    assert met.verdict is Verdict.DRIFTED
    assert met.exit_code == 0
    assert met.sentence.endswith("; as expected")
    broken = check(case, reference, apply=_nan_bias, expect="different")
    assert broken.verdict is Verdict.INVALID
    assert broken.exit_code == 1


def _nan_bias(pipe: Pipeline) -> None:
    pipe.transformer.blocks[0].attn1.to_q.bias.data[0] = float("nan")


def _weight(pipe: Pipeline) -> None:
    pipe.transformer.blocks[0].attn1.to_q.weight.data[0, 0] += 1e-7


def _buffer(pipe: Pipeline) -> None:
    pipe.transformer.rope.freqs_cos.data[0, 0] = 0.5


def _class(pipe: Pipeline) -> None:
    block = pipe.transformer.blocks[0]
    block.__class__ = type("Other", (type(block),), {})


def _hook(pipe: Pipeline) -> None:
    pipe.vae.register_forward_hook(lambda *_: None)


def _forward(pipe: Pipeline) -> None:
    original = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda *args, **kwargs: original(*args, **kwargs)


def _flag(pipe: Pipeline) -> None:
    pipe.transformer.blocks[0].attn1.heads += 0
    pipe.transformer.blocks[0].is_odd = True


def _config(pipe: Pipeline) -> None:
    pipe.scheduler.register_to_config(flow_shift=2.5)


def _setting(pipe: Pipeline) -> None:
    pipe.settings.guidance_scale += 0.5


def _stage(pipe: Pipeline) -> None:
    original = pipe.combine
    pipe.combine = lambda *args: original(*args)


def _tokenizer(pipe: Pipeline) -> None:
    pipe.tokenizer.padding_side = "left"


def _cache(pipe: Pipeline) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.01))


@pytest.mark.parametrize(
    "change",
    [
        _weight,
        _buffer,
        _class,
        _hook,
        _forward,
        _flag,
        _config,
        _setting,
        _stage,
        _tokenizer,
        _cache,
    ],
)
def test_every_kind_of_touch_is_seen(change: Callable[[Pipeline], None], case: Case) -> None:
    pipe = load(case)
    before = snapshot(pipe)
    assert touched(before, snapshot(pipe)) == ()
    change(pipe)
    assert touched(before, snapshot(pipe)) != ()


def test_a_run_of_its_own_is_no_touch(case: Case) -> None:
    from truestep.runtime.pipeline import generate

    pipe = load(case)
    generate(pipe)
    before = snapshot(pipe)
    generate(pipe)
    assert touched(before, snapshot(pipe)) == ()
