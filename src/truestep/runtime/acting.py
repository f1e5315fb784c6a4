"""Whether a mechanism acted: blocks skipped, cache hits per step, layers quantised.

Counted by what ran, not by what was asked for: the first module with weights inside of every
repeated block is watched, because hooks that skip a block still call the block itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.runtime.pipeline import Pipeline

_DENOISERS = ("transformer", "transformer_2")


@dataclass
class Counts:
    """What a generation ran.

    Attributes:
        blocks: Of each step: forwards of blocks that got as far as their first weights.
        hits: Of each step: keys and values of the text that were kept from before.
        forwards: Of the denoiser.
        batched: Forwards whose batch held several passes.
        collapsed: Forwards whose padded text was one key.
        fallbacks: Why a plan was not followed.
    """

    blocks: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    forwards: int = 0
    batched: int = 0
    collapsed: int = 0
    fallbacks: tuple[str, ...] = ()

    def step(self) -> None:
        """Begin to count for the next step."""
        self.blocks.append(0)
        self.hits.append(0)


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a denoiser: members of its own lists of two and more modules of one class."""
    lists = [inner for inner in model.children() if isinstance(inner, torch.nn.ModuleList)]
    alike = [inner for inner in lists if len(inner) > 1 and len({type(m) for m in inner}) == 1]
    return [block for inner in alike for block in inner]


def _first_weighted(block: torch.nn.Module) -> torch.nn.Module | None:
    """The module inside a block that runs whenever the block does its work."""
    inner = [m for m in block.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return next((m for m in inner if m is not block), inner[0] if inner else None)


@contextmanager
def watching(pipe: Pipeline) -> Iterator[Counts]:
    """Count what the denoisers run inside the block. Nothing is changed for good."""
    counts = Counts()
    counts.step()
    before, update = pipe.forwards, pipe.update

    def updated(*arguments: Any) -> Any:
        counts.hits[-1] = sum(plan.hits for plan in pipe.text_plans) - sum(counts.hits[:-1])
        counts.step()
        return update(*arguments)

    with ExitStack() as stack:
        pipe.update = updated
        stack.callback(setattr, pipe, "update", update)
        for model in _models(pipe):
            for block in repeated_blocks(model):
                inner = _first_weighted(block)
                if inner is not None:
                    hook = inner.register_forward_pre_hook(_counting(counts))
                    stack.callback(hook.remove)
        yield counts
    counts.blocks, counts.hits = counts.blocks[:-1], counts.hits[:-1]  # none after the last
    counts.forwards = pipe.forwards - before
    counts.fallbacks = pipe.fallbacks
    counts.batched = pipe.branches.joined
    counts.collapsed = sum(plan.shortened for plan in pipe.text_plans)


def _counting(counts: Counts) -> Any:
    def hook(module: torch.nn.Module, arguments: Any) -> None:
        counts.blocks[-1] += 1

    return hook


def _models(pipe: Pipeline) -> list[torch.nn.Module]:
    found = (getattr(pipe, name, None) for name in _DENOISERS)
    return [model for model in found if isinstance(model, torch.nn.Module)]


def quantised_layers(pipe: Pipeline, baseline: Pipeline) -> int:
    """Layers of the denoisers whose weights have fewer bits, or another form, than the baseline's.

    A plain conversion of everything to another floating-point dtype is no quantisation.
    """
    return sum(
        _changed(ours, theirs)
        for ours, theirs in zip(_models(pipe), _models(baseline), strict=False)
    )


def _changed(model: torch.nn.Module, baseline: torch.nn.Module) -> int:
    now = dict(model.named_modules())
    count = 0
    for name, module in baseline.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        other = now.get(name)
        count += other is not None and _narrower(other, module)
    return count


def _narrower(module: torch.nn.Module, baseline: torch.nn.Module) -> bool:
    weight, before = getattr(module, "weight", None), baseline.weight
    if callable(weight) or weight is None:  # packed: torch.ao keeps it behind a method
        return type(module) is not type(baseline)
    assert isinstance(before, torch.Tensor)
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    if not plain or not weight.is_floating_point():
        return True
    return weight.dtype.itemsize < 2 or _on_a_grid(weight.detach(), before.detach())


def _on_a_grid(weight: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether the first row of a weight has half as many values as the baseline's, or fewer: it was
    rounded to few levels and widened again."""
    if weight.shape != before.shape or weight.ndim < 2 or weight[0].numel() < _LEAST_ROW:
        return False
    own, theirs = (len(torch.unique(tensor[0].float())) for tensor in (weight, before))
    return own <= theirs // 2


_LEAST_ROW = 32
"""Numbers of a row below which few values say nothing."""
