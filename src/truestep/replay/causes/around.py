"""Why the code around a model of truestep's own stages is wrong: what it gives it, makes of it.

A stage is run on both sides on the same recorded inputs, and the model in it is heard: what that is
given, and what the stage makes of what it gave, is set against the trusted side's by the same
relations that explain what a plain pipeline hands from call to call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.calls.keys import Key
from truestep.replay.causes.guesses import LEAST, Failing, Guess, apart, cause_of, explains
from truestep.replay.causes.latents import statistics
from truestep.replay.causes.material import Handed, Piece, config_of
from truestep.replay.causes.relations import casts, fits, orders
from truestep.replay.causes.times import times
from truestep.replay.causes.tokens import masks, tokens
from truestep.runtime.pipeline import Code
from truestep.verdict import Cause

_GIVEN = (times, masks, tokens, statistics, orders, casts, fits)
_MADE = (orders, casts, fits)

_STAGES = {
    "text": "what text encoding gives",
    "prediction": "what predicting gives",
    "decoding": "what decoding gives",
}


@dataclass(frozen=True)
class Around:
    """One side of a stage with a model.

    Attributes:
        model: It.
        method: Of it, that the stage calls.
        runs: Run the stage, in the order of the places that are looked at.
        code: Entered while they run, and while the model's method is looked up.
    """

    model: Any
    method: str
    runs: Sequence[Callable[[], Any]]
    code: Code = nullcontext


@dataclass
class Heard:
    """What one run showed.

    Attributes:
        given: What the model was given, by argument.
        gave: What it returned.
        made: What the stage made.
    """

    given: dict[str, torch.Tensor] = field(default_factory=dict)
    gave: list[torch.Tensor] = field(default_factory=list)
    made: torch.Tensor | None = None


@dataclass(frozen=True)
class Shelf:
    """The trusted side's parts; nothing else is material for a stage."""

    components: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def before(self, call: Any) -> Iterator[Piece]:
        """No tensors."""
        yield from ()

    def read(self, piece: Piece) -> torch.Tensor | None:
        """Nothing."""
        return None

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Nothing."""
        return ()

    def config(self, component: str) -> Mapping[str, Any]:
        """What a part is configured as."""
        return config_of(self.components.get(component))

    def of_step(self, key: Key, offset: int) -> torch.Tensor | None:
        """Nothing."""
        return None


def around_cause(
    stage: str,
    component: str,
    ours: Around,
    theirs: Around,
    components: Mapping[str, Any],
) -> tuple[Cause | None, int]:
    """Why code around a stage's model is wrong, and how much was tried.

    Args:
        stage: `text`, `prediction` or `decoding`.
        component: The model's name.
        ours, theirs: The candidate's side and the trusted one, in the same places.
        components: The trusted side's parts, by name.
    """
    heard = [[_heard(side, run) for run in side.runs] for side in (ours, theirs)]
    pairs = list(zip(*heard, strict=True))
    shelf, tried = Shelf(components), 0
    for scene, relations in _scenes(stage, component, ours.method, pairs, shelf):
        for relation in relations:
            for guess in relation(scene):
                tried += 1
                if explains(guess, scene.failing):
                    return cause_of(guess, scene.failing, tried), tried
    return None, tried


_Relations = Sequence[Callable[[Handed], Iterator[Guess]]]


def _scenes(
    stage: str, component: str, method: str, pairs: Sequence[tuple[Heard, Heard]], shelf: Shelf
) -> Iterator[tuple[Handed, _Relations]]:
    """Each argument of the model that differs; of none, what the stage made of what it gave."""
    names = [name for name in pairs[0][1].given if name in pairs[0][0].given] if pairs else []
    differing = False
    for name in names:
        sides = [(a.given.get(name), b.given.get(name)) for a, b in pairs]
        scene = _scene(stage, (component, method, name), sides, shelf)
        if scene is not None:
            differing = True
            yield scene, _GIVEN
    if differing or not all(_same(a.gave, b.gave) for a, b in pairs):
        return
    sides = [(a.made, b.made) for a, b in pairs]
    scene = _scene(stage, (component, method, "made"), sides, shelf, _STAGES.get(stage, stage))
    if scene is not None:
        yield scene, _MADE


def _scene(
    stage: str,
    place: tuple[str, str, str],
    sides: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
    shelf: Shelf,
    label: str = "",
) -> Handed | None:
    component, method, name = place
    failing, keys = [], []
    for at, (actual, reference) in enumerate(sides):
        if actual is None or reference is None:
            continue
        if apart(actual, reference) <= LEAST:
            continue
        failing.append(Failing(name, actual, reference, LEAST))
        keys.append(Key(stage, component, method, at, "in", (name,)))
    return Handed(failing, keys, [None] * len(keys), shelf, label) if failing else None


def _same(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        apart(a, b) <= LEAST for a, b in zip(ours, theirs, strict=True)
    )


def _heard(side: Around, run: Callable[[], Any]) -> Heard:
    heard = Heard()
    with side.code(), _listening(side, heard), torch.no_grad():
        made = run()
    heard.made = _kept(made)
    return heard


@contextmanager
def _listening(side: Around, heard: Heard) -> Iterator[None]:
    """Keep what the model is given and gives, the first time it is called in a run."""
    method = getattr(side.model, side.method)
    names = inspect.signature(method)

    def told(*args: Any, **kwargs: Any) -> Any:
        first = not heard.given
        if first:
            for name, value in names.bind_partial(*args, **kwargs).arguments.items():
                kept = _kept(value)
                if kept is not None:
                    heard.given[name] = kept
        output = method(*args, **kwargs)
        if first:
            heard.gave += _tensors(output)
        return output

    had = vars(side.model).get(side.method)
    setattr(side.model, side.method, told)
    try:
        yield
    finally:
        if had is None:
            delattr(side.model, side.method)
        else:
            setattr(side.model, side.method, had)


def _kept(value: Any) -> torch.Tensor | None:
    """A copy in float64; None of what is no tensor."""
    return value.detach().double().cpu().clone() if isinstance(value, torch.Tensor) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value.values() if isinstance(value, Mapping) else value
    parts = [values] if isinstance(values, torch.Tensor) else list(values)
    return [kept for part in parts if (kept := _kept(part)) is not None]
