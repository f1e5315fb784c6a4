"""What an endpoint is asked: one request repeated, other seeds, and one change of each parameter.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from truestep.errors import UsageError

IMAGE, VIDEO = "image", "video"
KINDS = (IMAGE, VIDEO)

SEED, STEPS, GUIDANCE, NEGATIVE, PROMPT, SIZE = (
    "seed",
    "steps",
    "guidance",
    "negative",
    "prompt",
    "size",
)
PARAMETERS = (SEED, STEPS, GUIDANCE, NEGATIVE, PROMPT, SIZE)
"""What an endpoint may ignore."""

BASE = "base"

_CELL = 16
"""Sides of the other size are multiples of it: 8 of the VAE by 2 of the patches of most models."""

MOST_REPEATS = 32


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        negative: Negative prompt; empty for none.
        guidance: Scale of classifier-free guidance.
        width, height: Pixels.
        frames: Of a video; 1 for a picture.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    width: int = 512
    height: int = 512
    frames: int = 1


@dataclass(frozen=True)
class Plan:
    """All that is asked of one endpoint.

    Attributes:
        kind: `image` or `video`.
        base: What is repeated, and changed.
        repeats: How often it is asked; their differences are the endpoint's own floor.
        seeds: Other seeds, whose differences are the far end.
        other_prompt, other_negative: What takes the place of the two.
        without: Parameters that are not tried.
    """

    kind: str
    base: Ask
    repeats: int = 3
    seeds: int = 2
    other_prompt: str = "a stone bridge over a river at night"
    other_negative: str = "bright colours, a crowd of people"
    without: tuple[str, ...] = ()

    def asks(self) -> dict[str, Ask]:
        """Every request by name, in the order in which they are made.

        Repeats stand first, in the middle and last, so that a server that answers from memory, or
        changes while it is asked, is seen.
        """
        base, without = self.base, self.without
        changed = {
            STEPS: replace(base, steps=max(base.steps // 2, 1)),
            GUIDANCE: replace(base, guidance=1 + (base.guidance - 1) / 2),
            NEGATIVE: replace(base, negative=self.other_negative),
            PROMPT: replace(base, prompt=self.other_prompt),
            SIZE: replace(base, width=_other(base.width), height=_other(base.height)),
        }
        seeds = [replace(base, seed=base.seed + i) for i in range(1, self.seeds + 1)]
        others = {f"{SEED}/{i}": ask for i, ask in enumerate(seeds, 1) if SEED not in without}
        others |= {name: ask for name, ask in changed.items() if name not in without}
        names, repeats = [*others], self.repeats
        places = [round(i * len(names) / (repeats - 1)) for i in range(repeats)]
        asked: dict[str, Ask] = {}
        for position in range(len(names) + 1):
            for number, place in enumerate(places):
                if place == position:
                    asked[f"{BASE}/{number}"] = base
            if position < len(names):
                asked[names[position]] = others[names[position]]
        return asked

    def as_json(self) -> dict[str, Any]:
        """As JSON values; `plan_of` reads them."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        base = {f.name: getattr(self.base, f.name) for f in fields(self.base)}
        return {**own, "base": base, "without": list(self.without)}


def _other(side: int) -> int:
    """Another side of a picture, half as long or, of the smallest, twice."""
    half = side // 2 // _CELL * _CELL
    return half if half >= _CELL else 2 * side


def plan_of(data: Mapping[str, Any]) -> Plan:
    """A plan that a file holds.

    Raises:
        ValueError: It is none.
    """
    try:
        base = Ask(**data["base"])
        given = {**data, "base": base, "without": tuple(map(str, data["without"]))}
        plan = Plan(**given)
        check(plan)
    except (TypeError, KeyError, UsageError) as error:
        raise ValueError(f"what was asked cannot be read: {error}") from None
    return plan


def check(plan: Plan) -> None:
    """Refuse a plan that could not say anything.

    Raises:
        UsageError: A value cannot mean anything, or no parameter has another value.
    """
    base = plan.base
    types: dict[str, Any] = {"prompt": str, "negative": str, "guidance": (int, float)}
    for field in fields(base):
        value = getattr(base, field.name)
        if not isinstance(value, types.get(field.name, int)) or isinstance(value, bool):
            raise UsageError(f"{field.name} of a request cannot be {value!r}")
    limits = {
        "repeats": (plan.repeats, 2, MOST_REPEATS),
        "seeds": (plan.seeds, 1, MOST_REPEATS),
        "steps": (base.steps, 1, 10_000),
        "width": (base.width, 1, 16_384),
        "height": (base.height, 1, 16_384),
        "frames": (base.frames, 1, 4096),
        "seed": (base.seed, 0, 2**31 - 1 - MOST_REPEATS),
    }
    for name, (value, least, most) in limits.items():
        if not isinstance(value, int) or not least <= value <= most:
            raise UsageError(f"{name} cannot be {value!r}", measured=f"from {least} to {most:,}")
    unknown = [name for name in plan.without if name not in PARAMETERS]
    if unknown or plan.kind not in KINDS:
        raise UsageError(
            f"no parameter or kind {', '.join(unknown) or plan.kind}",
            measured=f"known: {', '.join(PARAMETERS)}; {', '.join(KINDS)}",
        )
    same = {
        STEPS: base.steps == 1,
        GUIDANCE: base.guidance == 1,
        NEGATIVE: plan.other_negative == base.negative,
        PROMPT: plan.other_prompt == base.prompt,
    }
    for name, alike in same.items():
        if alike and name not in plan.without:
            raise UsageError(
                f"whether {name} is ignored cannot be tried: both its values are one",
                hint=f"give another value of {name}, or --without {name}",
            )
