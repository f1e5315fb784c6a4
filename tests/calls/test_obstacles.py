"""What pipelines, libraries and users do that has made calls vanish, or right candidates fail.

Each is recorded, written, and replayed on a pipeline built anew: answered, and made, bit for bit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from bench.bench_coverage import differences
from tests.calls import loops
from tests.calls.loops import Copying, Loop, Scheduler, replayed, through_a_file
from truestep.calls.boundaries import watching
from truestep.calls.check import check
from truestep.calls.record import record
from truestep.calls.recorder import Recorder, recorded
from truestep.calls.subject import Subject, subject_of
from truestep.errors import UsageError
from truestep.recording.manifest import CallEntry
from truestep.verdict import Verdict

Build = Callable[[], Any]


def unpatched(subject: Subject) -> bool:
    """Whether every object has the class that it was made with."""
    parts = [*subject.components.values()]
    for part in list(parts):
        parts += [*part.modules()] if isinstance(part, torch.nn.Module) else []
    return not any(hasattr(type(type(part)), "_original") for part in parts) and not any(
        type(type(part)).__name__ == "Equal" for part in parts
    )


def holds(build: Build, tmp_path: Path) -> list[str]:
    """Record, write, read, replay both ways on fresh pipelines; what differed."""
    subject = subject_of(build())
    plain = subject_of(build()).run()
    reference = through_a_file(subject, tmp_path)
    wrong = []
    for made in (False, True):
        candidate = subject_of(build())
        wrong += differences(replayed(candidate, reference, made=made), reference)
        assert unpatched(candidate)
    assert unpatched(subject)
    (run,) = reference.by_method["run", "run"]
    assert torch.equal(reference.recording[run.output["tensor"]], plain)
    return wrong


class TwoNamed(Loop):
    def prepared(self, scheduler: Any) -> Any:
        assert type(scheduler) == Scheduler  # noqa: E721 - as pipelines test it
        assert not type(scheduler) != Scheduler  # noqa: E721, SIM202
        assert isinstance(scheduler, Scheduler)
        assert {Scheduler: 1}[type(scheduler)] == 1
        assert type(scheduler).__name__ == "Scheduler"
        return scheduler


def ancestral() -> Loop:
    return Loop(Scheduler(noise=0.1))


def ancestral_copied() -> Loop:
    return Copying(Scheduler(noise=0.1))


class Submodule(Loop):
    """The pipeline calls parts of a component, not the component."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.net.out(torch.tanh(self.net.inner(x))) * (1 + t / 1000) + text.mean(1)


class Forward(Loop):
    """The pipeline calls `forward`, past hooks."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.net.forward(x, t, text=text)[0]


class InPlace(Loop):
    """A step writes into the sample that it is given, and keeps a view of it."""

    def prepared(self, scheduler: Any) -> Any:
        scheduler.kept = []
        return scheduler

    def __init__(self) -> None:
        class Writing(Scheduler):
            def step(self, velocity: Any, t: Any, sample: Any, generator: Any = None) -> Any:
                if self.kept:
                    velocity = velocity + 0.1 * self.kept[-1]
                self.kept.append(velocity[:, :])
                sample += (self.sigmas[1] - self.sigmas[0]) * velocity
                return (sample,)

        super().__init__(Writing())


class Cached(Loop):
    """A model keeps what it has seen in a list and a dict of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        inner = type(self.net).forward

        def forward(net: Any, x: Any, t: Any, text: Any, *, options: Any = None) -> Any:
            cache, table = options["cache"], options["table"]
            past = sum(cache) if cache else torch.zeros(())
            cache.append(x.mean() * 0.1)
            table["last"] = x * 2
            table["calls"] = table.get("calls", 0) + 1
            return (inner(net, x + past, t, text)[0],)

        self.net.__class__ = type("CachedNet", (type(self.net),), {"forward": forward})

    def __call__(self, generator: Any = None) -> Any:
        self.cache: list[Any] = []
        self.table: dict[str, Any] = {}
        return super().__call__(generator)

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        options = {"cache": self.cache, "table": self.table}
        output = self.net(x, t, text=text, options=options)[0]
        return output + self.table["last"].mean() + len(self.cache)


class Keys:
    """A cache as an object, which nobody can keep by its fields."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []


class KeyCache(Cached):
    def __init__(self) -> None:
        Loop.__init__(self)
        inner = type(self.net).forward

        def forward(net: Any, x: Any, t: Any, text: Any, *, options: Any = None) -> Any:
            past = sum(options.seen) if options.seen else 0
            options.seen.append(0.1 * x)
            return (inner(net, x + past, t, text)[0],)

        self.net.__class__ = type("CachedNet", (type(self.net),), {"forward": forward})

    def __call__(self, generator: Any = None) -> Any:
        self.keys = Keys()
        return Loop.__call__(self, generator)

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.net(x, t, text=text, options=self.keys)[0]


class Proxy:
    """Hands on everything to what it holds."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


class CallableProxy(Proxy):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def proxied() -> Loop:
    pipeline = Loop()
    pipeline.scheduler = Proxy(pipeline.scheduler)
    pipeline.net = CallableProxy(pipeline.net)  # type: ignore[assignment]
    return pipeline


def offloaded() -> Loop:
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Scaled(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return tuple(args), kwargs

    pipeline = Loop()
    add_hook_to_module(pipeline.net, Scaled())
    cpu_offload(pipeline.encoder, execution_device="cpu")
    return pipeline


def opaque_output() -> Loop:
    pipeline = Loop()
    inner = type(pipeline.net).forward

    def forward(net: Any, *args: Any, **kwargs: Any) -> Any:
        return (inner(net, *args, **kwargs)[0], lambda x: x)

    pipeline.net.__class__ = type("Opaque", (type(pipeline.net),), {"forward": forward})
    return pipeline


def drawing_model() -> Loop:
    """A model draws random numbers of its own, from the generator that all share."""
    pipeline = Loop(Scheduler(noise=0.1))
    inner = type(pipeline.net).forward

    def forward(net: Any, x: Any, t: Any, text: Any, *, options: Any = None) -> Any:
        return (inner(net, x, t, text)[0] + 0.1 * torch.randn(1),)

    pipeline.net.__class__ = type("Drawing", (type(pipeline.net),), {"forward": forward})
    return pipeline


def complex_rotation() -> Loop:
    """A model is given complex numbers, as rotary embeddings are, and gives some."""
    pipeline = Loop()
    inner = type(pipeline.net).forward

    def forward(net: Any, x: Any, t: Any, text: Any, *, options: Any = None) -> Any:
        turned = torch.view_as_real(torch.view_as_complex(x.reshape(1, 3, 2)) * options)
        return (inner(net, turned.reshape(1, 6), t, text)[0], options * 2)

    def predict(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        turn = torch.polar(torch.ones(3), torch.arange(3.0) * 0.1)
        output, doubled = pipeline.net(x, t, text=text, options=turn)
        return output * doubled.abs().mean()

    pipeline.net.__class__ = type("Turning", (type(pipeline.net),), {"forward": forward})
    pipeline.predict = predict  # type: ignore[method-assign]
    return pipeline


class Unseeded(Loop):
    """Noise without a generator, and made in place."""

    def __call__(self, generator: Any = None) -> Any:
        x = super().__call__(None)
        return x + 0.1 * torch.empty(1, 4).normal_() + torch.rand_like(x)


BUILDS: list[Build] = [
    Loop,
    Copying,
    TwoNamed,
    ancestral,
    ancestral_copied,
    Submodule,
    Forward,
    InPlace,
    Cached,
    KeyCache,
    proxied,
    offloaded,
    opaque_output,
    drawing_model,
    complex_rotation,
    Unseeded,
]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_replays_bit_for_bit(build: Build, tmp_path: Path) -> None:
    assert holds(build, tmp_path) == []


def test_a_copied_scheduler_is_still_the_scheduler() -> None:
    recording = recorded(subject_of(Copying()))
    assert len(recording.by_method["scheduler~1", "step"]) == 4
    assert recording.steps == 4


def test_a_called_submodule_is_a_component_of_its_own() -> None:
    components = {call.component for call in recorded(subject_of(Submodule())).calls}
    assert components >= {"net.inner", "net.out"}
    assert "net" not in components


def test_what_is_drawn_inside_a_step_is_forced() -> None:
    reference = recorded(subject_of(ancestral()))
    assert len(reference.by_method["random", "randn"]) == 5
    steps = [call.step for call in reference.by_method["random", "randn"]]
    assert steps == [None, 0, 1, 2, 3]


PATCHES: dict[str, Callable[[Loop], Any]] = {
    "scheduler.step": lambda p: p.scheduler,
    "scheduler.set_timesteps": lambda p: p.scheduler,
    "decoder.decode": lambda p: p.decoder,
    "net.forward": lambda p: p.net,
    "encoder.forward": lambda p: p.encoder,
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_a_user_puts_on_an_instance_is_inside_its_boundary(name: str, tmp_path: Path) -> None:
    method = name.partition(".")[2]

    def patched(change: Callable[[Any], Any]) -> Any:
        pipeline = Loop()
        owner = PATCHES[name](pipeline)
        original = getattr(owner, method)
        setattr(owner, method, lambda *args, **kwargs: change(original(*args, **kwargs)))
        return pipeline

    def scaled(output: Any) -> Any:
        if isinstance(output, dict):
            return {key: value * 1.001 for key, value in output.items()}
        return (output[0] * 1.001,) if isinstance(output, tuple) else output * 1.001

    assert holds(lambda: patched(lambda output: output), tmp_path) == []
    reference = record(subject_of(Loop()))
    assert check(subject_of(patched(lambda output: output)), reference).verdict.passed
    if method != "set_timesteps":
        result = check(subject_of(patched(scaled)), reference)
        assert result.sentence.startswith(f"drifted: {name}"), result.sentence


def test_a_replaced_call_of_the_class_is_inside_its_boundary() -> None:
    reference = record(subject_of(Loop()))
    pipeline = Loop()

    class Other(type(pipeline.net)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (super().__call__(*args, **kwargs)[0] * 1.001,)

    pipeline.net.__class__ = Other
    result = check(subject_of(pipeline), reference)
    assert result.sentence.startswith("drifted: net.forward (cond) at step 0: output 0")


def test_an_adapter_around_a_component_is_inside_its_boundary() -> None:
    """As peft wraps what it adapts; only the adapted component differs."""
    reference = record(subject_of(Loop()))

    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module, size: float) -> None:
            super().__init__()
            self.base = base
            self.low = torch.nn.Parameter(torch.ones(6, 1))
            self.size = size

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (self.base(*args, **kwargs)[0] + self.size * self.low[:, 0],)

    for size in (0.0, 1e-3):
        pipeline = Loop()
        pipeline.net = Adapter(pipeline.net, size)  # type: ignore[assignment]
        result = check(subject_of(pipeline), reference)
        if not size:
            assert result.verdict.passed, result.sentence
        else:
            failing = {row.fqn for row in result.failing}
            assert failing == {"net.forward"}


def test_a_step_that_never_comes_is_a_failure() -> None:
    reference = record(subject_of(Loop()))

    class Unwatched(Loop):
        @property
        def components(self) -> dict[str, Any]:
            return {k: v for k, v in super().components.items() if k != "scheduler"}

    result = check(subject_of(Unwatched()), reference)
    assert not result.verdict.passed
    assert any("scheduler/step" in name for name in result.missing)


class Lazy(torch.nn.Module):
    """Answers every other call from what it kept: right only when nothing is left out."""

    def __init__(self, net: torch.nn.Module, *, broken: bool = False) -> None:
        super().__init__()
        self.net, self.calls, self.broken = net, 0, broken
        self.kept: Any = None

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> Any:
        if float(t) == 1000.0 and not self.broken:
            self.calls = 0
        self.calls += 1
        if self.calls % 4 in (1, 2) or self.kept is None:
            self.kept = self.net(x, t, text)
        return self.kept


class LazyLoop(Loop):
    """Guidance as one batch, so that one call is one step; a cache in the denoiser."""

    def __init__(self, *, broken: bool = False, said: bool = False) -> None:
        super().__init__()
        self.net = Lazy(self.net, broken=broken)  # type: ignore[assignment]
        if said:
            self.net._cache_config = object()  # type: ignore[assignment]
        self.steps = 9


@pytest.mark.parametrize("said", [True, False])
def test_a_model_that_keeps_something_is_run_at_every_step(said: bool) -> None:
    reference = record(subject_of(LazyLoop(said=said)), floor=False)
    result = check(subject_of(LazyLoop(said=said)), reference, steps=[0, 4, 8])
    assert result.verdict is Verdict.IDENTICAL, result.sentence
    assert "net keeps something between calls: run at every step" in result.notes


def test_a_model_whose_insides_are_looked_at_is_run_at_every_step() -> None:
    class Looking(Loop):
        """Keeps an activation by a hook, and uses it in the code between."""

        def __call__(self, generator: Any = None) -> Any:
            self.kept: list[torch.Tensor] = []
            hook = self.net.inner.register_forward_hook(lambda m, i, o: self.kept.append(o))
            try:
                return super().__call__(generator)
            finally:
                hook.remove()

        def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            output = super().predict(x, t, text)
            return output + 0.1 * self.kept[-1]

    pipeline = Looking()
    pipeline.steps = 9
    reference = record(subject_of(pipeline), floor=False)
    (note,) = reference.recording.manifest.notes
    assert note == "net: run at every step, for what it does beside what it returns"
    candidate = Looking()
    candidate.steps = 9
    result = check(subject_of(candidate), reference, steps=[4])
    assert result.verdict is Verdict.IDENTICAL, result.sentence


def test_a_cache_that_is_not_reset_is_seen() -> None:
    reference = record(subject_of(LazyLoop()), floor=False)
    candidate = subject_of(LazyLoop(broken=True))
    candidate.run()
    candidate.components["net"].calls += 1
    result = check(candidate, reference, steps=[0, 4, 8])
    assert result.verdict is Verdict.DRIFTED


def test_a_compiled_model_is_not_compiled_anew(tmp_path: Path) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    def build(compiled: bool = True) -> Any:
        pipeline = Loop()
        if compiled:
            pipeline.net.compile(backend="eager")
            pipeline.decoder = torch.compile(pipeline.decoder, backend="eager")  # type: ignore[assignment]
        return pipeline

    torch._dynamo.reset()
    counters.clear()
    subject = subject_of(build())
    subject.run()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    reference = recorded(subject)
    assert differences(replayed(subject, reference, made=True), reference) == []
    assert counters["stats"]["unique_graphs"] == graphs
    assert {call.component for call in reference.calls} >= {"net", "decoder"}
    against = record(subject_of(build(compiled=False)))
    assert check(subject, against).verdict.passed
    assert counters["stats"]["unique_graphs"] == graphs


def without_states(call: CallEntry) -> CallEntry:
    """A call without what others did to the generator that a process shares."""
    return replace(call, random=())


def test_recordings_beside_one_another_equal_those_alone() -> None:
    alone = recorded(subject_of(ancestral()))
    expected = [without_states(call) for call in alone.calls]
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                results.append(recorded(subject_of(Loop(Scheduler(noise=0.1)))))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(results) == 12
    for recording in results:
        assert [without_states(call) for call in recording.calls] == expected


def test_a_component_is_watched_by_one_at_a_time() -> None:
    pipeline = Loop()
    subject = subject_of(pipeline)
    with watching(subject, Recorder()):
        with pytest.raises(UsageError, match="is being recorded or checked already"):
            recorded(subject_of(pipeline))
        recorder = Recorder()
        with watching(subject_of(Loop()), recorder):
            pass
    assert unpatched(subject)
    recorded(subject)


def test_calls_from_other_threads_go_past() -> None:
    pipeline = Loop()
    recorder = Recorder()
    with watching(subject_of(pipeline), recorder) as watch:
        thread = threading.Thread(target=lambda: pipeline.decoder(torch.zeros(1, 6)))
        thread.start()
        thread.join()
    assert recorder.calls == []
    assert watch.elsewhere["Decoder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_patched_whatever_is_raised(error: type[BaseException]) -> None:
    pipeline = Loop()

    def hook(*args: Any) -> None:
        raise error("stop")

    handle = pipeline.net.inner.register_forward_hook(hook)
    subject = subject_of(pipeline)
    with pytest.raises(error):
        recorded(subject)
    assert unpatched(subject)
    handle.remove()
    reference = recorded(subject)  # nothing is still taken
    handle = pipeline.net.inner.register_forward_hook(hook)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            replayed(subject, reference, made=True)
    else:
        assert "stop" in replayed(subject, reference, made=True).raised
    assert unpatched(subject)


def test_copies_made_in_a_run_have_their_class_back() -> None:
    copies: list[Any] = []

    class Keeping(Copying):
        def prepared(self, scheduler: Any) -> Any:
            copies.append(super().prepared(scheduler))
            copies.append(super().prepared(scheduler))
            return copies[-1]

    recorded(subject_of(Keeping()))
    assert [type(part) is Scheduler for part in copies] == [True] * len(copies)


class Engine:
    """No pipeline: a plain loop with functions that it names."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.decoder = loops.Net(), loops.Decoder()

    def schedule(self, steps: int) -> torch.Tensor:
        return torch.linspace(1, 0, steps + 1)

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        return uncond + 3.0 * (cond - uncond)

    def advance(self, x: torch.Tensor, v: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return x + delta * v

    def generate(self) -> torch.Tensor:
        sigmas = self.schedule(3)
        x = torch.randn(1, 6)
        for now, then in itertools.pairwise(sigmas):
            texts = (torch.ones(1, 1, 6), torch.zeros(1, 1, 6))
            cond, uncond = (self.net(x, now * 1000, text)[0] for text in texts)
            x = self.advance(x, self.guide(cond, uncond), then - now)
        return self.decoder(x)

    def subject(self) -> Subject:
        names = {"schedule": "schedule", "guidance": "guide", "step": "advance"}
        return subject_of(
            self.generate,
            components={"net": self.net, "decoder": self.decoder},
            functions={name: (self, attribute) for name, attribute in names.items()},
        )


def test_an_engine_is_cut_at_the_functions_that_it_names() -> None:
    reference = record(Engine().subject())
    stages = [call.stage for call in reference.calls[:6]]
    assert stages == ["schedule", "latent", *["prediction"] * 2, "guidance", "update"]
    assert check(Engine().subject(), reference).verdict is Verdict.IDENTICAL
    faults: dict[str, Callable[[Any], Any]] = {
        "schedule: output": lambda e: setattr(e, "schedule", lambda n: torch.linspace(1.1, 0, 4)),
        "guidance at step 0: output": lambda e: setattr(
            e, "guide", lambda c, u: u + 3.03 * (c - u)
        ),
        "step at step 0: output": lambda e: setattr(e, "advance", lambda x, v, d: x + 1.01 * d * v),
        "net.forward at step 0: output 0": lambda e: e.net.out.bias.data.add_(0.01),
        "decoder.forward: output": lambda e: e.decoder.linear.bias.data.add_(0.01),
    }
    for place, fault in faults.items():
        engine = Engine()
        fault(engine)
        result = check(engine.subject(), reference)
        assert result.sentence.startswith(f"drifted: {place}"), result.sentence


def answering(change: Callable[[torch.Tensor], Any], of: type[Loop] = Loop) -> Loop:
    """A pipeline whose net answers with what something makes of its answer."""
    pipeline = of()
    inner = type(pipeline.net).forward

    def forward(net: Any, *args: Any, **kwargs: Any) -> Any:
        return (change(inner(net, *args, **kwargs)[0].detach()),)

    pipeline.net.__class__ = type("Answering", (type(pipeline.net),), {"forward": forward})
    return pipeline


class Alone(Loop):
    """One pass a step: nothing is kept beside the answer."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().predict(x, t, text)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("pipeline", "harmless"), [(Alone, True), (Loop, False)])
def test_an_answer_in_one_buffer_is_a_fault_where_two_are_held(
    pipeline: type[Loop], harmless: bool, inference: bool
) -> None:
    """What a check calls once more overwrites nothing that the candidate reads."""
    buffers: dict[torch.Size, torch.Tensor] = {}

    def in_one_buffer(made: torch.Tensor) -> torch.Tensor:
        """As a captured graph answers."""
        with torch.inference_mode(inference):
            return buffers.setdefault(made.shape, torch.empty_like(made)).copy_(made)

    plain = subject_of(pipeline()).run()
    assert torch.equal(subject_of(answering(in_one_buffer, pipeline)).run(), plain) is harmless
    result = check(subject_of(answering(in_one_buffer, pipeline)), record(subject_of(pipeline())))
    assert (result.verdict is Verdict.IDENTICAL) is harmless, result.sentence
    assert result.verdict.passed is harmless


class Sharded(torch.Tensor):
    """A tensor whose elements only its own class reads, as DTensor's are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Sharded:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda t: t.held if isinstance(t, cls) else t, (args, kwargs or {}))
        made = func(*plain[0], **plain[1])
        return tree_map(lambda t: cls(t) if type(t) is torch.Tensor else t, made)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_what_only_its_class_reads_passes_nothing(scale: float) -> None:
    """From the net through the scheduler to the end, nothing of it can be judged."""
    candidate = subject_of(answering(lambda made: Sharded(made * scale)))
    result = check(candidate, record(subject_of(Loop())))
    assert result.verdict in (Verdict.INCOMPARABLE, Verdict.DRIFTED)
    assert "Sharded, which is not read as numbers" in " ".join(r.note for r in result.rows)


def test_a_sparse_answer_is_judged_by_what_is_made_of_it() -> None:
    reference = record(subject_of(Loop()))
    wrong = check(subject_of(answering(lambda made: (1.5 * made).to_sparse())), reference)
    assert not wrong.verdict.passed


def test_an_end_that_cannot_be_read_is_incomparable() -> None:
    class Ending(Loop):
        def __call__(self, generator: Any = None) -> Any:
            return Sharded(super().__call__(generator))

    result = check(subject_of(Ending()), record(subject_of(Loop())))
    assert result.verdict is Verdict.INCOMPARABLE
    assert "which is not read as numbers" in result.sentence
