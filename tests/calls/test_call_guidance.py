"""Guidance passes and their weights, found by moving them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.calls.conftest import TINY
from tests.calls.loops import Loop, Scheduler
from truestep.calls.guidance import Guidance, guidance
from truestep.calls.recorder import recorded
from truestep.calls.subject import subject_of


class Guided(Loop):
    """A loop whose passes and their combination can be chosen."""

    def __init__(self, combine: Callable[..., torch.Tensor], *, batched: bool = False) -> None:
        super().__init__()
        self.combine, self.batched = combine, batched

    def __call__(self, generator: Any = None) -> torch.Tensor:
        text, none = (self.encoder(input_ids=torch.tensor([ids]))["last"] for ids in ([1], [0]))
        self.scheduler.set_timesteps(self.steps)
        x = torch.randn(1, 6, generator=generator)
        for t in self.scheduler.timesteps:
            if self.batched:
                both = self.net(torch.cat([x] * 3), t, text=torch.cat([none, text, text]))[0]
                passes = both.chunk(3)
            else:
                passes = [self.predict(x, t, part) for part in (none, text, text)]
            x = self.scheduler.step(self.combine(*passes), t, x)[0]
        return self.decoder.decode(x)


def shown(found: Guidance) -> list[tuple[str, float]]:
    return [(p.name, p.weight) for p in found.passes]


def of(build: Callable[[], Any]) -> Guidance:
    return guidance(subject_of(build()), recorded(subject_of(build())))


@pytest.mark.parametrize("batched", [True, False])
def test_passes_are_named_by_weight_and_by_what_they_are_given(batched: bool) -> None:
    def perturbed(u: Any, c: Any, p: Any) -> Any:
        return u + 5 * (c - u) + 2 * (c - p)

    result = of(lambda: Guided(perturbed, batched=batched))
    assert shown(result) == [("uncond", -4.0), ("cond", 7.0), ("perturbed", -2.0)]
    assert result.scale() == 5.0
    assert str(result) == "step 2: uncond -4, cond 7, perturbed -2"


def test_a_scheduler_that_takes_the_negative() -> None:
    result = of(lambda: Guided(lambda u, c, p: -(u + 4 * (c - u))))
    assert shown(result) == [("uncond", -3.0), ("cond", 4.0)]


def test_packing_and_slicing_change_no_weight() -> None:
    def packed(u: Any, c: Any, p: Any) -> Any:
        return (u + 2.5 * (c - u)).reshape(1, 2, 3).permute(0, 2, 1).reshape(1, 6)

    assert of(lambda: Guided(packed)).scale() == 2.5


def test_what_is_rescaled_has_its_weights_beside_its_gain() -> None:
    result = of(lambda: Guided(lambda u, c, p: 0.7 * (u + 3 * (c - u))))
    assert shown(result) == [("uncond", -2.0), ("cond", 3.0)]
    assert [p.gain for p in result.passes] == [pytest.approx(0.7)] * 2
    assert result.scale() == 3.0


def test_what_is_no_sum_of_passes_has_no_weights() -> None:
    def projected(u: Any, c: Any, p: Any) -> Any:
        guided = u + 3 * (c - u)
        return guided * c.norm() / guided.norm()

    result = of(lambda: Guided(projected))
    assert not result.affine
    assert result.scale() is None
    assert str(result) == "step 2: passes are combined, but not by weights"


def test_without_guidance_there_is_one_pass() -> None:
    result = of(lambda: Guided(lambda u, c, p: c))
    assert shown(result) == [("cond", 1.0)]
    assert result.scale() is None


def test_two_schedulers_have_weights_of_their_own() -> None:
    class Joint(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.sound = Scheduler()

        @property
        def components(self) -> dict[str, Any]:
            return {**super().components, "sound": self.sound}

        def __call__(self, generator: Any = None) -> Any:
            text, none = (
                self.encoder(input_ids=torch.tensor([ids]))["last"] for ids in ([1, 2], [0])
            )
            self.scheduler.set_timesteps(3)
            self.sound.set_timesteps(3)
            x, y = torch.randn(1, 6, generator=generator), torch.randn(1, 6, generator=generator)
            for t in self.scheduler.timesteps:
                c, u = self.predict(x + y, t, text), self.predict(x + y, t, none)
                x = self.scheduler.step(u + 3 * (c - u), t, x)[0]
                y = self.sound.step(u + 7 * (c - u), t, y)[0]
            return self.decoder.decode(x + y)

    result = of(Joint)
    assert result.scale("scheduler.step") == 3.0
    assert result.scale("sound.step") == 7.0


@pytest.mark.parametrize(("name", "scale"), [("sd", 6.0), ("wan", 4.0), ("flux", None)])
def test_scales_of_pipelines_are_found(name: str, scale: float | None) -> None:
    subject = TINY[name].subject()
    assert guidance(subject, recorded(subject)).scale() == scale
