"""Run a declared parity case: load both sides, feed them the same inputs, keep the evidence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from truestep.environment import Environment
from truestep.errors import (
    FOREIGN,
    ComponentMissingError,
    ParityError,
    UsageError,
    one_line,
    surviving,
)
from truestep.keys import key_of
from truestep.measure.distance import same_bits
from truestep.measure.plain import plain
from truestep.nests import flatten
from truestep.parity.component import Loaded, Parity
from truestep.parity.evidence import (
    Evidence,
    Fault,
    Frames,
    MissingPart,
    SideEvidence,
    State,
    Tolerance,
    hashes,
    relevant,
    state_of,
)
from truestep.parity.frames import with_frames
from truestep.parity.locating import explained
from truestep.parity.missing import take_imported, take_ported
from truestep.parity.redaction import redact
from truestep.parity.rounding import with_rounding, with_variants, working_pair
from truestep.parity.samples import recorded_samples, samples_of
from truestep.parity.sharing import shared_files, shared_modules, source_files
from truestep.parity.sides import (
    Tensors,
    content_hash,
    hashable,
    loaded,
    module_of,
    named_places,
    state_of_side,
)
from truestep.parity.stubs import take_used
from truestep.parity.summary import numbers_of, uncovered
from truestep.recording.format import Recording
from truestep.recording.table import tensor_table
from truestep.replay.functions import check_function, record_function
from truestep.turns import taking_turns
from truestep.verdict import Comparison


@dataclass
class Run:
    """A run so far: filled as it goes on, so that one that fails still leaves evidence."""

    parity: Parity
    root: Path
    test_file: Path
    keep: Path | None = None
    official: Loaded | Recording | None = None
    port: Loaded | None = None
    comparison: Comparison | None = None
    fault: Fault | None = None
    frames: Frames | None = None
    missing: ComponentMissingError | None = None
    raised: str = ""
    outputs: dict[str, Tensors] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    classes: tuple[type, ...] = ()
    files: dict[str, frozenset[Path]] = field(default_factory=dict)

    def evidence(self) -> Evidence:
        """What this run proves; `result` is still to be told by the test runner."""
        loosened, part = self.parity.loosened, self.missing
        return Evidence(
            date=datetime.now(timezone.utc).date().isoformat(),
            missing=part
            and MissingPart(
                kind=part.kind, what=part.detail, searched=part.searched, decision=part.decision
            ),
            raised=redact(self.raised),
            numbers=None if self.comparison is None else numbers_of(self.comparison, self.parity),
            fault=self.fault,
            frames=self.frames,
            official=self._side("official", self.official),
            port=self._side("port", self.port),
            test=hashes([self.test_file], self.root, code=True),
            environment=relevant(Environment.current(None)),
            stubs=self.stubs,
            shared=self.shared,
            tolerance=loosened
            and Tolerance(
                rel_l2=loosened.rel_l2,
                reason=loosened.reason,
                owner=loosened.owner,
                expires=loosened.until.isoformat(),
            ),
            uncovered=uncovered(self.parity, self.official, self.port)
            if self.comparison is not None
            else "",
        )

    def _side(self, name: str, loaded: Loaded | Recording | None) -> SideEvidence:
        places = named_places(self.parity.family)
        weights = loaded.weights if isinstance(loaded, Loaded) else ()
        outputs = self.outputs.get(name)
        files = [loaded.path] if isinstance(loaded, Recording) and loaded.path else weights
        return SideEvidence(
            recording=content_hash(outputs) if outputs else "",
            code=hashes(self.files.get(name, ()), self.root, code=True, named=places),
            weights=hashes(map(Path, files), self.root, code=False, named=places),
            keys=len(state_of_side(loaded)),
        )


@taking_turns()
@surviving("the parity case")
def run_parity(run: Run) -> Comparison:
    """Run a parity case, filling `run`.

    Returns:
        The comparison, if it proves parity.

    Raises:
        ComponentMissingError: A part is not there: the test skips with this reason.
        EquivalenceError: The numbers differ.
        ParityError: They agree, but prove nothing or may no longer pass.
        Exception: Whatever a loader or the port raised.
    """
    from truestep.judge.compare import assert_equivalent

    path = list(sys.path)
    take_used()
    take_imported()
    take_ported()
    try:
        failure = _compare(run)
    except ComponentMissingError as error:
        run.missing = error
        raise
    except FOREIGN as error:
        run.raised = f"raised {one_line(error)}"
        raise
    finally:
        sys.path[:] = path
        run.stubs, run.classes = take_used(), take_imported()
    assert run.comparison is not None
    if failure is not None and not run.comparison.verdict.passed:
        raise failure
    assert_equivalent(run.comparison)
    evidence = run.evidence().model_copy(update={"result": "passed"})
    state, reason = state_of(evidence, datetime.now(timezone.utc).date())
    if state is not State.NON_SKIP_PASS:
        raise ParityError(
            f"{run.parity.name}: the numbers agree, but the test may not pass",
            measured=reason,
            likely="code that both sides run is compared with itself" if run.shared else "",
            hint=_hint(run),
        )
    return run.comparison


def _hint(run: Run) -> str:
    if run.shared:
        return "give each side its own code, or allow_shared={'path/end.py': 'why it is no proof'}"
    if run.parity.loosened:
        return "measure again, and agree on a new Loosened(..., expires=...)"
    return "Loaded(call, weights=[...]) names the weight files of a side"


def _compare(run: Run) -> BaseException | None:
    """Load, feed and judge; returns what the port raised, if it did."""
    parity = run.parity
    run.files = {
        "official": source_files(parity.official, None, roots=_roots(run)),
        "port": source_files(parity.port, None, roots=_roots(run)),
    }
    run.official = loaded(parity.official())
    port = loaded(parity.port())
    if isinstance(port, Recording):
        raise UsageError("the port is a recording: only the official side may be one")
    run.port = port
    _note_code(run)
    if parity.judge is not None:
        run.comparison = _judged(run, parity.judge)
        return None
    if isinstance(run.official, Recording):
        samples, rebuild = recorded_samples(run.official, parity)
    else:
        samples, rebuild = samples_of(parity)
    recording = _reference(run, samples, rebuild)
    recording, earlier = with_rounding(
        recording, port, samples, rebuild, most=parity.start_tolerance
    )
    made: dict[str, torch.Tensor] = {}
    failures: list[BaseException] = []
    left = list(range(len(samples)))

    def candidate(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        index = len({key_of(name).number for name in made})
        repeated = index >= len(samples)
        try:
            found = flatten(port.call(**rebuild(tensors)))
        except FOREIGN as error:
            failures.append(error)
            raise
        if repeated:  # from the last one back
            return _another(found, made, earlier, left.pop() if left else 0)
        outputs = {k: plain(v, k).clone() for k, v in found.items()}
        made.update({f"sample/{index:04d}/output/{k}": v for k, v in outputs.items()})
        return found

    floor = recording.manifest.noise_floor
    run.comparison = check_function(
        candidate,
        recording,
        tolerance=_tolerance(parity, measured=bool(floor and floor.runs)),
        pair=working_pair(recording, port) if floor and floor.runs else None,
        label="port",
    )
    if isinstance(run.official, Loaded) and not failures:
        test = os.path.relpath(run.test_file)
        run.comparison, run.fault = explained(
            run.comparison, run.official, port, samples, rebuild, test=test
        )
    run.outputs = {"official": _outputs(recording), "port": made}
    run.comparison, run.frames = with_frames(run.comparison, made, run.outputs["official"])
    if run.keep:
        _save(recording, made, run.keep / f"{parity.family}-{parity.component}")
    return failures[0] if failures else None


def _tolerance(parity: Parity, *, measured: bool) -> float | None:
    """The one that was agreed on, or the first one where no floor was measured."""
    if parity.loosened:
        return parity.loosened.rel_l2
    return None if measured else parity.start_tolerance


def _another(
    found: Tensors, made: Tensors, earlier: Tensors, index: int
) -> dict[str, torch.Tensor]:
    """The second answer to a sample: one given before all others, where that was another."""
    names = {key: f"sample/{index:04d}/output/{key}" for key in found}
    return {
        key: earlier[names[key]]
        if names[key] in made
        and names[key] in earlier
        and not same_bits(earlier[names[key]], made[names[key]])
        else value
        for key, value in found.items()
    }


def _save(official: Recording, port: dict[str, torch.Tensor], stem: Path) -> None:
    """Save the recordings of both sides."""
    official.save(f"{stem}.official.safetensors")
    changes = {"noise_floor": None, "tensors": tensor_table(port)}
    manifest = official.manifest.model_copy(update=changes)
    Recording.in_memory(port, manifest).save(f"{stem}.port.safetensors")


class _Function(torch.nn.Module):
    """A call around a module, as a module: its noise floor includes the module's rounding."""

    def __init__(self, call: Callable[..., Any], module: torch.nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self._calls = (call,)

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return flatten(self._calls[0](**tensors))


def _reference(
    run: Run, samples: list[dict[str, torch.Tensor]], rebuild: Callable[[Tensors], dict[str, Any]]
) -> Recording:
    if isinstance(run.official, Recording):
        return run.official
    assert run.official is not None
    call, module = run.official.call, module_of(run.official)
    training = [name for name, m in (module.named_modules() if module else ()) if m.training]
    if training:
        raise UsageError(
            "the official module is in training mode",
            where=training[0] or "(root)",
            hint="return Loaded(model.eval(), ...)",
        )

    def function(**tensors: torch.Tensor) -> Any:
        return call(**rebuild(tensors))

    wrapped = _Function(function, module)
    function_of = wrapped if module else wrapped.forward
    recording = record_function(function_of, samples, floor=run.parity.loosened is None)
    if run.parity.loosened is not None:
        return recording
    return with_variants(recording, run.official, samples, rebuild)


def _outputs(recording: Recording) -> dict[str, torch.Tensor]:
    return {name: recording[name] for name in recording if "/output/" in name}


def _judged(run: Run, judge: Callable[[Any, Any], Comparison]) -> Comparison:
    """Both sides' own outputs, handed to the case's judge; the worst comparison of all samples."""
    assert run.port is not None
    if not isinstance(run.official, Loaded):
        raise UsageError("Parity(judge=...) calls both sides: the official one is a recording")
    parity, worst = run.parity, None
    hashed: dict[str, dict[str, torch.Tensor]] = {"official": {}, "port": {}}
    for seed in parity.seeds if parity.inputs else parity.seeds[:1]:
        outputs = []
        for name, side in (("official", run.official), ("port", run.port)):
            make = parity.inputs
            inputs = make(torch.Generator("cpu").manual_seed(seed)) if make else {}
            with torch.no_grad():
                output = side.call(**inputs)
            outputs.append(output)
            hashed[name].update({f"{seed}/{k}": v for k, v in hashable(output).items()})
        comparison = judge(outputs[1], outputs[0])
        if worst is None or (comparison.verdict.exit_code and worst.verdict.passed):
            worst = comparison
    run.outputs = dict(hashed)
    assert worst is not None
    worst, run.frames = with_frames(worst, hashed["port"], hashed["official"])
    return worst


def _roots(run: Run) -> list[Path]:
    return [run.root, *named_places(run.parity.family).values()]


def _note_code(run: Run) -> None:
    """Find the source files of both sides, and what they share."""
    parity, official, port = run.parity, run.official, run.port
    assert port is not None
    sides: dict[str, frozenset[Path]] = {}
    for name, loader, side in (
        ("official", parity.official, official),
        ("port", parity.port, port),
    ):
        things: Any = (side.call, side.module) if isinstance(side, Loaded) else None
        if name == "port":
            things = (things, take_ported())
        declared = side.files if isinstance(side, Loaded) else ()
        sides[name] = source_files(loader, things, roots=_roots(run), declared=declared)
    run.files = sides
    common = shared_files(sides["port"], sides["official"], allowed=parity.allow_shared)
    places = named_places(parity.family)
    objects: tuple[str, ...] = ()
    if isinstance(official, Loaded):
        ours, theirs = module_of(port) or port.call, module_of(official) or official.call
        objects = shared_modules(ours, theirs)
    run.shared = (*objects, *hashes(common, run.root, code=True, named=places))
