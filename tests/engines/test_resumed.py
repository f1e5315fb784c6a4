"""From Python: a record of a pipeline object that is stopped goes on with another such object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from tests.replay.test_state import step_cache
from truestep.errors import UsageError
from truestep.testing import tiny
from truestep.verdict import Verdict

CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}


class Stopped(BaseException):
    """What a kill is here."""


def until(*what: Any) -> Callable[..., None]:
    """Progress that ends the record when it is told this."""

    def progress(*told: Any) -> None:
        if told[: len(what)] == what:
            raise Stopped

    return progress


def doubled(pipe: Any) -> None:
    pipe.vae.decoder.conv_out.bias.data.mul_(2)


def test_a_pipeline_object_goes_on_where_another_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "r.safetensors"
    whole = truestep.record(tiny.pipeline("FluxPipeline"), call=CALL, path=tmp_path / "w")
    with pytest.raises(Stopped):
        truestep.record(
            tiny.pipeline("FluxPipeline"),
            call=CALL,
            path=path,
            progress=until("noise floor", 5),
        )
    for other, call, apply, differs in (
        (tiny.pipeline("FluxPipeline", seed=1), CALL, None, "weights.transformer: "),
        (tiny.pipeline("FluxPipeline"), CALL, doubled, "apply: doubled "),
        (
            tiny.pipeline("FluxPipeline"),
            {**CALL, "prompt": "a dog"},
            None,
            "argument.prompt: 'a dog', there 'a cat'",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            truestep.record(other, call=call, path=path, apply=apply, resume=True)
        assert differs in caught.value.measured
    began: list[Any] = []
    resumed = truestep.record(
        tiny.pipeline("FluxPipeline"),
        call=CALL,
        path=path,
        progress=lambda *told: began.append(told),
        resume=True,
    )
    assert "record" not in {what for what, _, _ in began}, "the trusted run was not made again"
    assert resumed.manifest.noise_floor == whole.manifest.noise_floor
    assert resumed.manifest.calls == whole.manifest.calls
    assert resumed.manifest.settings == whole.manifest.settings
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not path.with_name("r.safetensors.partial").exists()


def test_code_that_was_changed_meanwhile_does_not_get_into_the_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is known of a pipeline object shows it; what it does, does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "r.safetensors"
    progress = until("noise floor", 3)
    with pytest.raises(Stopped):
        truestep.record(tiny.pipeline("FluxPipeline"), call=CALL, path=path, progress=progress)
    other = tiny.pipeline("FluxPipeline")
    block = other.transformer.transformer_blocks[0]
    original = block.forward
    block.forward = lambda *args, **kwargs: tuple(1.001 * x for x in original(*args, **kwargs))
    with pytest.raises(UsageError, match="not of what is recorded now") as caught:
        truestep.record(other, call=CALL, path=path, resume=True)
    assert "transformer" in str(caught.value.where)
    assert (tmp_path / "r.safetensors.partial").exists(), "the one that was stopped goes on"
    recording = truestep.record(tiny.pipeline("FluxPipeline"), call=CALL, path=path, resume=True)
    assert truestep.check(other, recording, call=CALL).verdict is Verdict.DRIFTED


def test_steps_that_are_kept_are_part_of_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits they are run in a higher precision, which is finished early."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, call = tmp_path / "r.safetensors", {**CALL, "num_inference_steps": 7}

    def pipe() -> Any:
        return tiny.pipeline("FluxPipeline", dtype="bfloat16")

    with pytest.raises(Stopped):
        truestep.record(pipe(), call=call, path=path, progress=until("noise floor", 1))
    with pytest.raises(UsageError) as caught:
        truestep.record(pipe(), call=call, path=path, keep=(1,), resume=True)
    assert caught.value.measured == "keep: 1, there (absent)"


@pytest.mark.parametrize(
    ("dtype", "stops", "cached"),
    [("float32", "batch", True), ("bfloat16", "instructions", False)],
)
def test_a_case_of_the_runtime_goes_on(
    tiny_wan: dict[str, Path],
    tiny_case: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    stops: str,
    cached: bool,
) -> None:
    """Also one that keeps state from step to step, which is found out by its first benign run."""
    steps = 10 if cached else 2
    case = truestep.Case(
        model=str(tiny_wan["wan21"]), **{**tiny_case, "dtype": dtype, "steps": steps}
    )
    options: dict[str, Any] = {"apply": step_cache if cached else None}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    whole = truestep.record(case, path=tmp_path / "whole", **options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    told = until(f"noise floor: {stops}")
    with pytest.raises(Stopped):
        truestep.record(case, path=tmp_path / "r", progress=told, **options)
    journal = (tmp_path / "r.partial" / "journal").read_text()
    assert ('"steps in order"' in journal) is cached
    names: list[str] = []
    resumed = truestep.record(
        case,
        path=tmp_path / "r",
        progress=lambda *told: names.append(told[0]),
        resume=True,
        **options,
    )
    assert "record" not in names
    one, other = whole.manifest, resumed.manifest
    assert other.noise_floor == one.noise_floor
    assert other.model_copy(update={"created": "", "timings_s": {}}) == one.model_copy(
        update={"created": "", "timings_s": {}}
    )
    assert [*resumed] == [*whole]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_there_is_nothing_to_resume_in_memory() -> None:
    with pytest.raises(UsageError, match="without a path keeps nothing"):
        truestep.record(tiny.pipeline("FluxPipeline"), call=CALL, resume=True)
