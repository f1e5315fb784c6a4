"""`parity new`: write a parity test that runs as it is, and says exactly what it still needs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from truestep.errors import UsageError
from truestep.files import write_text
from truestep.parity.component import START_TOLERANCE, Coverage, Kind, Loaded, Parity
from truestep.parity.missing import Family
from truestep.parity.packet import Packet, describe, packet_path, search, write_packet

INPUTS = {
    Kind.DIT: """
        return {
            "hidden_states": torch.randn(1, 16, 2, 16, 16, generator=generator),
            "timestep": torch.randint(1, 1000, (1,), generator=generator),
            "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
        }""",
    Kind.VAE: """
        return {"z": torch.randn(1, 16, 2, 8, 8, generator=generator)}""",
    Kind.ENCODER: """
        ids = torch.randint(0, 1000, (1, 16), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}""",
    Kind.SCHEDULER: """
        return {
            "model_output": torch.randn(1, 16, 2, 8, 8, generator=generator),
            "index": torch.randint(0, 20, (1,), generator=generator),
            "sample": torch.randn(1, 16, 2, 8, 8, generator=generator),
        }""",
    Kind.CONDITIONER: """
        return {"hidden_states": torch.randn(1, 16, 64, generator=generator)}""",
    Kind.UPSAMPLER: """
        return {"sample": torch.randn(1, 16, 2, 8, 8, generator=generator)}""",
    Kind.VOCODER: """
        return {"mel": torch.randn(1, 80, 32, generator=generator)}""",
    Kind.GENERIC: """
        return {"x": torch.randn(1, 16, 32, generator=generator)}""",
    Kind.PIPELINE: """
        return {"latent": torch.randn(1, 16, 2, 8, 8, generator=generator)}""",
}
"""Inputs that a kind of component takes: shapes to adapt, drawn from one CPU generator."""

_TEST = '''"""Parity of {family}/{component} ({kind}): the port against the official implementation.

Run it with `truestep parity run {filename}`.
It skips only for a named part that is not there. {environment}
Start tolerance of this kind, used until the official side has run here and its noise floor is
measured: rel_l2 {tolerance:g}.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truestep.parity import Family, Loaded, Parity, missing

FAMILY = Family("{family}")
OFFICIAL = "{official}"
PORT = "{port}"


{loaders}def make_inputs(generator: torch.Generator) -> dict[str, Any]:
    """One sample, from a CPU generator; each side gets its own copy."""{inputs}


PARITY = Parity(
    "{family}",
    "{component}",
    kind="{kind}",
    coverage="{coverage}",
    official=load_official,
    port=load_port,
    inputs=make_inputs,
{judge})


@pytest.mark.parity(scope="{component}", coverage="{coverage}")
def {function}(truestep: Any) -> None:
    truestep.check_parity(PARITY)
'''


_LOADERS = '''def load_official() -> Loaded:
    """The official load path: real weights into the official class."""
    if not OFFICIAL:
        raise missing("official_import", "no official class is named: OFFICIAL in this file")
    official_class = FAMILY.official_class(OFFICIAL)
    weights = FAMILY.weights("*.safetensors")
    model = official_class({arguments})
    model.load_state_dict(read(weights), strict=True)
    return Loaded(model.eval(), weights=weights)


def load_port() -> Loaded:
    """The port's own load path."""
    if not PORT:
        raise missing("port_class", "no class of the port is named: PORT in this file")
    port_class = FAMILY.port_class(PORT)
    weights = FAMILY.converted("*.safetensors")
    model = port_class()
    model.load_state_dict(read(weights), strict=True)
    return Loaded(model.eval(), weights=weights)


def read(paths: list[Any]) -> dict[str, torch.Tensor]:
    """One state dict of all files."""
    from safetensors.torch import load_file

    return {{name: tensor for path in paths for name, tensor in load_file(path).items()}}


'''

_SCHEDULERS = '''def load_official() -> Loaded:
    """The official scheduler, with 20 steps."""
    if not OFFICIAL:
        raise missing("official_import", "no official class is named: OFFICIAL in this file")
    scheduler_class = FAMILY.official_class(OFFICIAL)

    def step(model_output: torch.Tensor, index: torch.Tensor, sample: torch.Tensor) -> Any:
        scheduler = scheduler_class({arguments})  # a new one: its state counts the steps
        scheduler.set_timesteps(20)
        return scheduler.step(model_output, scheduler.timesteps[int(index)], sample)

    return Loaded(step)


def load_port() -> Loaded:
    """The port's own scheduler, with as many."""
    if not PORT:
        raise missing("port_class", "no class of the port is named: PORT in this file")
    scheduler_class = FAMILY.port_class(PORT)

    def step(model_output: torch.Tensor, index: torch.Tensor, sample: torch.Tensor) -> Any:
        scheduler = scheduler_class()
        scheduler.set_timesteps(20)
        return scheduler.step(model_output, scheduler.timesteps[int(index)], sample)

    return Loaded(step)


'''


def write_scaffold(  # 9 parameters: those of `parity new`
    family: str,
    component: str,
    *,
    kind: Kind | str,
    coverage: Coverage | str = Coverage.BOTH,
    output: Path = Path(),
    official: str = "",
    port: str = "",
    official_dir: Path | None = None,
    force: bool = False,
) -> tuple[Path, Path]:
    """Write a parity test and its component packet.

    Args:
        family: Model family; names the environment overrides.
        component: Component of it.
        kind: What it is.
        coverage: Which load path of the port the test covers.
        output: Folder.
        official: `package.module:Class`; may be named later, in the test.
        port: The port's, likewise.
        official_dir: The official repository, searched for the packet without importing it.
        force: Replace a test that exists.

    Returns:
        Paths of the test and of the packet.

    Raises:
        UsageError: A name or kind is not valid, or the test exists.
        WriteError: A file could not be written.
    """
    case = Parity(family, component, kind, coverage, official=Path, port=_nothing)
    kind, coverage = Kind(case.kind), Coverage(case.coverage)
    stem = re.sub(r"[^a-z0-9]+", "_", f"test_parity_{family}_{component}".lower()).strip("_")
    path = output / f"{stem}.py"
    if path.exists() and not force:
        raise UsageError(
            "this parity test exists", where=str(path), hint="--force  # replaces it; or edit it"
        )
    for label, spec in (("--official", official), ("--port", port)):
        if spec and not re.fullmatch(r"[\w.]+:\w+", spec):
            raise UsageError(f"{label} {spec!r} names no class", hint="package.module:Class")
    if official_dir is not None and not official_dir.is_dir():
        raise UsageError("the official repository is no folder", where=str(official_dir))
    packet = _packet(case, path, official=official, official_dir=official_dir)
    loaders = _SCHEDULERS if kind is Kind.SCHEDULER else _LOADERS
    text = _TEST.format(
        family=family,
        component=component,
        kind=kind.value,
        coverage=coverage.value,
        filename=path.name,
        environment=_environment(Family(family)),
        tolerance=START_TOLERANCE[kind],
        official=official,
        port=port,
        loaders=loaders.format(arguments=_arguments(packet)),
        inputs=textwrap.indent(textwrap.dedent(INPUTS[kind]), "    "),
        judge="    judge=check_latent,\n" if kind is Kind.PIPELINE else "",
        function=stem,
    )
    if kind is Kind.PIPELINE:
        own = "from truestep.parity import"
        text = text.replace(own, f"from truestep import check_latent\n{own}", 1)
    write_text(path, text, "the parity test")
    write_packet(packet_path(path), packet)
    return path, packet_path(path)


def _packet(case: Parity, path: Path, *, official: str, official_dir: Path | None) -> Packet:
    """The component packet of a test, with what the official code says of the class."""
    places = Family(case.family)
    symbol = official.partition(":")[2]
    folder = official_dir or _installed(official)
    return describe(
        Packet(
            model_family=case.family,
            component=case.component,
            component_type=Kind(case.kind).value,
            official_ref_dir=(
                f"installed package {official.partition('.')[0]}"
                if folder and not official_dir
                else f"${places.variable('OFFICIAL_REF')}"
            ),
            local_tests_readme="README.md" if path.with_name("README.md").exists() else "",
            parity_test=path.name,
        ),
        search(folder, symbol) if folder else None,
        symbol=symbol,
        weights_variable=places.variable("LOCAL_WEIGHTS"),
    )


def _installed(spec: str) -> Path | None:
    """Folder of the package that a class is in, found without importing it."""
    from importlib.util import find_spec

    found = find_spec(spec.partition(":")[0].partition(".")[0]) if spec else None
    folders = list(found.submodule_search_locations or ()) if found else []
    return Path(folders[0]) if folders else None


def _nothing() -> Loaded:
    return Loaded(dict)


def _environment(places: Family) -> str:
    names = {
        "OFFICIAL_REF": "official repository",
        "LOCAL_WEIGHTS": "official weights",
        "CONVERTED_WEIGHTS": "weights converted for the port",
    }
    return "\n".join(
        ["Folders come from the environment:", ""]
        + [f"    {places.variable(part)}  {what}" for part, what in names.items()]
        + [""]
    )


def _arguments(packet: Packet) -> str:
    """Arguments of the official call, where there is one whose arguments are all literals."""
    import ast

    for found in packet.official_instantiation_files:
        if "." in found.symbols[0].partition("(")[0] or not found.args:
            continue
        try:
            for text in found.args:
                ast.literal_eval(text.partition("=")[2] or text)
        except (ValueError, SyntaxError):
            continue
        return ", ".join(found.args)
    return ""
