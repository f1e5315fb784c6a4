"""What a parity case knows of rounding beside the official side's own benign runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from truestep.errors import FOREIGN
from truestep.floors import NoiseFloor
from truestep.judge.floor import coarser, declared_pair, pair_of
from truestep.judge.rows import measured_run
from truestep.measure.distance import same_bits
from truestep.nests import flatten
from truestep.parity.component import Loaded
from truestep.parity.sides import Tensors, module_of
from truestep.recording.format import Recording
from truestep.runtime.precision import HIGHER, converted


def with_rounding(
    recording: Recording,
    port: Loaded,
    samples: Sequence[Tensors],
    rebuild: Callable[[Tensors], dict[str, Any]],
    *,
    most: float,
) -> tuple[Recording, Tensors]:
    """Add the port's own rounding to the official side's noise floor.

    Two correct implementations differ by the roundings of both. The official side's are among its
    benign runs if it is a torch module; the port's are measured against itself in the next higher
    precision. A port's fault does not change them, and a rounding above `most` is not believed.

    Args:
        recording: Of the official side, with its noise floor.
        port: The port.
        samples: Inputs by name.
        rebuild: Makes call arguments of them.
        most: Largest rel_l2 to believe.

    Returns:
        The recording with that floor, and what the port gave on the way: answers like any other,
        the later ones where it gave two.
    """
    floor, module = recording.manifest.noise_floor, module_of(port)
    if floor is None or module is None:
        return recording, {}
    higher, pair = HIGHER.get(_precision(module)), working_pair(recording, port)
    if higher is None or pair is None:
        return recording, {}
    try:
        first = _answers(port, samples, rebuild)
        raised = _raised(port, module, samples, rebuild, getattr(torch, higher))
        later = _answers(port, samples, rebuild)
        pairs = {name: (raised[name], value) for name, value in first.items()}
        run = measured_run("precision", f"the port against {higher}", pair, pairs)
    except FOREIGN as error:  # the comparison itself will raise what matters
        return _changed(recording, floor, type(error).__name__), {}
    if any(not same_bits(value, later[name]) for name, value in first.items()):
        lacking = "it answers one input in two ways"
        worse = {n: _further(first[n], later[n], recording, n) for n in first}
        return _changed(recording, floor, lacking), worse
    narrow, _, official = pair.partition("/")
    if narrow != official:  # its rounding is that of its weights, whatever it returns
        rows = tuple(row.model_copy(update={"dtype": narrow}) for row in run.tensors)
        run = run.model_copy(update={"tensors": rows})
    if any(not row.rel_l2 <= most for row in run.tensors):
        return _changed(recording, floor, f"it is larger than {most:g}"), later
    return _changed(recording, NoiseFloor(runs=(*floor.runs, run)), ""), later


def _further(
    first: torch.Tensor, later: torch.Tensor, recording: Recording, name: str
) -> torch.Tensor:
    """Of two answers, the one further from what was recorded."""
    known = recording.get(name)
    if known is None or not first.shape == later.shape == known.shape:
        return later
    wide = (answer.to(torch.float64) - known.to(torch.float64) for answer in (first, later))
    sizes = [float(difference.norm()) for difference in wide]
    return first if not sizes[0] <= sizes[1] else later


def working_pair(recording: Recording, port: Loaded) -> str | None:
    """Working precisions of port and official side; None where no floor was measured.

    The port's counts where its weights were loaded in a coarser one, not where it returns one.
    """
    own, module = declared_pair(recording.manifest.noise_floor), module_of(port)
    if not own:
        return None
    official = own.partition("/")[2]
    loaded = official if module is None else coarser(official, _precision(module))
    return pair_of(loaded, official)


def _precision(module: torch.nn.Module) -> str:
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return str(next(found, torch.float32)).removeprefix("torch.")


def with_variants(
    recording: Recording,
    official: Loaded,
    samples: Sequence[Tensors],
    rebuild: Callable[[Tensors], dict[str, Any]],
) -> Recording:
    """Add the official side's declared variants to its noise floor; see `Loaded.variants`."""
    floor = recording.manifest.noise_floor or NoiseFloor()
    runs = list(floor.runs)
    for detail, call in official.variants.items():
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, sample in enumerate(samples):
            made = _call(Loaded(call), rebuild({k: v.clone() for k, v in sample.items()}))
            for key, value in made.items():
                name = f"sample/{index:04d}/output/{key}"
                pairs[name] = (value, recording[name])
        runs.append(measured_run("variant", detail, declared_pair(floor), pairs))
    return _changed(recording, NoiseFloor(runs=tuple(runs)), "")


def _answers(
    port: Loaded, samples: Sequence[Tensors], rebuild: Callable[[Tensors], dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """What the port gives for each sample, by the names of a recording."""
    return {
        f"sample/{index:04d}/output/{key}": value
        for index, sample in enumerate(samples)
        for key, value in _call(port, rebuild({k: v.clone() for k, v in sample.items()})).items()
    }


def _raised(
    port: Loaded,
    module: torch.nn.Module,
    samples: Sequence[Tensors],
    rebuild: Callable[[Tensors], dict[str, Any]],
    higher: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The same in a higher precision."""
    wide = [
        {k: v.to(higher) if v.is_floating_point() else v.clone() for k, v in sample.items()}
        for sample in samples
    ]
    with converted(module, higher):
        return _answers(port, wide, rebuild)


@torch.no_grad()
def _call(port: Loaded, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in flatten(port.call(**arguments)).items()}


def _changed(recording: Recording, floor: NoiseFloor, lacking: str) -> Recording:
    note = f"noise floor without the port's rounding: {lacking}"
    notes = (*recording.manifest.notes, *([note] if lacking else []))
    manifest = recording.manifest.model_copy(update={"noise_floor": floor, "notes": notes})
    return Recording.in_memory(dict(recording), manifest)
