"""A pipeline that is checked while it serves."""

from __future__ import annotations

import inspect
import logging
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import truestep
from tests.calls.conftest import TINY, Tiny, tiny
from tests.documents import ROOT, with_python
from truestep.calls.rebuilding import CannotBuildError
from truestep.engines.pipelines import opened
from truestep.errors import MissingExtraError, UsageError
from truestep.recording.format import Recording
from truestep.serving.metrics import opentelemetry, prometheus
from truestep.serving.requests import Requests
from truestep.serving.watching import Pace, Result, Watch
from truestep.testing import tiny as tiny_pipelines

__all__ = ["tiny"]

CALL = {**TINY["flux"].call, "output_type": "np"}
CALLS = 6
"""Two text encoders, three steps, one decoder."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("watched") / "reference.safetensors"
    return truestep.record(TINY["flux"].build(), call=CALL, path=path)


@pytest.fixture
def pipe() -> Any:
    return TINY["flux"].build()


def often(pipe: Any, reference: Any, **options: Any) -> Watch:
    """A watch that checks after every request, whatever it costs."""
    return truestep.watch(pipe, reference, **{"every": 1, "share": 1.0, **options})


def served(pipe: Any, requests: int, seed: int = 3) -> list[np.ndarray]:
    return [
        pipe(**CALL, generator=torch.Generator().manual_seed(seed + i)).images
        for i in range(requests)
    ]


class Clock:
    """A clock that a module moves on whenever it is called."""

    def __init__(self, module: torch.nn.Module, seconds: float = 1.0) -> None:
        self.now = 0.0
        self.seconds = seconds
        module.register_forward_hook(self._passes)

    def _passes(self, *called: Any) -> None:
        self.now += self.seconds

    def __call__(self) -> float:
        return self.now


def test_a_healthy_service_passes_two_rotations(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[Result] = []
    with often(pipe, reference, on_result=results.append) as watch:
        served(pipe, 2 * CALLS)
    assert [r.outcome for r in results] == ["passed"] * 2 * CALLS, results
    assert watch.counts["passed"] == watch.counts["requests"] == 2 * CALLS
    assert len(watch.last) == CALLS
    assert {r.component for r in results} == {
        "text_encoder", "text_encoder_2", "transformer", "vae",
    }  # fmt: skip
    assert [r.place for r in results[:CALLS]] == [r.place for r in results[CALLS:]]
    assert all(r.comparison is not None and r.comparison.rows for r in results)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def linears(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]


def weight_off(pipe: Any) -> None:
    linears(pipe.transformer)[5].weight.data[0].mul_(1.05)


def encoder_off(pipe: Any) -> None:
    next(pipe.text_encoder.parameters()).data.mul_(1.001)


def decoder_off(pipe: Any) -> None:
    pipe.vae.decoder.conv_out.bias.data.add_(0.01)


def not_a_number(pipe: Any) -> None:
    linears(pipe.transformer)[2].bias.data[0] = float("nan")


FAULTS = {
    "transformer": weight_off,
    "text_encoder": encoder_off,
    "vae": decoder_off,
    "transformer ": not_a_number,
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_damaged_weight_is_found_within_one_rotation(
    name: str, pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with often(pipe, reference) as watch:
        served(pipe, CALLS)
        assert watch.counts["left"] == 0
        FAULTS[name](pipe)
        with torch.no_grad():
            served(pipe, CALLS)
    left = {r.component for r in watch.last.values() if r.outcome == "left"}
    assert left == {name.strip()}
    assert watch.counts["passed"] + watch.counts["left"] == 2 * CALLS
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == watch.counts["left"]
    assert all(name.strip() in text and "left the noise floor" in text for text in told)


def summed_otherwise(pipe: Any) -> None:
    """Linear layers that add up in another order, as another kernel does."""
    for layer in linears(pipe.transformer):

        def forward(x: torch.Tensor, layer: torch.nn.Linear = layer) -> torch.Tensor:
            half = x.shape[-1] // 2
            first = x[..., :half] @ layer.weight[:, :half].T
            return first + x[..., half:] @ layer.weight[:, half:].T + layer.bias

        layer.forward = forward


def one_ulp(pipe: Any) -> None:
    def noisy(module: Any, given: Any, output: Any) -> Any:
        return (torch.nextafter(output[0], torch.full_like(output[0], torch.inf)), *output[1:])

    pipe.transformer.register_forward_hook(noisy)


@pytest.mark.parametrize("change", [summed_otherwise, one_ulp])
def test_a_benign_twin_passes(
    change: Callable[[Any], None], pipe: Any, reference: Recording
) -> None:
    change(pipe)
    with often(pipe, reference) as watch:
        served(pipe, CALLS)
    assert watch.counts["passed"] == CALLS
    given = [r for r in watch.last.values() if r.component == "transformer"]
    assert any(r.ratio for r in given)  # it was seen, and is within the floor


def test_what_is_wrong_is_said_once_and_again_when_it_changes(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "truestep.watch")
    bias = pipe.vae.decoder.conv_out.bias.data
    kept = bias.clone()
    with often(pipe, reference) as watch:
        for change in (lambda: bias.add_(0.01), lambda: bias.fill_(torch.nan), None):
            bias.copy_(kept)
            if change is not None:
                change()
            for _ in range(2 * CALLS):
                watch.check_now()
    texts = [r.getMessage() for r in caplog.records if r.name == "truestep.watch"]
    assert [r.levelname for r in caplog.records if r.name == "truestep.watch"] == [
        "WARNING", "WARNING", "INFO",
    ]  # fmt: skip
    assert all(text.startswith("vae.decode ") for text in texts)
    assert texts[-1] == "vae.decode is within the noise floor again"


def test_the_share_is_kept(pipe: Any, reference: Recording) -> None:
    clock = Clock(pipe.transformer)
    with truestep.watch(pipe, reference, every=1, share=0.1, clock=clock) as watch:
        for _ in range(40):
            served(pipe, 1)
            assert watch.seconds <= 0.1 * clock.now
    counts = watch.counts
    assert counts["requests"] == 40
    assert counts["skipped"] > 0
    assert counts["passed"] >= CALLS
    assert counts["passed"] + counts["skipped"] == 40
    assert watch.seconds >= 3


def test_a_share_of_all_the_time_skips_nothing(pipe: Any, reference: Recording) -> None:
    with often(pipe, reference, clock=Clock(pipe.transformer)) as watch:
        served(pipe, 3)
    assert (watch.counts["passed"], watch.counts["skipped"]) == (3, 0)


def test_a_check_comes_after_every_so_many_requests(pipe: Any, reference: Recording) -> None:
    with often(pipe, reference, every=3) as watch:
        counted = [served(pipe, 1) and watch.counts["passed"] for _ in range(7)]
    assert counted == [0, 0, 1, 1, 1, 2, 2]


def test_one_hundredth_of_the_time_is_enough_for_a_call_in_a_hundred_requests(
    pipe: Any, reference: Recording
) -> None:
    """The first check is not skipped: a call costs no more than the request that it is of."""
    clock = Clock(pipe.transformer)
    watch = Watch(pipe, *_default(reference, clock))
    watch.stop()
    for _ in range(300):
        clock.now += 3.0
        watch._served(None, 3.0)
    assert (watch.counts["passed"], watch.counts["skipped"]) == (3, 0)


def _default(reference: Recording, clock: Clock) -> tuple[Any, Any]:
    return opened(reference), Pace(100, 0.01, clock)


def test_no_request_of_two_threads_runs_at_once_with_a_check(
    pipe: Any, reference: Recording
) -> None:
    running: set[str] = set()
    seen: list[set[str]] = []
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.register_forward_hook(lambda *given: seen.append(set(running)))

    def request() -> None:
        name = threading.current_thread().name
        running.add(name)
        time.sleep(0.002)
        running.discard(name)

    with often(pipe, reference) as watch:

        def serve() -> None:
            for _ in range(30):
                watch.arrive(pipe, "forward", request, (), {})

        threads = [threading.Thread(target=serve) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.arrive(pipe, "forward", request, (), {})  # alone
    counts = watch.counts
    assert counts["requests"] == 61
    assert seen
    assert not any(seen)
    assert counts["error"] == counts["left"] == 0
    assert counts["passed"] > 0


def test_requests_wait_for_a_check_and_a_check_for_no_request() -> None:
    requests = Requests()
    order: list[str] = []

    def other() -> None:
        with requests.one():
            order.append("request")

    with requests.between() as free:
        assert free
        assert requests.inside
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        order.append("check")
    thread.join()
    assert order == ["check", "request"]
    with requests.one(), requests.between() as free:
        assert not free
    with requests.between() as free:
        assert free


def test_nothing_is_checked_while_another_request_runs_and_that_is_said(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with often(pipe, reference, every=2) as watch:
        with watch._requests.one():
            watch._requests._mine.inside = False  # the other one is of another thread
            for _ in range(6):
                watch.arrive(pipe, "forward", int, (), {})
        assert (watch.counts["put_off"], watch.counts["passed"]) == (5, 0)
        watch.arrive(pipe, "forward", int, (), {})
        assert watch.counts["passed"] == 1
    assert [r.getMessage() for r in caplog.records] == [
        "other requests ran at the end of each one: nothing is checked"
    ]


def test_a_run_that_is_recorded_meanwhile_is_told_of_no_check(
    pipe: Any, reference: Recording
) -> None:
    with often(pipe, reference) as watch:
        result = truestep.check(pipe, reference)
        assert result.verdict.passed, result.sentence
        assert watch.counts["passed"] == watch.counts["error"] == 0
        assert watch.counts["put_off"] == watch.counts["requests"] > 0
        served(pipe, 1)
        assert watch.counts["passed"] == 1


def test_stop_gives_the_class_back(pipe: Any, reference: Recording) -> None:
    original = type(pipe)
    signature = inspect.signature(pipe.__call__)
    watch = often(pipe, reference)
    assert isinstance(pipe, original)
    assert type(pipe) is not original
    assert inspect.signature(pipe.__call__) == signature
    with pytest.raises(UsageError, match="FluxPipeline is being watched already"):
        often(pipe, reference)
    served(pipe, 1)
    watch.stop()
    watch.stop()
    assert type(pipe) is original
    served(pipe, 1)
    assert watch.counts["requests"] == 1
    with often(pipe, reference) as again:
        served(pipe, 1)
    assert again.counts["passed"] == 1


def _states(pipe: Any) -> dict[str, Any]:
    modules = {
        f"{name} {inside}": (module.training, len(module._forward_hooks))
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for inside, module in part.named_modules()
    }
    numpys = np.random.get_state()
    return {
        **modules,
        "weights": {
            f"{name} {key}": value.clone().numpy().tobytes()
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
            for key, value in part.state_dict().items()
        },
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": (numpys[1].tobytes(), numpys[2:]),
        "scheduler": dict(pipe.scheduler.config),
    }


def _draws(*called: Any) -> None:
    """A model that uses up random numbers of the process."""
    torch.rand(1), np.random.rand(), random.random()


def _free(watched: bool, reference: Recording) -> tuple[list[bytes], dict[str, Any]]:
    """What a service without seeds of its own answers, and what it is like afterwards."""
    pipe = TINY["flux"].build()
    pipe.transformer.register_forward_hook(_draws)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    watch = often(pipe, reference) if watched else None
    images = [pipe(**CALL).images.tobytes() for _ in range(CALLS)]
    if watch is not None:
        assert watch.counts["passed"] == CALLS
        watch.stop()
    return images, _states(pipe)


def test_the_service_answers_bit_for_bit_as_without_a_watch(reference: Recording) -> None:
    assert _free(True, reference) == _free(False, reference)


def test_a_result_in_a_buffer_of_the_pipeline_is_not_filled_anew(
    pipe: Any, reference: Recording
) -> None:
    decode = pipe.vae.decode
    buffer: list[torch.Tensor] = []

    def buffered(z: torch.Tensor, return_dict: bool = True) -> Any:
        value = decode(z, return_dict=False)[0]
        if not buffer:
            buffer.append(torch.empty_like(value))
        return (buffer[0].copy_(value),)

    pipe.vae.decode = buffered
    raw = {**CALL, "output_type": "pt"}
    pipe.image_processor.postprocess = lambda image, **options: image
    with often(pipe, reference) as watch:
        watch._rotation = [c for c in watch._rotation if c.component == "vae"]
        image = pipe(**raw, generator=torch.Generator().manual_seed(8)).images
        kept = image.clone()
        assert watch.counts["passed"] == 1
        assert image.data_ptr() == buffer[0].data_ptr()
        assert image.equal(kept)
        watch.check_now()
        assert not image.equal(kept)  # what was handed out is not ours later


def test_an_exception_in_a_check_never_reaches_the_request(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(result: Result) -> None:
        raise RuntimeError("the callback broke")

    with often(pipe, reference, on_result=broken) as watch:
        assert len(served(pipe, 3)) == 3
        watch._alone.make = _raises  # type: ignore[method-assign]
        assert len(served(pipe, CALLS)) == CALLS
    counts = watch.counts
    assert (counts["passed"], counts["error"]) == (3, 3 + 2 * CALLS)
    texts = [r.getMessage() for r in caplog.records]
    assert texts[0] == "a check failed (on_result): RuntimeError: the callback broke"
    assert len(texts) == 1 + CALLS  # one of each call
    assert all("ZeroDivisionError: division" in text for text in texts[1:])
    assert {r.outcome for r in watch.last.values()} == {"error"}


def _raises(*given: Any) -> Any:
    raise ZeroDivisionError("division")


def test_a_request_that_raises_is_as_it_was(pipe: Any, reference: Recording) -> None:
    with often(pipe, reference) as watch:
        with pytest.raises(ValueError, match="Provide either `prompt`"):
            pipe(**{**CALL, "prompt": None})
        assert watch.counts["requests"] == 0
        served(pipe, 1)
    assert watch.counts["passed"] == 1


@pytest.mark.filterwarnings("ignore:There are modules")
def test_what_has_changed_since_the_start_is_a_finding(pipe: Any, reference: Recording) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    with often(pipe, reference) as watch:
        _rotate(watch)
        assert watch.counts["left"] == 0
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"]), "style")
        _rotate(watch)
        assert _left(watch) == {
            "transformer": "changed since the watch began: adapters was none, is style (active)"
        }
        pipe.vae.to(torch.bfloat16)
        pipe.text_encoder.train()
        _rotate(watch)
        left = _left(watch)
    assert set(left) == {"transformer", "vae", "text_encoder"}
    assert "dtype was float32, is bfloat16" in left["vae"]
    assert all(r.comparison is not None for r in watch.last.values() if r.component == "vae")
    assert left["text_encoder"] == "changed since the watch began: training was off, is on"


def _rotate(watch: Watch) -> None:
    for _ in range(CALLS):
        watch.check_now()


def _left(watch: Watch) -> dict[str, str]:
    return {r.component: r.said for r in watch.last.values() if r.outcome == "left"}


def test_a_component_that_is_gone_is_a_finding(pipe: Any, reference: Recording) -> None:
    with often(pipe, reference) as watch:
        pipe.text_encoder_2 = None
        _rotate(watch)
    assert _left(watch) == {
        "text_encoder_2": "changed since the watch began: component is not there any more"
    }


def test_a_cache_between_steps_is_not_watched_and_its_arrival_is_a_finding(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import FirstBlockCacheConfig

    caplog.set_level(logging.INFO, "truestep.watch")
    with often(pipe, reference) as watch:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        _rotate(watch)
        assert _left(watch) == {
            "transformer": "changed since the watch began: cache was off, is on"
        }
    caplog.clear()
    with often(pipe, reference) as watch:
        served(pipe, CALLS)
    assert watch.counts["not_replayable"] == 3
    assert watch.counts["passed"] == CALLS
    assert [r.getMessage() for r in caplog.records] == [
        "3 of 6 recorded calls cannot be made on their own, and are not checked"
    ]


def test_a_call_that_cannot_be_built_is_left_out_once(
    pipe: Any, reference: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with often(pipe, reference) as watch:
        make = watch._alone.make

        def some(owner: Any, call: Any) -> Any:
            if call.component == "vae":
                raise CannotBuildError("a thing was not kept")
            return make(owner, call)

        watch._alone.make = some  # type: ignore[method-assign]
        served(pipe, 2 * CALLS)
    assert watch.counts["not_replayable"] == 1
    assert watch.counts["passed"] == 2 * CALLS
    assert [r.getMessage() for r in caplog.records] == [
        "vae.decode cannot be made on its own: a thing was not kept"
    ]


def test_a_port_with_other_names_of_parameters_is_called(pipe: Any, reference: Recording) -> None:
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, as_dict=True: decode(latents, as_dict)
    with often(pipe, reference) as watch:
        _rotate(watch)
    assert watch.counts["passed"] == CALLS


def test_other_pipelines_are_watched(tiny: Tiny) -> None:
    pipe = tiny.build()
    reference = truestep.record(pipe, call=tiny.call, keep="all")
    with often(pipe, reference) as watch:
        for _ in range(len(watch._rotation)):
            assert watch.check_now().outcome == "passed"
        assert watch.counts["not_replayable"] == 0
        for module in (pipe.text_encoder, pipe.vae):
            next(p for p in module.parameters() if p.ndim > 1).data.mul_(1.01)
        for _ in range(len(watch._rotation)):
            watch.check_now()
    assert set(_left(watch)) >= {"text_encoder"}


def test_options_that_mean_nothing_are_refused(pipe: Any, reference: Recording) -> None:
    with pytest.raises(UsageError, match="every = 0 is no number of requests"):
        truestep.watch(pipe, reference, every=0)
    with pytest.raises(UsageError, match="share = 0 is no part of the time"):
        truestep.watch(pipe, reference, share=0)
    with pytest.raises(UsageError, match="Linear cannot be watched"):
        truestep.watch(torch.nn.Linear(2, 2), reference)
    other = TINY["sd"].build()
    other.text_encoder = other.vae = None
    with pytest.raises(UsageError, match="no call of the reference can be made on its own"):
        truestep.watch(other, reference)


def test_check_now_inside_a_request_is_refused(pipe: Any, reference: Recording) -> None:
    with often(pipe, reference) as watch, pytest.raises(UsageError, match="inside a request"):
        pipe(**CALL, callback_on_step_end=lambda *given: watch.check_now())


def test_prometheus_reads_what_was_counted(pipe: Any, reference: Recording) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    with often(pipe, reference) as watch:
        collector = prometheus(watch, registry)
        decoder_off(pipe)
        served(pipe, CALLS)

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"truestep_watch_{name}", labels)

    assert value("requests_total") == CALLS
    assert value("checks_total", outcome="passed") == CALLS - 1
    assert value("checks_total", outcome="left") == 1
    assert value("seconds_total") == watch.seconds > 0
    assert value("passed", call="vae.decode") == 0
    assert value("floor_ratio", call="vae.decode") > 1
    assert value("passed", call="transformer.forward (cond) at step 0") == 1
    assert b"truestep_watch_floor_ratio{" in client.generate_latest(registry)
    registry.unregister(collector)


def test_opentelemetry_reads_what_was_counted(pipe: Any, reference: Recording) -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    with often(pipe, reference) as watch:
        opentelemetry(watch, MeterProvider([reader]).get_meter("truestep"))
        served(pipe, CALLS)
    data = reader.get_metrics_data()
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    points = {metric.name: metric.data.data_points for metric in metrics}
    outcomes = {p.attributes["outcome"]: p.value for p in points["truestep_watch_checks"]}
    assert (outcomes["passed"], outcomes["left"]) == (CALLS, 0)
    assert len(points["truestep_watch_passed"]) == CALLS


@pytest.mark.parametrize(
    ("adapter", "module", "extra"),
    [(prometheus, "prometheus_client", "prometheus"),
     (opentelemetry, "opentelemetry.metrics", "opentelemetry")],
)  # fmt: skip
def test_a_library_that_is_missing_is_named_with_how_to_install_it(
    adapter: Any, module: str, extra: str, pipe: Any, reference: Recording,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, None)
    with often(pipe, reference) as watch, pytest.raises(MissingExtraError) as raised:
        adapter(watch, None)
    assert raised.value.hint == f"pip install 'truestep[{extra}]'"


def test_the_page_about_servers_shows_what_its_service_prints(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    (service,) = re.findall(r"```python\n(# service\.py\n.*?)```", page, re.S)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.S)
    tiny_pipelines.save("FluxPipeline", tmp_path / "flux")
    (tmp_path / "service.py").write_text(service)
    source = str(Path(truestep.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "service.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**with_python(), "PYTHONPATH": source},
    )  # fmt: skip
    assert done.stdout == printed
