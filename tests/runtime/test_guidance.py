"""Guidance plans: batched is sequential, off is one forward, and every fallback says why."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from truestep.case import Case
from truestep.recording.format import Recording
from truestep.replay.check import check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.guidance import (
    Branches,
    CannotBatchError,
    batched_keywords,
    classifier_free,
    rescaled,
)
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Observer, generate
from truestep.verdict import Verdict

Tensor = torch.Tensor
PROMPT = "a red three moving left"


class Stub(nn.Module):
    """A transformer that counts its forwards and mixes no samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.seen = nn.Linear(4, 4), list[int]()

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, **others: Any) -> Any:
        self.seen.append(len(hidden_states))
        made = self.proj(hidden_states) + text.mean(1, keepdim=True) * timestep[:, None, None]
        return made + others.get("shift", 0)


def keywords(**others: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(1, 6, 4, generator=generator)
    shared = {"hidden_states": latent, "timestep": torch.tensor([0.5]), **others}
    texts = torch.randn(2, 1, 3, 4, generator=generator)
    return {**shared, "text": texts[0]}, {**shared, "text": texts[1]}


def run(cfg: str, cond: Any, uncond: Any) -> tuple[Any, Stub, Branches]:
    model, branches = Stub(), Branches(cfg)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = branches.run(lambda branch, **given: model(**given), cond, uncond)
    return made, model, branches


def test_batched_is_sequential_in_one_forward() -> None:
    given = keywords(shift=torch.tensor(0.25), fps=16)
    apart, model, _ = run("sequential", *given)
    assert model.seen == [1, 1]
    together, model, branches = run("batched", *given)
    assert model.seen == [2]
    assert branches.reasons == []
    for a, r in zip(together, apart, strict=True):
        torch.testing.assert_close(a, r, rtol=0, atol=1e-6)
    assert not torch.equal(apart[0], apart[1])


def test_unconditional_comes_first_on_the_batch_axis() -> None:
    cond, uncond = keywords()
    made = batched_keywords(cond, uncond)
    assert torch.equal(made["text"], torch.cat((uncond["text"], cond["text"])))
    assert made["hidden_states"].shape == (2, 6, 4)


def test_keywords_without_a_batch_axis_are_kept() -> None:
    mask = torch.ones(1, 1, 8, 8)
    cond, uncond = keywords(padding_mask=mask, fps=16, flags=["a"], timestep_r=torch.tensor([0.1]))
    made = batched_keywords(cond, uncond)
    assert made["padding_mask"] is mask
    assert (made["fps"], made["flags"]) == (16, ["a"])
    assert made["timestep_r"].shape == (2,)


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("image_latent", "image latent"),
        ("video_latent", "video latent"),
        ("pil_image", "image conditioning"),
        ("encoder_hidden_states_image", "image embeddings"),
        ("mouse_cond", "mouse and keyboard"),
        ("keyboard_cond", "mouse and keyboard"),
        ("camera_embedding", "camera embedding"),
        ("camera_states", "camera states"),
    ],
)
def test_conditioning_falls_back_with_its_reason(keyword: str, words: str) -> None:
    given = keywords(**{keyword: torch.ones(1, 6, 4)})
    plain, _, _ = run("sequential", *given)
    made, model, branches = run("batched", *given)
    assert model.seen == [1, 1]
    assert words in branches.reasons[0]
    assert f"({keyword}) at batch 1" in branches.reasons[0]
    assert all(torch.equal(a, r) for a, r in zip(made, plain, strict=True))


def test_other_shapes_missing_keywords_and_unknown_ones_that_differ() -> None:
    cond, uncond = keywords()
    longer = {**uncond, "text": torch.ones(1, 5, 4)}
    with pytest.raises(
        CannotBatchError, match=r"text differs in form: \[1, 3, 4\] float32 against"
    ):
        batched_keywords(cond, longer)
    with pytest.raises(CannotBatchError, match="only one pass has shift"):
        batched_keywords({**cond, "shift": 1}, uncond)
    with pytest.raises(CannotBatchError, match="scale differs between the passes"):
        batched_keywords({**cond, "scale": 1.0}, {**uncond, "scale": 2.0})


def test_a_model_that_rejects_a_batch_runs_on_and_is_asked_once() -> None:
    calls: list[int] = []

    def picky(branch: str, **given: Any) -> Tensor:
        calls.append(len(given["hidden_states"]))
        if len(given["hidden_states"]) > 1:
            raise RuntimeError("expected batch 1")
        return torch.as_tensor(given["hidden_states"]) * 2

    branches = Branches("batched")
    with pytest.warns(UserWarning, match="guidance runs sequentially: the model rejects"):
        branches.run(picky, *keywords())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        branches.run(picky, *keywords())
    assert calls == [2, 1, 1, 1, 1]
    assert "RuntimeError: expected batch 1" in branches.reasons[0]


def test_guidance_is_the_formula_and_rescale_keeps_each_samples_deviation() -> None:
    cond, uncond = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(
        classifier_free(cond, uncond, scale=5.0), cond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5
    )
    whole = classifier_free(cond, uncond, scale=5.0, rescale=1.0)
    for sample in range(3):
        torch.testing.assert_close(whole[sample].std(), cond[sample].std())
    flat = torch.ones(2, 3)
    assert torch.equal(rescaled(flat, flat, share=0.7), flat)
    narrow = classifier_free(cond.bfloat16(), uncond.bfloat16(), scale=5.0, dtype=torch.float32)
    assert narrow.dtype == torch.bfloat16


# --- in the runtime ----------------------------------------------------------------------------


def case(**settings: Any) -> Case:
    return Case(
        model="builtin:digits",
        prompt=PROMPT,
        steps=6,
        settings={"device": "cpu", **settings},
    )


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_pipeline(load(case()), case=case(), floor="final")


@pytest.mark.parametrize(
    ("settings", "verdicts"),
    [
        ({"cfg": "batched"}, {Verdict.EQUIVALENT}),
        ({"text_attention": "collapsed"}, {Verdict.EQUIVALENT}),
        ({"text_cache": True}, {Verdict.IDENTICAL}),
        (
            {"cfg": "batched", "text_attention": "collapsed", "text_cache": True},
            {Verdict.EQUIVALENT},
        ),
    ],
)
@pytest.mark.parametrize("depth", ["steps", "final"])
def test_exact_settings_are_the_same_model(
    reference: Recording, settings: dict[str, Any], verdicts: set[Verdict], depth: Any
) -> None:
    pipe = load(case(**settings))
    result = check_pipeline(pipe, reference, case=case(), candidate=case(**settings), depth=depth)
    assert result.verdict in verdicts, str(result)
    assert result.notes == ()


class Count(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def tensor(self, name: str, value: Tensor) -> None:
        self.names.append(name)


def forwards(**settings: Any) -> tuple[int, list[str]]:
    """Model calls of a run, and the names it showed."""
    pipe, seen = load(case(**settings)), Count()
    calls: list[int] = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe, observer=seen)
    handle.remove()
    return len(calls), seen.names


def test_one_forward_a_step_batched_or_unguided() -> None:
    assert forwards()[0] == 12
    assert forwards(cfg="batched")[0] == 6
    pipe = load(case().replace(guidance_scale=1.0))
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe)
    assert len(calls) == 6


def test_adaptive_skips_the_unconditional_pass_after_the_gate() -> None:
    count, names = forwards(adaptive_gate=0.5)
    assert count == 9
    assert [n for n in names if n.endswith("uncond") and "step" in n] == [
        f"step/000{i}/uncond" for i in range(3)
    ]
    assert forwards(adaptive_gate=0.5, cfg="batched")[0] == 6  # three pairs, then three alone
    assert forwards(adaptive_gate=1.0)[0] == 12
    assert forwards(adaptive_agreement=1e6)[0] == 7  # agreed after the first step
    assert forwards(adaptive_agreement=1e-9)[0] == 12


def test_reuse_drifts_less_than_dropping_where_the_delta_is_steady(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    # Of a random model. On the digits model the delta turns with the steps, and reuse is no better.
    def latent(**settings: Any) -> Tensor:
        values = {**tiny_case, "steps": 20, "settings": {"device": "cpu", **settings}}
        return generate(load(Case(model=str(tiny_wan["wan21"]), **values)))

    exact = latent()
    drift = {
        reuse: float((latent(adaptive_gate=0.5, adaptive_reuse=reuse) - exact).norm())
        for reuse in ("delta", "drop")
    }
    assert 0 < 4 * drift["delta"] < drift["drop"]


def test_adaptive_is_never_called_exact(reference: Recording) -> None:
    settings = {"adaptive_gate": 0.5}
    result = check_pipeline(
        load(case(**settings)), reference, case=case(), candidate=case(**settings)
    )
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"
    assert result.first_divergence.step == 3


def test_an_expert_switch_runs_both_passes_again(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    values = {**tiny_case, "steps": 8, "settings": {"device": "cpu", "adaptive_gate": 0.25}}
    pipe, seen = load(Case(model=str(tiny_wan["wan22"]), **values)), Count()
    generate(pipe, observer=seen)
    experts = pipe.make_schedule(pipe).experts.tolist()
    ran = [int(n.split("/")[1]) for n in seen.names if n.startswith("step") and "uncond" in n]
    switch = experts.index(2)
    assert 1 < switch < 7
    assert ran == sorted({0, 1, switch})


def test_a_fallback_is_in_the_recording_and_the_result(reference: Recording) -> None:
    def one_at_a_time(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 1:
            raise RuntimeError("one sample at a time")

    pipe = load(case(cfg="batched"))
    pipe.transformer.register_forward_pre_hook(one_at_a_time, with_kwargs=True)
    with pytest.warns(UserWarning, match="one sample at a time"):
        result = check_pipeline(pipe, reference, case=case(), candidate=case(cfg="batched"))
    assert result.verdict is Verdict.IDENTICAL
    assert result.notes[0].startswith("guidance ran sequentially: the model rejects a batch of 2")


def test_settings_at_their_default_leave_the_case_as_it_was() -> None:
    assert case(cfg="sequential", text_cache=False).id == case().id
    assert case(cfg="batched").id != case().id
    assert "cfg" not in case().canonical()["settings"]


def test_a_family_with_another_recipe_is_left_as_it_is() -> None:
    def latent(**settings: Any) -> Any:
        pipe = load(case(text_recipe="keep_padding", **settings))
        return generate(pipe), pipe.fallbacks

    plain, told = latent()
    assert told == ()
    with pytest.warns(UserWarning, match="keep_padding keeps the encoder's padding"):
        made, told = latent(cfg="batched", text_attention="collapsed")
    assert torch.equal(made, plain)
    assert told == (
        "guidance ran sequentially: text recipe keep_padding keeps the encoder's padding",
        "text was not collapsed: text recipe keep_padding keeps the encoder's padding",
    )
