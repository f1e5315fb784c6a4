"""Guidance plans and text attention for diffusers' own Wan and Cosmos pipelines, unchanged."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from truestep.errors import UsageError
from truestep.runtime.attention import FAMILIES, TextAttention
from truestep.runtime.guidance import Branches

Tensor = torch.Tensor

SUPPORTED = ("WanPipeline", "CosmosTextToWorldPipeline")
"""Pipelines whose guidance is one forward a branch on the same latent, the prompt's first.

Image and video conditioned pipelines, and other recipes, are left alone."""


@dataclass
class Accelerated:
    """What `accelerate` did.

    Attributes:
        batched: Steps in which both branches ran as one forward.
        single: Forwards of one branch.
    """

    batched: int = 0
    single: int = 0
    _branches: list[Branches] = field(default_factory=list, repr=False)
    _texts: list[TextAttention] = field(default_factory=list, repr=False)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why something that was asked for did not apply."""
        told = [f"guidance ran sequentially: {r}" for b in self._branches for r in b.reasons]
        told += [f"text was not collapsed: {r}" for plan in self._texts for r in plan.reasons]
        return tuple(dict.fromkeys(told))


@contextmanager
def accelerate(
    pipe: Any,
    *,
    cfg: Literal["sequential", "batched"] = "sequential",
    text: Literal["full", "collapsed"] = "full",
    text_cache: bool = False,
) -> Iterator[Accelerated]:
    """Run a diffusers pipeline faster inside the block, and the same up to rounding.

    Everything is as it was when the block ends, however it ends. Threads may run pipelines at the
    same time.

    Args:
        pipe: `diffusers.WanPipeline` or `diffusers.CosmosTextToWorldPipeline`.
        cfg: `batched` runs prompt and negative prompt as one forward.
        text: `collapsed` attends to padded text as to one key.
        text_cache: Keeps keys and values of the text over the steps of a call: bit-equal.

    Yields:
        What was done, and why something was not.

    Raises:
        UsageError: The pipeline is of another class, or an option has no such value.
    """
    name = type(pipe).__name__
    if name not in SUPPORTED:
        raise UsageError(
            f"{name} cannot be accelerated",
            measured=f"supported: {', '.join(SUPPORTED)}",
            likely="its branches or its text are treated in another way, and would not stay exact",
        )
    for key, value, known in (
        ("cfg", cfg, ("sequential", "batched")),
        ("text", text, ("full", "collapsed")),
    ):
        if value not in known:
            raise UsageError(f"{key} = {value!r} is unknown", measured=f"known: {', '.join(known)}")
    found = (getattr(pipe, key, None) for key in ("transformer", "transformer_2"))
    models: list[Any] = [model for model in found if model is not None]
    done = Accelerated()
    with ExitStack() as stack:
        if text == "collapsed" or text_cache:
            for model in models:
                if type(model).__name__ not in FAMILIES:
                    raise UsageError(f"the text of a {type(model).__name__} is not known")
                plan = TextAttention(model, collapsed=text == "collapsed", cache=text_cache)
                stack.callback(plan.remove)
                done._texts.append(plan)
        pairs = _Pairs()
        _replace(stack, pipe, "encode_prompt", _listening(pipe.encode_prompt, pairs, done))
        if cfg == "batched":
            for model in models:
                branches = Branches("batched")
                done._branches.append(branches)
                _replace(stack, model, "forward", _batching(model.forward, branches, pairs, done))
        yield done


class _Pairs(threading.local):
    """Of this thread: both texts of the call under way, and a prediction made ahead."""

    cond: Tensor | None = None
    uncond: Tensor | None = None
    ahead: tuple[Tensor, Tensor, Any] | None = None


def _listening(
    original: Callable[..., Any], pairs: _Pairs, done: Accelerated
) -> Callable[..., Any]:
    """Learn both texts of a call; its weights may be others than those of the last call."""

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        cond, uncond = original(*args, **kwargs)
        pairs.ahead = None
        both = isinstance(cond, Tensor) and isinstance(uncond, Tensor)
        pairs.cond, pairs.uncond = (cond, uncond) if both else (None, None)
        for plan in done._texts:
            plan.forget()
        return cond, uncond

    return encode_prompt


def _batching(
    original: Callable[..., Any], branches: Branches, pairs: _Pairs, done: Accelerated
) -> Callable[..., Any]:
    """Run both branches when the prompt's is asked for, and have the other ready."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        text: Any
        latent: Any
        text, latent = kwargs.get("encoder_hidden_states"), kwargs.get("hidden_states")
        if args or kwargs.get("return_dict", True) or not isinstance(text, Tensor):
            done.single += 1
            return original(*args, **kwargs)
        ahead, pairs.ahead = pairs.ahead, None
        if ahead is not None:
            expected, given, prediction = ahead
            alike = latent is given or (
                isinstance(latent, Tensor)
                and latent.shape == given.shape
                and torch.equal(latent, given)
            )
            if alike and _is(text, expected):
                return (prediction,)
        if pairs.uncond is None or pairs.cond is None or not _is(text, pairs.cond):
            done.single += 1
            return original(**kwargs)
        other = pairs.uncond.to(text.device, text.dtype)
        made: list[Any] = []

        def call(branch: str, **keywords: Any) -> Tensor:
            result: Tensor = original(**keywords)[0]
            made.append(branch)
            return result

        if branches.reasons:
            done.single += 1
            return original(**kwargs)
        cond, uncond = branches.run(call, kwargs, {**kwargs, "encoder_hidden_states": other})
        if made == ["batched"]:
            done.batched += 1
        else:
            done.single += len(made)
        pairs.ahead = (other, latent, uncond)
        return (cond,)

    return forward


def _is(text: Tensor, known: Tensor) -> bool:
    """Whether a text is one that was encoded, in its own or the model's precision."""
    if text is known:
        return True
    if text.shape != known.shape:
        return False
    return bool(torch.equal(text, known.to(text.device, text.dtype)))


def _replace(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute of an instance until the stack unwinds."""
    missing = object()
    before = vars(owner).get(name, missing)

    def restore() -> None:
        if vars(owner).get(name) is not value:
            warnings.warn(
                f"{name} of {type(owner).__name__} was replaced inside accelerate: it is left so",
                stacklevel=2,
            )
        elif before is missing:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)

    object.__setattr__(owner, name, value)
    stack.callback(restore)
