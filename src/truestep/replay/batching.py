"""Batch invariance: does a sample come out the same whoever is beside it in the batch?

Every module of one batched forward is given, row by row, what it was given when each sample ran
alone, so that a module which is not invariant does not blame the ones after it. Kernels may choose
another order of summation for another batch: that is rounding, and the first module to show it is
named all the same. A module that mixes samples is a bug, and far beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from truestep.case import Case
from truestep.errors import UsageError, surviving
from truestep.joint import each, made_of, tensors_of
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.keys import key_of
from truestep.replay.isolation import Flow, flow
from truestep.runtime.applying import Apply, apply_change
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Observer, encode
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Divergence, Row, Side, Verdict

Tensor = torch.Tensor


@taking_turns()
@surviving("the model")
def batch_invariance(
    model: torch.nn.Module,
    *args: Any,
    call: Callable[..., Any] | None = None,
    step: int = 0,
    branch: str = "main",
    **kwargs: Any,
) -> Comparison:
    """Find the first module whose rows differ between a batch and single samples.

    Args:
        model: What is run; only its modules are looked at.
        args, kwargs: One call with a batch of 2 or more. Tensors whose first axis is as long as
            that of the first tensor are taken apart by row; everything else is passed as it is.
        call: Runs the model on `args` and `kwargs`, where that is not `model(...)` itself.
        step, branch: Where the call belongs, for the names.

    Returns:
        One row a tensor that a module received or returned. `identical`: invariant bit for bit.
        `equivalent`: rounding only. `drifted`: samples are mixed. `first_divergence` is the first
        module whose own rows are not bit-equal, whatever the verdict.

    Raises:
        UsageError: There is no tensor with two rows or more.
    """
    run = call or model
    size = next((len(t) for t in (*args, *kwargs.values()) if _batched(t)), 0)
    if size < 2:
        raise UsageError(
            "batch invariance needs a batch of 2 or more",
            measured=f"the first tensor argument has {size} rows"
            if size
            else "no tensor arguments",
        )

    def row(value: Any, index: int) -> Any:
        return value[index : index + 1] if _batched(value) and len(value) == size else value

    def alone(index: int) -> Callable[[], Any]:
        own = [row(value, index) for value in args]
        named = {key: row(value, index) for key, value in kwargs.items()}
        return lambda: run(*own, **named)

    singles = [flow(model, alone(index), place=(step, branch)) for index in range(size)]
    expected = _stacked(singles)
    found = flow(model, lambda: run(*args, **kwargs), place=(step, branch), given=expected)
    rows = compare_tensors(_comparable(found.tensors, expected.tensors), expected.tensors)
    result = build_comparison(
        rows,
        actual=Side(label=f"in a batch of {size}"),
        reference=Side(label="one by one"),
        looked_at=(f"{len({r.fqn for r in rows})} modules on the inputs of single samples",),
    )
    return _named(result, model)


@taking_turns()
@surviving("the model")
def case_batch_invariance(case: Case, *, apply: Apply | None = None) -> Comparison:
    """Batch invariance of a case's first prediction: prompt and negative prompt in one batch.

    Raises:
        CaseError, ModelLoadError, UsageError: See `truestep.record`.
    """
    pipe = apply_change(load(case), apply)
    with torch.no_grad():
        pipe.prepare(pipe)
        text = encode(pipe, Observer())
        own = text["cond"]
        texts = each(lambda *pair: torch.cat(pair), own, text.get("uncond", own))
        step = pipe.make_schedule(pipe).step(0)
        latent = pipe.make_latent(pipe)
        latents = each(lambda part: torch.cat((part, part.flip(-1))), latent)
    model = pipe.expert(step.expert)
    if not isinstance(model, torch.nn.Module):
        raise UsageError("the model is no torch module", where=f"case {case.id}")
    first = tensors_of(latents)

    def call(*parts: Tensor) -> object:
        own_latent = made_of(parts[: len(first)], like=latents)
        own_text = made_of(parts[len(first) :], like=texts)
        return pipe.predict(pipe, own_latent, step, own_text, "cond")

    result = batch_invariance(model, *first, *tensors_of(texts), call=call, branch="cond")
    return result.model_copy(update={"case_id": case.id, "case": case.canonical()})


def _batched(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _stacked(singles: Sequence[Flow]) -> Flow:
    """What single samples gave, as rows of one batch; what has no rows stays as it is."""
    first = singles[0]
    tensors = {}
    for name, tensor in first.tensors.items():
        own = [single.tensors[name] for single in singles if name in single.tensors]
        alike = tensor.ndim > 0 and all(other.shape == tensor.shape for other in own)
        tensors[name] = torch.cat(own) if alike else tensor
    return Flow(tensors=tensors, calls=list(first.calls), classes=dict(first.classes))


def _comparable(batched: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What does not depend on the samples (a table of positions) has one row in a batch, too."""
    made = {}
    for name, tensor in batched.items():
        wanted = expected.get(name)
        if wanted is not None and wanted.shape != tensor.shape and tensor.ndim:
            times, rest = divmod(len(wanted), len(tensor)) if len(tensor) else (0, 1)
            if not rest and wanted.shape[1:] == tensor.shape[1:]:
                tensor = tensor.repeat(times, *[1] * (tensor.ndim - 1))
        made[name] = tensor
    return made


def _named(result: Comparison, model: torch.nn.Module) -> Comparison:
    """Name the first module that is not invariant to the bit, and count the others."""
    classes = {name: type(part).__name__ for name, part in model.named_modules()}

    def differs(row: Row) -> bool:
        return key_of(row.name).outward and row.verdict is not Verdict.IDENTICAL

    leaves = [row for row in result.rows if differs(row)]
    if not leaves:
        return result
    first = leaves[0]
    fqns = list(dict.fromkeys(row.fqn or "" for row in leaves))
    size = f"rel_l2 {first.metrics.rel_l2:.1e}" if first.metrics else first.note
    kind = classes.get(first.fqn or "", type(model).__name__)
    note = (
        f"first not invariant: `{first.fqn}` ({kind}), {size}; "
        f"{len(fqns)} of {len({r.fqn for r in result.rows})} modules are not bit-equal"
    )
    place = result.first_divergence or Divergence(
        name=first.name,
        stage="module",
        step=first.step,
        branch=first.branch,
        fqn=first.fqn,
        kind=f"not batch invariant, {size}",
    )
    return result.model_copy(update={"first_divergence": place, "notes": (*result.notes, note)})
