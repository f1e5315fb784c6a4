"""What a change of a pipeline does beside the weights of its layers: those are put back, and a
short run is set beside the trusted one's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from truestep.errors import UsageError
from truestep.experiment.trajectory import Generation, apart
from truestep.judge.floor import pair_of, repeat_limit
from truestep.replay.meant_weights import Models
from truestep.runtime.precision import working_dtype
from truestep.text import listed

Tensor = torch.Tensor
_LISTED = 3


def refuse_not_finite(changed: Mapping[str, Tensor]) -> None:
    """Refuse a change that gives layers what is no number: nothing can be ranked beside that.

    Raises:
        UsageError: One holds such values; the layers are named.
    """
    bad = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in changed.items()}
    named = [name for name, count in bad.items() if count]
    if named:
        raise UsageError(
            "the change makes layers hold values that are not finite",
            where=listed(named, _LISTED),
            measured=f"{bad[named[0]]} of {changed[named[0]].numel()} numbers of the first",
            likely="a scale of 0 or an overflow in the quantiser",
        )


def refuse_endless(ends: Mapping[str, Tensor], whole: Tensor, estimated: Iterable[str]) -> None:
    """Refuse a change with which a run ends in what is no number.

    Args:
        ends: Where the end of a short run moves, with each of some layers changed alone.
        whole: With all of them. estimated: layers of which an estimate is no number.

    Raises:
        UsageError: There is one; the layers are named, where one alone does it.
    """
    named = [name for name, end in ends.items() if not bool(torch.isfinite(end).all())]
    named = named or list(estimated)
    if named or not bool(torch.isfinite(whole).all()):
        raise UsageError(
            "with the change a run ends in values that are not finite",
            where=listed(named, _LISTED) if named else "all layers together; none of them alone",
            likely="what these layers make is more than the working precision holds",
        )


def beside(
    run: Generation, other: Generation, weights: Iterable[tuple[str, str]], most: int
) -> list[str]:
    """What is left of a change when all the weights that it changes are put back, in words.

    Args:
        run: The trusted one.
        other: The changed one; its weights are put back.
        weights: Module, its model before it, and key of each.
        most: Steps of the runs.

    Raises:
        UsageError: The change reaches the trusted pipeline, too: code that both share.
    """
    denoiser = next(iter(run.denoisers.values()))
    working = str(working_dtype(denoiser) or torch.float32).removeprefix("torch.")
    limit = repeat_limit(pair_of(working, working))
    with torch.no_grad():
        run.begin()
        moved = apart(run.guided(0), run.trusted(0))
    if not moved <= limit:
        raise UsageError(
            "the change reaches the trusted model, too: there would be nothing to compare with",
            measured=f"its first prediction is {moved:.2g} off what was recorded",
            likely="it replaces code that all models share: a method of a class, a function",
            hint="change the pipeline in place and return nothing, or return a Pipeline",
        )
    for name, key in weights:
        _put_back(other.models, run.models, name, key)
    trusted, changed = run.shortened(most), other.shortened(most)
    left = apart(changed.latent(), trusted.latent())
    run.spent += trusted.spent + changed.spent
    if left <= limit:
        return []
    return [f"with every weight put back the end is still {left:.2g} off: it changes code, too"]


def _put_back(other: Models, trusted: Models, name: str, key: str) -> None:
    """Give a module its trusted weight; where it is of another make, the trusted one stands in."""
    part, _, fqn = name.partition(".")
    model, module = other[part], _inside(other[part], fqn)
    right = _inside(trusted[part], fqn)
    if module is None or right is None:
        return  # there is none of this name: what is left tells it
    weight, like = module._parameters.get(key), right._parameters[key]
    assert like is not None
    if weight is not None and (weight.shape, weight.dtype) == (like.shape, like.dtype):
        with torch.no_grad():
            weight.copy_(like)
    else:
        model.set_submodule(fqn, right)


def _inside(model: torch.nn.Module, fqn: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(fqn)
    except AttributeError:
        return None
