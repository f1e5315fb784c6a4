"""What the pytest plugin does for parity tests: run, skip for a typed reason, write the ledger."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import FileFormatError, TruestepError, WriteError
from truestep.parity.evidence import Evidence, SideEvidence
from truestep.parity.ledger import Component, read_ledger, update_ledger
from truestep.parity.packet import (
    Definition,
    Packet,
    listed,
    packet_path,
    read_packet,
    write_packet,
)
from truestep.parity.redaction import redact

if TYPE_CHECKING:
    from truestep.parity.component import Loaded, Parity
    from truestep.parity.running import Run
    from truestep.recording.format import Recording


def entry_of(run: Run) -> dict[str, Any]:
    """A ledger entry of a run as plain data, which the test runner completes with its result."""
    parity = run.parity
    definitions, instantiations = listed(read_packet(packet_path(run.test_file)))
    entry = Component(
        family=parity.family,
        component=parity.component,
        kind=str(parity.kind),
        test=run.test_file.name,
        coverage_scope=str(parity.coverage),
        concerns=_concerns(run),
        official_definition_files=definitions,
        official_instantiation_files=instantiations,
        evidence=run.evidence(),
    )
    data: dict[str, Any] = json.loads(redact(entry.model_dump_json(exclude_none=True)))
    return {"folder": str(run.root), "entry": data}


def _concerns(run: Run) -> tuple[str, ...]:
    parity = run.parity
    found = list(parity.concerns)
    found += [f"both sides use {end}: {why}" for end, why in parity.allow_shared.items()]
    found += [f"stubbed: {name}" for name in run.stubs]
    if parity.loosened:
        item = parity.loosened
        found.append(
            f"tolerance loosened to {item.rel_l2:g} until {item.until} by {item.owner}: "
            f"{item.reason}"
        )
    if run.comparison is not None:
        found += [note for note in run.comparison.notes if "noise floor" in note]
    return tuple(found)


def write_entries(
    runs: Iterable[Mapping[str, Any]], failed_files: Mapping[str, str], today: date
) -> tuple[list[Path], list[TruestepError]]:
    """Write the ledgers of a session.

    Args:
        runs: Of `entry_of`, with `result`, and `test`, the node id's last part.
        failed_files: Test files that could not be collected, and why.
        today: Of the states that are written for the reader.

    Returns:
        Paths of what was written, and why others were not: a damaged ledger is never replaced.
    """
    folders: dict[Path, list[Component]] = {}
    for data in runs:
        entry = Component.model_validate(data["entry"])
        evidence = entry.evidence.model_copy(update={"result": data["result"]})
        test = f"{entry.test}::{data['test']}"
        folders.setdefault(Path(data["folder"]), []).append(
            entry.model_copy(update={"evidence": evidence, "test": test})
        )
    for name, why in failed_files.items():
        path = Path(name)
        for known in read_ledger(path.parent).component:
            if known.test.partition("::")[0] == path.name:
                evidence = Evidence(
                    result="error",
                    date=today.isoformat(),
                    raised=redact(f"the test file cannot be collected: {why}")[:300],
                    official=SideEvidence(),
                )
                entry = known.model_copy(update={"evidence": evidence})
                folders.setdefault(path.parent, []).append(entry)
    written: list[Path] = []
    failed: list[TruestepError] = []
    for folder, entries in folders.items():
        try:
            written.append(update_ledger(folder, entries, today))
        except (
            FileFormatError,
            WriteError,
        ) as error:  # the other folders' are written all the same
            failed.append(error)
    return written, failed


def fill_packet(run: Run) -> None:
    """Write what a run has found into the component's packet, and the key dumps beside it."""
    from truestep.pairing.conversion import dump
    from truestep.parity.sides import state_of_side

    path = packet_path(run.test_file)
    parity = run.parity
    packet = read_packet(path) or Packet(
        model_family=parity.family, component=parity.component, component_type=str(parity.kind)
    )
    updates: dict[str, Any] = {
        "parity_test": run.test_file.name,
        "mode": "parity-scaffold" if run.missing else "parity-debug",
        "concerns": _concerns(run),
    }
    for name, side in (("official", run.official), ("port", run.port)):
        state = state_of_side(side)
        if state:
            keys = run.test_file.with_name(f"{run.test_file.stem}.{name}.keys")
            dump(keys, state)
            updates[f"{name}_keys"] = keys.name
    evidence = run.evidence()
    if run.port is not None:
        folders = sorted({Path(name).parent.as_posix() for name in evidence.port.weights})
        updates["port_files"] = tuple(evidence.port.code)
        strict = "loaded" if not run.raised else "raised"
        conversion = packet.conversion.model_copy(
            update={
                "converted_dir": ", ".join(folders),
                "strict_load": strict,
                "loader_strictness": _strictness(parity.port),
            }
        )
        updates["conversion"] = conversion
    if evidence.official.weights and not packet.official_weight_source:
        updates["official_weight_source"] = ", ".join(evidence.official.weights)
    if not packet.official_definition_files:
        updates["official_definition_files"] = _definitions(run.official, run)
    known = {"official_definition_files": "defined", "official_weight_source": "weights come from"}
    updates["unknowns"] = tuple(
        item
        for item in packet.unknowns
        if not any(updates.get(key) and word in item.question for key, word in known.items())
    )
    write_packet(path, packet.model_copy(update=updates))


def _strictness(loader: Callable[..., object]) -> str:
    """How strictly a loader loads its weights, as its source says."""
    try:
        source = inspect.getsource(loader)
    except (TypeError, OSError):
        return "unknown: the loader's source cannot be read"
    if "load_state_dict" not in source:
        return "load_state_dict is not called in the loader itself"
    return "strict=False" if "strict=False" in source else "strict"


def _definitions(side: Loaded | Recording | None, run: Run) -> tuple[Definition, ...]:
    """Where the official classes that were loaded are defined."""
    from truestep.parity.evidence import label
    from truestep.parity.sides import module_of, named_places

    module, found = module_of(side), []
    for kind in dict.fromkeys([*run.classes, *([] if module is None else [type(module)])]):
        try:
            file, line = inspect.getsourcefile(kind), inspect.getsourcelines(kind)[1]
        except (TypeError, OSError):
            continue
        if file is not None and Path(file) != run.test_file:
            path = label(Path(file), run.root, named_places(run.parity.family))
            found.append(Definition(path=path, symbols=(kind.__name__,), line=line))
    return tuple(found)


def parity_of(test_file: Path) -> Parity:
    """The case that a test file declares.

    Raises:
        UsageError: The file cannot be imported, or declares no case or several.
    """
    import importlib.util
    import sys

    from truestep.errors import UsageError
    from truestep.parity.component import Parity

    found = importlib.util.spec_from_file_location(test_file.stem, test_file)
    if not test_file.is_file() or found is None or found.loader is None:
        raise UsageError("there is no such parity test", where=str(test_file))
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(test_file.parent.resolve()))
    sys.modules[test_file.stem] = module
    found.loader.exec_module(module)
    cases = [value for value in vars(module).values() if isinstance(value, Parity)]
    if len(cases) != 1:
        raise UsageError(
            f"the file declares {len(cases)} parity cases, one is needed", where=str(test_file)
        )
    return cases[0]
