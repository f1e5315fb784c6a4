"""Say where a red run departs: in which module, if both are torch, and which weights are odd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from truestep.errors import FOREIGN, TruestepError
from truestep.judge.sentence import with_divergence
from truestep.keys import key_of
from truestep.pairing import pair_modules
from truestep.pairing.naming import ROOT
from truestep.pairing.partners import partners_of
from truestep.parity.component import Loaded
from truestep.parity.evidence import Fault
from truestep.parity.redaction import redact
from truestep.parity.sides import Tensors, module_of, state_of_side
from truestep.replay.drill import Subject, drill
from truestep.runtime.precision import converted
from truestep.verdict import Comparison, Divergence, Verdict

if TYPE_CHECKING:
    from truestep.pairing.conversion import State

LARGEST = 2**30
"""Weights above this many bytes a side are not compared value by value on the way to a red state:
`truestep parity keys` does it."""

_MOST_NAMED = 3

_AROUND = "in the code between its modules, or too small in one of them to tell"

Rebuild = Callable[[Tensors], dict[str, Any]]


def explained(
    comparison: Comparison,
    official: Loaded,
    port: Loaded,
    samples: Sequence[Tensors],
    rebuild: Rebuild,
    *,
    test: str,
) -> tuple[Comparison, Fault | None]:
    """Add where a red comparison departs, as far as it can be told.

    Args:
        comparison: Of the outputs.
        official, port: Both sides.
        samples: Inputs by name, in the order of the comparison's samples.
        rebuild: Makes call arguments of a sample.
        test: The parity test, for the hint.

    Returns:
        The comparison with a first divergence down to the module and a hint, and the same as
        evidence; unchanged and None where no numbers differ.
    """
    failing = next(
        (row for row in comparison.rows if row.verdict in (Verdict.DRIFTED, Verdict.INVALID)), None
    )
    if failing is None:
        return comparison, None
    index = key_of(failing.name).number or 0
    theirs, ours = module_of(official), module_of(port)
    found, partner, note, odd = None, "", "", ""
    if theirs is None or ours is None:
        lacking = "official side" if theirs is None else "port"
        note = f"no module named: the {lacking} is no torch module that can be opened"
        odd = _weights(official, port)
    else:
        try:
            odd = "; ".join(_odd(ours, theirs))
            found, partner = _drilled(official, port, samples[index], rebuild)
            if found is not None and found.fqn == ROOT and not found.kind:
                found = found.model_copy(update={"kind": _AROUND})
        except FOREIGN as error:  # a second run in float32 may do what the first one did not
            note = f"no module named: opening both sides raised {type(error).__name__}: {error}"
        else:
            note = "" if found else "no module named: on right inputs each of them is right"
    fault = Fault(
        output=failing.name,
        module=(found.fqn or "") if found else "",
        port_module=partner,
        kind=(found.kind or "") if found else "",
        operator=redact(found.operator or "") if found else "",
        weights=odd,
        note=redact(note.splitlines()[0][:300]) if note else "",
    )
    return _with(comparison, fault, found, test), fault


def _with(comparison: Comparison, fault: Fault, found: Divergence | None, test: str) -> Comparison:
    made = comparison
    if found is not None:
        named = found.model_copy(update={"name": fault.output, "step": None, "branch": None})
        made = with_divergence(comparison, named, ())
        looked = (*comparison.looked_at, "modules of both sides, paired")
        made = made.model_copy(update={"looked_at": looked})
    notes = [fault.note] if fault.note else []
    notes += [f"in the port: {fault.port_module}"] if fault.port_module else []
    notes += [f"weights: {fault.weights}"] if fault.weights else []
    hint = f"`truestep parity keys {test}` lists the weights of both sides, paired"
    hint = "; ".join([hint, *notes])
    return made.model_copy(update={"notes": (*comparison.notes, *notes), "hint": hint})


def _drilled(
    official: Loaded, port: Loaded, sample: Tensors, rebuild: Rebuild
) -> tuple[Divergence | None, str]:
    """The deepest module that is wrong on right inputs, and its name in the port."""
    ours, theirs = module_of(port), module_of(official)
    assert ours is not None
    assert theirs is not None
    partners = partners_of(ours, theirs)
    wide = {name: _wide(tensor) for name, tensor in sample.items()}

    def subject(side: Loaded, model: torch.nn.Module) -> Subject:
        def forward() -> Any:
            return side.call(**rebuild({name: tensor.clone() for name, tensor in wide.items()}))

        return Subject(model, forward)

    with converted(ours, torch.float32), converted(theirs, torch.float32):
        found = drill(
            subject(port, ours),
            subject(official, theirs),
            place=(0, "main"),
            partners=partners,
        ).divergence
    if found is None or partners is None:
        return found, ""
    names = [own for own, parts in partners.own.items() if found.fqn in {p.fqn for p in parts}]
    return found, ", ".join(names[:_MOST_NAMED])


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _odd(port: torch.nn.Module, official: torch.nn.Module) -> Iterator[str]:
    """Parameters that do not fit their partners, or that the other side lacks."""
    pairing = pair_modules(port, official)
    told = [
        f"{', '.join(pair.actual)} ({', '.join(pair.reference)}): {pair.text()}"
        for pair in pairing.odd
    ]
    sides = ((official, pairing.unmatched_reference, "port"), (port, pairing.unmatched_actual, ""))
    for model, unmatched, other in sides:
        names = {name for name, _ in model.named_parameters()}
        lacking = f"without a partner in the {other or 'official model'}"
        told += [f"{name}: {lacking}" for name in unmatched if name in names]
    yield from told[:_MOST_NAMED]
    if len(told) > _MOST_NAMED:
        yield f"{len(told) - _MOST_NAMED} more are odd"


def _weights(official: Loaded, port: Loaded) -> str:
    """What sets the two sides' weights apart; empty where nothing does or it cannot be told."""
    from truestep.pairing.checkpoints import compare_checkpoints
    from truestep.pairing.conversion import pair_keys

    theirs, ours = parameters(official), parameters(port)
    if not theirs or not ours:
        return ""
    if any(sum(t.nbytes for t in side.values()) > LARGEST for side in (theirs, ours)):
        return ""
    found = compare_checkpoints(pair_keys(ours, theirs), ours, theirs)
    if found.verdict in ("same", "unmatched"):
        return ""
    changed = [row.official for row in found.rows if row.kind != "same"]
    more = len(changed) - _MOST_NAMED
    names = ", ".join(changed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{found.sentence}: {names}"


def parameters(side: Loaded) -> State:
    """Parameters of a side by name: of its module, as declared, or read from its weight files."""
    from truestep.parity.weights import load_state

    state = state_of_side(side)
    if state:
        return state
    found: dict[str, torch.Tensor] = {}
    for path in map(Path, side.weights):
        if path.stat().st_size > LARGEST:
            return {}
        try:
            found.update(load_state(path))
        except TruestepError:  # a kind of file that has no names in it
            return {}
    return found
