"""Open the component whose call failed, inside the run, and say in which module it departs.

Every forward that a drill needs is a run of its side from the start, fed and answered from the
recording, in which the call that failed is made on its recorded arguments: processors, caches and
settings are then what they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from truestep.calls import keys
from truestep.calls.boundaries import FUNCTIONS, RANDOM
from truestep.calls.choosing import cached_components, chosen_steps, made_at
from truestep.calls.classes import FORWARD
from truestep.calls.forcing import Forcing
from truestep.calls.judging import RAISED, rows_of
from truestep.calls.precision import narrow, raised, recorded_precision
from truestep.calls.recorder import RUN
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Plan, Proceed, RunRaisedError
from truestep.calls.subject import Subject as Run
from truestep.judge.floor import Limits
from truestep.judge.sentence import with_divergence
from truestep.pairing.naming import ROOT, named_modules, unwrapped
from truestep.pairing.partners import Partners
from truestep.recording.manifest import CallEntry
from truestep.replay.causes.handed import handed_cause
from truestep.replay.drill import Drilled, Subject, drill
from truestep.replay.isolation import Forward, hearing
from truestep.replay.lines import raising_line
from truestep.replay.locating import Into, noted, opened, with_cause
from truestep.runtime.precision import working_dtype
from truestep.verdict import Comparison, Divergence, Verdict


@dataclass(frozen=True)
class Side:
    """One side of a failing call.

    Attributes:
        run: What runs.
        module: What is opened: the component, or a method of it as a module.
        made: Which calls of models are made.
    """

    run: Run
    module: Any
    made: Callable[[CallEntry], bool]


@dataclass(frozen=True)
class Failing:
    """The call that is looked into.

    Attributes:
        reference: What holds it.
        call: It.
    """

    reference: CallRecording
    call: CallEntry

    @property
    def place(self) -> tuple[int, str]:
        """Step and branch under which its modules are kept."""
        branch = self.call.context or "main"
        return self.call.step or 0, branch if branch.isidentifier() else "main"


def open_call(
    candidate: Run,
    trusted: Callable[[], Run],
    reference: CallRecording,
    comparison: Comparison,
    *,
    steps: Sequence[int] | None = None,
    rename: Mapping[str, str] | None = None,
    explain: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Comparison:
    """Add where inside the component of the first failing call the candidate departs.

    Args:
        candidate: What was checked.
        trusted: Makes the trusted side, unchanged; called only where there is something to open.
        reference: The recording.
        comparison: The candidate's check.
        steps: At which models were run in it.
        rename: Names of the candidate's modules to the trusted one's, `*` for one part.
        explain: Look for the cause, too; see `replay.causes`.
        arguments: What the reference was called with, as far as it is known.

    Returns:
        The comparison with rows of modules and a first divergence down to the module and its
        operator, or with a note that says why no module is named.

    Raises:
        UsageError: The rename map names modules that there are not.
    """
    first = comparison.first_divergence
    if first is None:
        return comparison
    chosen = chosen_steps(reference, steps)
    if first.name.endswith(RAISED):
        return _raising(candidate, reference, comparison, first, chosen)
    call = _failing(reference, keys.key_of(first.name))
    told = _closed(candidate, call, first)
    if call is None or told:
        if explain:
            sides = (candidate, trusted())
            return _handed(sides, reference, comparison, first.name, arguments or {})
        return noted(comparison, f"no module named: {told}")
    failing = Failing(reference, call)
    ours = _side(candidate, failing, _before(candidate, failing, chosen))
    other = trusted()
    inherited = _made_of(comparison, first) if explain else ""
    if inherited:
        sides = (candidate, other)
        handed = _handed(sides, reference, comparison, inherited, arguments or {})
        if handed.first_divergence != first:
            return handed
    theirs = _side(other, failing, _before(other, failing, frozenset()))
    try:
        unlike = _unlike(theirs, failing)
        if unlike:
            note = f"no module named: the trusted side is not the reference here ({unlike})"
            return noted(comparison, note)
        return opened(
            comparison,
            (ours.module, theirs.module),
            lambda partners: _drilled(
                ours, theirs, failing, partners, chosen=chosen if explain else None
            ),
            _into(call),
            rename=rename,
        )
    except RunRaisedError as error:
        return noted(comparison, f"no module named: looked into once more, a run {error}")


def _handed(
    sides: tuple[Run, Run],
    reference: CallRecording,
    comparison: Comparison,
    name: str,
    arguments: Mapping[str, Any],
) -> Comparison:
    """The comparison with why what is handed from call to call is wrong, or a note that nothing
    explains it."""
    cause, tried = handed_cause(*sides, reference, comparison, name=name, arguments=arguments)
    return with_cause(comparison, cause, tried)


def _made_of(comparison: Comparison, first: Divergence) -> str:
    """The row of what was made of a call's output that the reference has not, by which that was
    judged; empty of any other failing place."""
    rows = [row for row in comparison.rows if not row.verdict.passed]
    odd = [row for row in rows if row.name == first.name and row.origin != "inherited"]
    if not odd or "was not given; judged by its effect on" not in odd[0].note:
        return ""
    made = (row.name for row in rows if row.origin == "inherited")
    return next((name for name in made if keys.key_of(name).side == "in"), "")


def _failing(reference: CallRecording, place: keys.Key) -> CallEntry | None:
    """The call whose output that is; None of code between calls, and of what is no call."""
    if place.side == "in" or place.component in (RUN, RANDOM, FUNCTIONS):
        return None
    calls = reference.by_method.get((place.component, place.method), ())
    wanted = (place.stage, place.step, place.call)
    return next((c for c in calls if (c.stage, c.step, c.call) == wanted), None)


def _closed(candidate: Run, call: CallEntry | None, first: Divergence) -> str:
    """Why a failing place has no modules to open; nothing where it has."""
    if call is None:
        return f"`{first.fqn}` is in no component"
    component = _component(candidate, call.component)
    if component is None:
        return f"{call.component} is made inside the run"
    if not isinstance(component, torch.nn.Module):
        return f"{call.component} ({type(component).__name__}) is no torch module"
    return ""


def _component(run: Run, name: str) -> Any:
    """A component, or a module of one, by its name."""
    if name in run.components:
        return run.components[name]
    for known, value in run.components.items():
        if name.startswith(f"{known}.") and isinstance(value, torch.nn.Module):
            return value.get_submodule(name.removeprefix(f"{known}."))
    return None


def _side(run: Run, failing: Failing, made: Callable[[CallEntry], bool]) -> Side:
    component = _component(run, failing.call.component)
    if isinstance(component, torch.nn.Module) and failing.call.method != FORWARD:
        component = _method_of(component)
    return Side(run, component, made)


def _before(run: Run, failing: Failing, steps: frozenset[int]) -> Callable[[CallEntry], bool]:
    """Which calls are made, so that what one leaves for the next is there: the one before it.

    Of a component with a cache they are all that come before.
    """
    call = failing.call
    calls = failing.reference.by_method[call.component, call.method]
    before = calls[: next(i for i, each in enumerate(calls) if each is call)]
    kept = [each for each in before if steps and made_at(steps)(each)][-1:]
    if call.component in cached_components(run):
        kept = [c for c in failing.reference.calls if c.component == call.component]
        kept = kept[: next(i for i, each in enumerate(kept) if each is call)]
    chosen = {id(each) for each in (*kept, call)}
    return lambda each: id(each) in chosen


def _forward(side: Side, failing: Failing) -> Forward:
    """Run a side; modules are heard only in the call that is looked into."""

    def by(call: CallEntry, proceed: Proceed) -> Proceed:
        if call is not failing.call:
            return proceed
        called = proceed
        if isinstance(side.module, _Method):
            side.module.proceed = proceed
            called = side.module

        def make(*args: Any, **kwargs: Any) -> Any:
            with hearing(True):
                return called(*args, **kwargs)

        return make

    def forward() -> None:
        plan = Plan(made=side.made, precision=_wider(side.module, failing.call), by=by)
        with hearing(False):
            result = Forcing(failing.reference, plan).run(side.run)
        if result.raised:
            raise RunRaisedError(result.raised)

    return forward


def _wider(module: torch.nn.Module, call: CallEntry) -> torch.dtype | None:
    """Dtype of a module's weights, where that is wider than it was recorded in."""
    recorded = getattr(torch, call.dtype) if call.dtype else None
    here = working_dtype(module)
    return here if recorded and here and here.itemsize > recorded.itemsize else None


def _unlike(trusted: Side, failing: Failing) -> str:
    """What differs between the recording and the failing call as the trusted side makes it."""
    recording, call = failing.reference, failing.call
    precision = recorded_precision(recording)
    with _raised(precision, trusted.run):
        plan = Plan(
            made=trusted.made,
            precision=getattr(torch, precision) if precision else None,
            raised=precision,
        )
        result = Forcing(recording, plan).run(trusted.run)
    if result.raised:
        return result.raised
    rows = rows_of(recording, result, Limits(floor=recording.floor))
    wrong = [row for row in rows if row.verdict in (Verdict.DRIFTED, Verdict.INVALID)]
    if any(_failing(recording, keys.key_of(row.name)) is call for row in wrong):
        return f"{call.component}.{call.method} gives other values"
    return ""


@contextmanager
def _raised(precision: str | None, *runs: Run) -> Iterator[None]:
    """Everything raised to a precision, if to any."""
    with ExitStack() as stack:
        for run in runs if precision else ():
            stack.enter_context(raised(run, precision or "", lambda note: None))
        yield


def _drilled(
    ours: Side,
    theirs: Side,
    failing: Failing,
    partners: Partners | None,
    *,
    chosen: frozenset[int] | None,
) -> Drilled:
    """Drill into a call on both sides, in a precision that hides no fault.

    Args:
        chosen: The steps at which models were run, where the cause is looked for, too.
    """
    later = _later(failing, chosen) if chosen else None

    def again() -> tuple[Subject, Subject, tuple[int, str]] | None:
        if later is None:
            return None
        mine = _side(ours.run, later, _before(ours.run, later, chosen or frozenset()))
        other = _side(theirs.run, later, _before(theirs.run, later, frozenset()))
        return (
            Subject(mine.module, _forward(mine, later)),
            Subject(other.module, _forward(other, later)),
            later.place,
        )

    with _raised(narrow(failing.reference), ours.run, theirs.run):
        return drill(
            Subject(ours.module, _forward(ours, failing)),
            Subject(theirs.module, _forward(theirs, failing)),
            place=failing.place,
            partners=partners,
            explain=chosen is not None,
            again=again,
        )


def _later(failing: Failing, chosen: frozenset[int]) -> Failing | None:
    """The same call at the last step at which models were run; None where there is no other."""
    call = failing.call
    alike = [
        each
        for each in failing.reference.by_method[call.component, call.method]
        if each.stage == call.stage and each.context == call.context and each.step in chosen
    ]
    if call.step is None or not alike or alike[-1].step == call.step:
        return None
    return Failing(failing.reference, alike[-1])


def _into(call: CallEntry) -> Into:
    """How a component and its modules are named in results."""
    caller = f"{call.component}.{call.method}"
    root = call.component if call.method == FORWARD else caller
    return Into(
        model=call.component,
        around=f"what {caller} does around them",
        stage=call.stage,
        named=lambda fqn: root if fqn == ROOT else f"{call.component}.{fqn}",
        changes={"step": call.step, "branch": call.context},
    )


class _Method(torch.nn.Module):
    """A method of a module as a module of its own, with the same parts.

    Attributes:
        proceed: The method, while a run makes it.
    """

    proceed: Callable[..., Any]

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        for held in ("_modules", "_parameters", "_buffers"):
            object.__setattr__(self, held, getattr(module, held))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        return self.proceed(*args, **kwargs)


def _method_of(component: torch.nn.Module) -> _Method:
    inner = unwrapped(component)
    of = type(inner)
    if of not in _METHODS:
        _METHODS[of] = type(of.__name__, (_Method,), {})
    return _METHODS[of](inner)


_METHODS: WeakKeyDictionary[type, type[_Method]] = WeakKeyDictionary()
"""One class for all methods of a class, with its name: sides of one class are of one here too."""


@dataclass
class _Running:
    """Calls and modules that have begun and not ended, the innermost last."""

    names: list[str] = field(default_factory=list)

    def begin(self, name: str) -> None:
        self.names.append(name)

    def end(self, name: str) -> None:
        at = len(self.names) - 1 - self.names[::-1].index(name)
        del self.names[at:]

    def by(self, call: CallEntry, proceed: Proceed) -> Proceed:
        """Make a call, and note that it runs."""
        name = f"{call.component}.{call.method}"

        def make(*args: Any, **kwargs: Any) -> Any:
            self.begin(name)
            output = proceed(*args, **kwargs)
            self.end(name)
            return output

        return make

    @contextmanager
    def watched(self, run: Run) -> Iterator[None]:
        """Note which modules run; a module that raises does not end."""
        with ExitStack() as stack:
            for component, value in run.components.items():
                if not isinstance(value, torch.nn.Module):
                    continue
                for fqn, module in named_modules(value).modules.items():
                    name = component if fqn == ROOT else f"{component}.{fqn}"
                    begin = module.register_forward_pre_hook(
                        lambda *_, name=name: self.begin(name), prepend=True
                    )
                    end = module.register_forward_hook(lambda *_, name=name: self.end(name))
                    stack.callback(begin.remove)
                    stack.callback(end.remove)
            yield


def _raising(
    candidate: Run,
    reference: CallRecording,
    comparison: Comparison,
    first: Divergence,
    steps: frozenset[int],
) -> Comparison:
    """Say which module raises."""
    running = _Running()
    stateful = frozenset(cached_components(candidate))
    with running.watched(candidate):
        plan = Plan(made=made_at(steps, stateful), by=running.by)
        result = Forcing(reference, plan).run(candidate)
    if not result.raised:
        return noted(comparison, "no module named: run once more, it does not raise")
    if not running.names:
        return noted(comparison, "no module named: it raised outside every component")
    raised = raising_line(result.frames)
    file, line = (raised and raised.place) or (None, None)
    text = raised and f"{raised.text}: {raised.code}"
    where = {"operator": text, "file": file, "line": line}
    update = {"fqn": running.names[-1], "kind": None, **where}
    return with_divergence(comparison, first.model_copy(update=update), ())
