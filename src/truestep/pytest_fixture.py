"""The fixture `truestep`: compares what a test made with its stored reference. Imports no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from truestep.pytest_references import Made, reference_id, reference_root
from truestep.text import pasteable

if TYPE_CHECKING:
    from truestep.judge.known import Entry
    from truestep.judge.latent import SliceSpec
    from truestep.parity.component import Parity
    from truestep.recording.store import Place, Store
    from truestep.verdict import Comparison

CHECKS = pytest.StashKey["Checks"]()
LATE = pytest.StashKey[list[str]]()
"""Of the run: checks that ended after their test had."""

LEDGER: pytest.StashKey[Mapping[str, Entry]] = pytest.StashKey()


@dataclass
class Compared:
    """What one phase of a test compared, as plain data: xdist sends it to the controller.

    Attributes:
        kept: References that an update did not replace, each with `KEPT`'s word for why.
    """

    comparisons: list[str] = field(default_factory=list)
    numeric: int = 0
    used: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)


@dataclass
class Checks:
    """The checks of one test.

    Attributes:
        compared: Since the last report.
        names: Of every check that began. running: of those that did not end.
        failures: What checks raised, and no report has told yet.
        over: Whether the test has ended.
    """

    compared: Compared = field(default_factory=Compared)
    names: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    failures: list[BaseException] = field(default_factory=list)
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class TruestepFixture:
    """Compares what a test made with its stored reference. One instance a test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._node = request.node
        self._config = request.config
        self._checks = request.node.stash[CHECKS] = Checks()

    @property
    def store(self) -> Store:
        """The reference folder."""
        from truestep.recording.store import Store

        return Store(reference_root(self._config))

    def check(
        self,
        actual: object,
        *,
        name: str = "",
        tolerance: float | None = None,
        device_class: str | None = None,
        attention: str = "any",
        tier: str = "default",
    ) -> Comparison:
        """Judge a tensor, an array or a mapping of them against the test's reference.

        Args:
            actual: What the test made.
            name: Tells several checks of one test apart.
            tolerance: Limit on rel_l2; default the analytic floor of the dtype.
            device_class: Where it was made; default from the tensor's device.
            attention: Attention back-end that was really used.
            tier: Quality tier.

        Raises:
            EquivalenceError: It did not.
            ReferenceNotFoundError: There is none; the candidate is written beside its place.
        """
        __tracebackhide__ = True
        from truestep.judge.compare import compare
        from truestep.recording.readers import load

        with self._checking(name):
            tensors = load(actual, label="actual").tensors
            place = self._place(name, tensors, device_class, attention, tier)
            reference = self._reference(place, Made(tensors))
            if reference is None:
                return self._written(place)
            return self._judge(compare(tensors, reference, tolerance=tolerance), place, name)

    def check_pipeline(
        self,
        pipe: Any,
        call: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        tolerance: float | None = None,
        attention: str = "any",
        tier: str = "default",
    ) -> Comparison:
        """Judge every call of a diffusers pipeline by the test's reference; see `truestep.check`.

        Args:
            pipe: The pipeline, loaded and changed as it is to be tested.
            call: What it is called with, by name, where the reference is made.
            name, tolerance, attention, tier: See `check`.

        Raises:
            EquivalenceError: It is not the same model.
            ReferenceNotFoundError: There is none; nothing was run.
        """
        __tracebackhide__ = True
        from truestep.engines.subjects import check, record
        from truestep.environment import device_class
        from truestep.recording.store import Place

        with self._checking(name):
            device = device_class(str(getattr(pipe, "device", "cpu")))
            place = Place(reference_id(self._node.nodeid, name), tier, device, attention)
            made = Made({}, record=lambda: record(pipe, call=call or {}))
            reference = self._reference(place, made)
            if reference is None:
                return self._written(place)
            result = check(pipe, reference, call=call, tolerance=tolerance)
            prompt = (call or {}).get("prompt")
            said = {"prompt": prompt} if isinstance(prompt, str) else {}
            return self._judge(result.model_copy(update=said), place, name)

    def check_latent(
        self,
        latent: Any,
        *,
        name: str = "",
        slice_spec: SliceSpec | str | None = None,
        slice_cosine_threshold: float = 5e-3,
        full_cosine_threshold: float = 1e-2,
        device_class: str | None = None,
        attention: str = "any",
        tier: str = "default",
    ) -> Comparison:
        """Gate one latent of any engine; see `truestep.check_latent` and `check`.

        Raises:
            UsageError: Several latents are given, or the slice does not fit.
        """
        __tracebackhide__ = True
        from truestep.judge.latent import check_latent, slice_for

        with self._checking(name):
            tensor = _only(latent)
            spec = slice_for(tensor, slice_spec)
            tensors = {"latent/final": tensor, "signature": spec.cut(tensor)}
            place = self._place(name, {"latent/final": tensor}, device_class, attention, tier)
            settings = {"slice_spec": spec.model_dump(mode="json")}
            reference = self._reference(place, Made(tensors, settings))
            if reference is None:
                return self._written(place)
            result = check_latent(
                tensor,
                reference,
                slice_spec=spec,
                slice_cosine_threshold=slice_cosine_threshold,
                full_cosine_threshold=full_cosine_threshold,
            )
            return self._judge(result, place, name)

    def check_parity(self, parity: Parity) -> Comparison:
        """Run a component parity case; see `truestep.parity`.

        Returns:
            The comparison, if the numbers agree and prove parity.

        Raises:
            EquivalenceError: The numbers differ.
            ParityError: They agree, but prove nothing or may no longer pass.
            Exception: Whatever a load path raised; only a typed missing part skips the test.
        """
        __tracebackhide__ = True
        from truestep.errors import ComponentMissingError
        from truestep.parity.running import Run, run_parity
        from truestep.parity.session import entry_of, fill_packet

        keep = self._config.getoption("truestep_parity_keep")
        path = Path(self._node.path)
        run = Run(parity, path.parent, path, Path(keep) if keep else None)
        with self._checking(parity.name):
            try:
                return run_parity(run)
            except ComponentMissingError as error:
                pytest.skip(str(error))
            finally:
                if run.comparison is not None:
                    self._add(run.comparison)
                if self._config.getoption("truestep_parity"):
                    fill_packet(run)
                self._checks.compared.parity.append(entry_of(run))

    @contextmanager
    def _checking(self, name: str) -> Iterator[None]:
        """Keep what becomes of a check: what a test swallows, or a thread raises, fails it too.

        Raises:
            UsageError: The test has a check of that name already, or has ended.
        """
        __tracebackhide__ = True
        from truestep.errors import UsageError

        checks, label = self._checks, repr(name) if name else "no name"
        with checks.lock:
            twice = name in checks.names
            checks.names.add(name)
            checks.running.add(name)
        try:
            if twice:
                raise UsageError(
                    f"two checks under one name in one test: {label}",
                    where=self._node.nodeid,
                    likely="it runs in a loop" if name else "",
                    hint="give each its own: truestep.check(x, name='another')",
                )
            yield
        except pytest.skip.Exception:
            raise
        except BaseException as error:
            checks.failures.append(error)
            raise
        finally:
            checks.running.discard(name)
            if checks.over:
                self._config.stash[LATE].append(f"{self._node.nodeid}: {label}")

    def close(self) -> None:
        """End the test: whatever its checks still do is too late."""
        self._checks.over = True
        raise_failures(self._node)

    def _place(
        self,
        name: str,
        tensors: Mapping[str, Any],
        device_class: str | None,
        attention: str,
        tier: str,
    ) -> Place:
        from truestep.environment import device_class as class_of
        from truestep.recording.store import Place

        if device_class is None:
            first = next(iter(tensors.values()), None)
            device_class = class_of(str(first.device)) if first is not None else "cpu"
        return Place(reference_id(self._node.nodeid, name), tier, device_class, attention)

    def _reference(self, place: Place, made: Made) -> Path | None:
        """The stored reference; None where this run writes it."""
        from truestep.errors import ReferenceNotFoundError
        from truestep.judge.refusals import refuse_empty_content
        from truestep.recording.store import candidate_of

        __tracebackhide__ = True
        store, update = self.store, self._config.getoption("truestep_update")
        path = store.root / place.name
        self._checks.compared.used.append(place.name)
        if update == "all" or (update == "new" and not store.holds(place)):
            if made.record is None:
                refuse_empty_content(made.tensors, where=place.case_id)
            kept = store.save(made.recording(place), place, update=True)
            if kept == path:
                self._checks.compared.written.append(place.name)
            else:
                self._checks.compared.kept.append((place.name, "promoted"))
            return None
        if store.holds(place):
            reference = store.verified(place)
            if update:
                self._checks.compared.kept.append((place.name, made.kept(reference)))
            return reference
        candidate = candidate_of(path)
        if made.record is None:
            made.recording(place).save(candidate)
        written = f"what the test made was written to {candidate.name} beside it"
        raise ReferenceNotFoundError(
            "this check has no reference yet",
            where=str(path),
            measured=written if made.record is None else "",
            likely="" if made.record is None else "the pipeline was not run yet",
            hint=f"{self._command()} --truestep-update",
        )

    def _written(self, place: Place) -> Comparison:
        from truestep.verdict import Comparison, Rule, Side, Verdict

        return Comparison(
            verdict=Verdict.IDENTICAL,
            sentence="the reference was written by this run",
            rule=Rule(name="update", text="--truestep-update"),
            case_id=place.case_id,
            actual=Side(label=self._node.nodeid),
            reference=Side(label=place.name),
        )

    def _judge(self, comparison: Comparison, place: Place, name: str) -> Comparison:
        __tracebackhide__ = True
        from truestep.errors import EquivalenceError
        from truestep.judge.compare import assert_equivalent
        from truestep.judge.known import judged

        entry = "::".join(part for part in (self._node.nodeid, name) if part)
        self._checks.compared.names.append(entry)
        comparison = judged(comparison, self._config.stash.get(LEDGER, {}), entry)
        accept = f"to accept the change: {self._command()} --truestep-update=all"
        named = comparison.model_copy(
            update={
                "case_id": place.case_id,
                "hint": comparison.hint or (accept if comparison.known is None else ""),
                "repeat": self._command(),
            }
        )
        self._add(named)
        if named.exit_code == 0:
            self._remove_candidate(place)
        if named.known is None:
            return assert_equivalent(named)
        if not named.known.accepted:
            raise EquivalenceError(named)
        self._checks.compared.known.append(named.sentence)
        return named

    def _remove_candidate(self, place: Place) -> None:
        """Remove what a run without a reference left: there is one now, and this is the same."""
        from truestep.recording.store import candidate_of

        candidate_of(self.store.root / place.name).unlink(missing_ok=True)

    def _add(self, comparison: Comparison) -> None:
        prompt = self._node.funcargs.get("prompt") if hasattr(self._node, "funcargs") else None
        said = {"test": self._node.nodeid}
        if isinstance(prompt, str) and not comparison.prompt:
            said["prompt"] = prompt
        comparison = comparison.model_copy(update=said)
        self._checks.compared.comparisons.append(comparison.to_json())
        self._checks.compared.numeric += sum(r.metrics is not None for r in comparison.rows)

    def _command(self) -> str:
        """The command that runs this test again, from where this run was started."""
        file, colons, rest = self._node.nodeid.partition("::")
        path = os.path.relpath(self._config.rootpath / file, self._config.invocation_params.dir)
        given = {
            "--rootdir": self._config.getoption("rootdir"),
            "--truestep-references": self._config.getoption("truestep_references"),
        }
        options = [f"{name}={value}" for name, value in given.items() if value]
        return pasteable(["pytest", path + colons + rest, *options])


def _only(latent: object) -> Any:
    """The one tensor that was given.

    Raises:
        UsageError: There are several: a gate of latents judges one.
    """
    from truestep.errors import UsageError
    from truestep.recording.readers import load

    tensors = load(latent, label="latent").tensors
    if len(tensors) == 1 or "latent/final" in tensors:
        return tensors.get("latent/final", next(iter(tensors.values())))
    raise UsageError(
        "check_latent judges one latent",
        measured=f"{len(tensors)} were given: {', '.join(list(tensors)[:5])}",
        hint="truestep.check_latent(latents['video'], name='video'), and so for each; "
        "truestep.check(latents) judges all in one",
    )


def raise_failures(item: pytest.Item) -> None:
    """Raise what the checks of a test raised and the test kept to itself, or a thread did.

    Raises:
        Exception: The first of them; a `UsageError` where a check has not ended.
    """
    from truestep.errors import UsageError

    checks = item.stash.get(CHECKS, Checks())
    failures, checks.failures = checks.failures, []
    if failures:
        note = "the test went on after this check failed, which fails it"
        if len(failures) > 1:
            note += f"; {len(failures) - 1} more of its checks failed"
        if hasattr(failures[0], "add_note"):  # from Python 3.11 on
            failures[0].add_note(note)
        raise failures[0]
    if checks.running:
        raise UsageError(
            f"the test ended before its check did: {', '.join(map(repr, sorted(checks.running)))}",
            where=item.nodeid,
            likely="it runs in a thread that the test does not wait for",
            hint="thread.join() at the end of the test",
        )
