"""What a change replaces for the whole process reaches the candidate, and never the trusted side.

Each fault is planted in a class or a library function; its twin is the same module, changed on the
candidate's own instance alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers import transformer_flux, transformer_wan

import truestep
from truestep.call_case import CallCase
from truestep.case import Case
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.replay.shared_code import taken_back
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

Change = Callable[[Any], None]
Sides = tuple[Case | CallCase, Recording]

FUNCTIONAL = torch.nn.functional


@pytest.fixture(scope="module")
def wan(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Sides:
    """Truestep's own stages."""
    case = Case(model=str(tiny_wan["wan21"]), **tiny_case)
    return case, truestep.record(case)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A plain pipeline."""
    folder = tmp_path_factory.mktemp("shared") / "flux"
    tiny.pipeline("FluxPipeline").save_pretrained(folder)
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 3}
    case = CallCase(model=str(folder), subject="diffusers", call=call)
    return case, truestep.record(case)


def louder(owner: Any, name: str) -> Change:
    """A change that has everything of a class, or a library, give 1.05 times as much."""

    def change(pipe: Any) -> None:
        was = getattr(owner, name)

        def scaled(*args: Any, **kwargs: Any) -> Any:
            return _scaled(was(*args, **kwargs))

        setattr(owner, name, scaled)

    return change


def louder_instance(path: str) -> Change:
    """The same of one module, which no other side has."""

    def change(pipe: Any) -> None:
        module = pipe.transformer.get_submodule(path)
        module.register_forward_hook(lambda module, args, output: _scaled(output))

    return change


def _scaled(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_scaled, output))
    return output * 1.05 if isinstance(output, torch.Tensor) else output


def checked(sides: Sides, change: Change, **options: Any) -> Comparison:
    return truestep.check(*sides, apply=change, **options)


def place(result: Comparison) -> str | None:
    assert result.verdict is Verdict.DRIFTED
    return result.first_divergence and result.first_divergence.fqn


MODULES, CAUSE, MEANT = {"depth": "modules"}, {"depth": "cause"}, {"meant": "auto"}
ATTENTION, BLOCK = transformer_flux.FluxAttnProcessor, transformer_flux.FluxTransformerBlock
PREPARE = """
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

def louder(pipe):
    was = FluxTransformerBlock.forward
    FluxTransformerBlock.forward = lambda *args, **kwargs: tuple(
        1.1 * each for each in was(*args, **kwargs)
    )
"""
GELU = FUNCTIONAL, "gelu"


@pytest.mark.parametrize(
    ("options", "module", "patched"),
    [
        (MODULES, "blocks.0.attn1", (transformer_wan.WanAttnProcessor, "__call__")),
        (CAUSE, "blocks.0", (transformer_wan.WanTransformerBlock, "forward")),
        (CAUSE, "condition_embedder.text_embedder.act_1", GELU),
        (MEANT, "blocks.0.attn1", (transformer_wan.WanAttnProcessor, "__call__")),
    ],
)
def test_what_is_patched_is_named_by_its_module_in_own_stages(
    wan: Sides, options: dict[str, Any], module: str, patched: tuple[Any, str]
) -> None:
    assert place(checked(wan, louder(*patched), **options)) == module


@pytest.mark.parametrize(
    ("options", "module", "patched"),
    [
        (MODULES, "transformer_blocks.0.attn", (ATTENTION, "__call__")),
        (CAUSE, "transformer_blocks.0", (BLOCK, "forward")),
        (MODULES, "transformer_blocks.0.ff.net.0", GELU),
        (MEANT, "transformer_blocks.0.attn", (ATTENTION, "__call__")),
    ],
)
def test_what_is_patched_is_named_by_its_module_in_a_plain_pipeline(
    flux: Sides, options: dict[str, Any], module: str, patched: tuple[Any, str]
) -> None:
    assert place(checked(flux, louder(*patched), **options)) == f"transformer.{module}"


def test_a_change_of_one_instance_is_named_as_ever(wan: Sides, flux: Sides) -> None:
    change = louder_instance("blocks.0.attn1")
    assert place(checked(wan, change, depth="modules")) == "blocks.0.attn1"
    change = louder_instance("transformer_blocks.0.attn")
    result = checked(flux, change, depth="modules")
    assert place(result) == "transformer.transformer_blocks.0.attn"


def test_the_cause_of_a_patched_class_is_tried_on_the_trusted_code(flux: Sides) -> None:
    change = louder(FlowMatchEulerDiscreteScheduler, "step")
    first = checked(flux, change, depth="cause").first_divergence
    assert first is not None
    assert first.cause is not None
    assert "1.05 times the reference's" in first.cause.text


@pytest.mark.parametrize("raising", [False, True])
def test_nothing_stays_replaced(flux: Sides, raising: bool) -> None:
    kept = [vars(AutoencoderKL)["decode"], FUNCTIONAL.gelu, torch.get_num_threads()]

    def change(pipe: Any) -> None:
        louder(AutoencoderKL, "decode")(pipe)
        louder(FUNCTIONAL, "gelu")(pipe)
        torch.set_num_threads(torch.get_num_threads() + 1)
        if raising:
            raise ValueError("on purpose")

    if raising:
        with pytest.raises(UsageError, match="on purpose"):
            checked(flux, change)
    else:
        assert checked(flux, change).verdict is Verdict.DRIFTED
    assert kept == [vars(AutoencoderKL)["decode"], FUNCTIONAL.gelu, torch.get_num_threads()]


def test_a_change_that_wraps_a_class_is_applied_once_to_each_of_two_checks(flux: Sides) -> None:
    change = louder(transformer_flux.FluxTransformerBlock, "forward")
    first, second = (checked(flux, change) for _ in range(2))
    assert first.sentence == second.sentence


def test_a_preparation_that_patches_a_class_prepares_each_side_once(
    flux: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prepare.py").write_text(PREPARE)
    kept = BLOCK.forward
    case = flux[0].replace(prepare="prepare.py:louder")
    sides = case, truestep.record(case)
    assert checked(sides, lambda pipe: None).verdict is Verdict.IDENTICAL
    louder_output = louder_instance("proj_out")
    assert place(checked(sides, louder_output, depth="modules")) == "transformer.proj_out"
    assert BLOCK.forward is kept


def test_a_record_leaves_nothing_replaced(wan: Sides, flux: Sides) -> None:
    kept = FUNCTIONAL.gelu
    for case, _ in (wan, flux):
        truestep.record(case, apply=louder(FUNCTIONAL, "gelu"), floor="none")
        assert FUNCTIONAL.gelu is kept


def test_a_harmless_patch_passes_and_is_no_idle_change(wan: Sides, flux: Sides) -> None:
    for sides, owner in (
        (wan, transformer_wan.WanAttnProcessor),
        (flux, transformer_flux.FluxAttnProcessor),
    ):

        def change(pipe: Any, owner: Any = owner) -> None:
            was = owner.__call__
            owner.__call__ = lambda *args, **kwargs: was(*args, **kwargs)

        result = checked(sides, change, depth="modules")
        assert result.verdict is Verdict.IDENTICAL
        assert "touched nothing" not in result.sentence


def test_what_was_replaced_is_told_by_name() -> None:
    pipe = tiny.pipeline("FluxPipeline")
    scheduler = FlowMatchEulerDiscreteScheduler
    with taken_back(pipe) as shared:
        louder(scheduler, "step")(pipe)
        scheduler.added = lambda self: None  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("medium")
    home = f"{scheduler.__module__}.{scheduler.__qualname__}"
    assert shared.names == (f"{home}.added", f"{home}.step", "torch's matmul")
    assert not hasattr(scheduler, "added")
    assert torch.get_float32_matmul_precision() == "highest"
    with shared.on():
        assert hasattr(scheduler, "added")
        assert torch.get_float32_matmul_precision() == "medium"
    assert not hasattr(scheduler, "added")


def test_a_change_of_nothing_shared_replaces_nothing() -> None:
    pipe = tiny.pipeline("FluxPipeline")
    with taken_back(pipe) as shared:
        louder_instance("transformer_blocks.0.attn")(pipe)
        pipe.transformer.fuse_qkv_projections()
        import diffusers.pipelines.sana.pipeline_sana  # noqa: F401  # modules that come are no patch
    assert shared.names == ()
