"""Step and stage of a call, told from when it happens."""

from __future__ import annotations

import pytest

from truestep.calls.classes import Kind
from truestep.calls.roles import Happened, roles


def run(text: str) -> list[Happened]:
    """`m:` model, `s:` scheduler, `g:` guider, `f:` function, `r:` random."""
    kinds = {
        "m": Kind.MODEL,
        "s": Kind.SCHEDULER,
        "g": Kind.GUIDER,
        "f": Kind.FUNCTION,
        "r": Kind.RANDOM,
    }
    calls = []
    for word in text.split():
        kind, _, name = word.partition(":")
        component, _, method = name.partition(".")
        calls.append(Happened(component, method or "forward", kinds[kind]))
    return calls


def shown(text: str) -> list[str]:
    return [
        f"{role.stage}{'' if role.step is None else role.step}"
        + (f"#{role.call}" if role.call else "")
        for role in roles(run(text))
    ]


def test_a_usual_run() -> None:
    loop = "s:sched.scale_model_input m:unet m:unet s:sched.step "
    stages = shown(f"m:text m:text s:sched.set_timesteps r:random.randn {2 * loop} m:vae.decode")
    step = ["schedule{}", "prediction{}", "prediction{}#1", "update{}"]
    steps = [part.format(number) for number in (0, 1) for part in step]
    assert stages == ["text", "text#1", "schedule", "latent", *steps, "decoding"]


def test_a_component_that_also_decodes_encodes_a_latent() -> None:
    loop = "m:net s:sched.step " * 2
    stages = shown(f"m:vision m:vae.encode s:sched.add_noise {loop} m:vae.decode m:checker")
    assert stages[:3] == ["text", "latent", "latent"]
    assert stages[-2:] == ["decoding", "decoding"]


def test_two_schedulers_end_one_step_and_two_experts_share_the_loop() -> None:
    stages = shown("m:high s:a.step s:b.step m:low s:a.step s:b.step m:low s:a.step s:b.step")
    assert stages == [
        *["prediction0", "update0", "update0"],
        *["prediction1", "update1", "update1"],
        *["prediction2", "update2", "update2"],
    ]


def test_a_step_without_a_forward_is_a_step() -> None:
    assert shown("m:net s:a.step s:a.step m:net s:a.step")[-1] == "update2"


def test_noise_inside_a_step_and_guiders() -> None:
    loop = "m:net m:net g:guider s:a.step r:random.randn "
    stages = shown(f"m:text r:random.randn {loop}{loop}m:vae.decode")
    assert stages[1] == "latent"
    assert stages[4:7] == ["guidance0", "update0", "update1"]  # drawn for the step that comes


def test_a_single_step() -> None:
    stages = shown("m:text s:a.set_timesteps m:net s:a.step m:vae.decode")
    assert stages == ["text", "schedule", "prediction0", "update0", "decoding"]


def test_functions_of_an_engine_are_taken_as_what_they_say() -> None:
    loop = "m:net f:functions.guidance f:functions.step "
    stages = shown(f"f:functions.schedule {loop}{loop}")
    assert stages[0] == "schedule"
    assert stages[1:4] == ["prediction0", "guidance0", "update0"]


@pytest.mark.parametrize("text", ["m:module", "m:a m:b m:a.decode"])
def test_without_steps_everything_is_output(text: str) -> None:
    assert {role.stage for role in roles(run(text))} == {"output"}
