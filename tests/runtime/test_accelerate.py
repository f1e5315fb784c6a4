"""diffusers' own pipelines, accelerated inside a block and untouched outside of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import accelerate
from truestep.errors import UsageError

Tensor = torch.Tensor


@pytest.fixture(scope="module", params=["wan21", "wan22", "wan22-ti2v"])
def pipe(request: pytest.FixtureRequest, tiny_wan: dict[str, Path]) -> Any:
    import diffusers

    found = diffusers.WanPipeline.from_pretrained(tiny_wan[request.param], dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def run(pipe: Any, **options: Any) -> Tensor:
    values = {
        "prompt": "a red three moving left",
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "latent",
        **options,
    }
    found = pipe(generator=torch.Generator().manual_seed(0), **values).frames
    assert isinstance(found, Tensor)
    return found


def state(pipe: Any) -> list[Any]:
    """Everything that could be left behind: own attributes and hooks of all modules."""
    models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    found: list[Any] = [sorted(vars(pipe))]
    for model in models:
        for module in model.modules():
            found.append("forward" in vars(module))
            found.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
    return found


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.0),
        ({"text_cache": True}, 0.0),
        ({"cfg": "batched"}, 2e-5),
        ({"text": "collapsed"}, 2e-5),
        ({"cfg": "batched", "text": "collapsed", "text_cache": True}, 2e-5),
    ],
)
def test_the_same_video_and_nothing_is_left(
    pipe: Any, options: dict[str, Any], limit: float
) -> None:
    plain, before = run(pipe), state(pipe)
    with accelerate(pipe, **options) as done:
        made = run(pipe)
    assert float((made - plain).norm() / plain.norm()) <= limit
    assert done.reasons == ()
    if options.get("cfg") == "batched":
        assert (done.batched, done.single) == (4, 0)
    assert state(pipe) == before
    assert torch.equal(run(pipe), plain)


def test_without_guidance_there_is_nothing_to_batch(pipe: Any) -> None:
    plain = run(pipe, guidance_scale=1.0)
    with accelerate(pipe, cfg="batched") as done:
        made = run(pipe, guidance_scale=1.0)
    assert torch.equal(made, plain)
    assert (done.batched, done.single) == (0, 4)


def test_embeddings_given_by_the_user_and_several_calls(pipe: Any) -> None:
    cond, uncond = pipe.encode_prompt("a blue one", "", True, max_sequence_length=16)
    given = {"prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
    plain, other = run(pipe, **given), run(pipe)
    with accelerate(pipe, cfg="batched", text_cache=True) as done:
        for _ in range(2):
            torch.testing.assert_close(run(pipe, **given), plain, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(run(pipe), other, rtol=1e-4, atol=1e-4)
    assert (done.batched, done.single) == (16, 0)


def test_an_exception_restores_everything(pipe: Any) -> None:
    plain, before = run(pipe), state(pipe)

    def stop(*_: object, **__: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), accelerate(pipe, cfg="batched", text="collapsed"):
        run(pipe, callback_on_step_end=stop)
    assert state(pipe) == before
    assert torch.equal(run(pipe), plain)


def test_a_model_that_rejects_a_batch_runs_sequentially(pipe: Any) -> None:
    plain = run(pipe)

    def single(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > 1:
            raise RuntimeError("one at a time")

    models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    handles = [m.blocks[0].register_forward_pre_hook(single, with_kwargs=True) for m in models]
    try:
        with (
            pytest.warns(UserWarning, match="the model rejects a batch of 2"),
            accelerate(pipe, cfg="batched") as done,
        ):
            made = run(pipe)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(made, plain)
    assert done.batched == 0
    assert "one at a time" in done.reasons[0]


def test_threads_do_not_see_each_others_texts(tiny_wan: dict[str, Path]) -> None:
    import diffusers

    first = diffusers.WanPipeline.from_pretrained(tiny_wan["wan21"], dtype=torch.float32)
    first.set_progress_bar_config(disable=True)
    other = diffusers.WanPipeline(
        **{**first.components, "scheduler": first.scheduler.from_config(first.scheduler.config)}
    )
    other.set_progress_bar_config(disable=True)
    prompts = {"a": (first, "a red three"), "b": (other, "a blue one")}
    plain = {key: run(p, prompt=text) for key, (p, text) in prompts.items()}
    made: dict[str, list[Tensor]] = {"a": [], "b": []}

    def work(key: str) -> None:
        pipe, text = prompts[key]
        for _ in range(3):
            made[key].append(run(pipe, prompt=text))

    with accelerate(first, cfg="batched", text="collapsed", text_cache=True) as done:
        # Both share the transformer; only the first pipeline's texts are known.
        threads = [threading.Thread(target=work, args=(key,)) for key in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for key, found in made.items():
        for latent in found:
            assert float((latent - plain[key]).norm() / plain[key].norm()) < 2e-5
    assert done.batched == 12


def test_what_cannot_be_accelerated_is_said() -> None:
    class HunyuanVideoPipeline:
        transformer = None

    with (
        pytest.raises(UsageError, match="HunyuanVideoPipeline cannot be accelerated") as caught,
        accelerate(HunyuanVideoPipeline()),
    ):
        pass
    assert "WanPipeline" in str(caught.value)


def test_an_unknown_option_is_refused(pipe: Any) -> None:
    with (
        pytest.raises(UsageError, match="cfg = 'both' is unknown"),
        accelerate(pipe, cfg="both"),  # type: ignore[arg-type]
    ):
        pass
