"""Declared places of faults: what really differs between the clean and the faulty model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.bench_location import RENAMED, SAME, outcome, report
from bench.faults.places import places, resolved
from bench.faults.port import PORTED, WITHOUT
from bench.faults.registry import FAULTS, Fault
from truestep.case import Case
from truestep.pairing.naming import ROOT, named_modules
from truestep.runtime.loading import load

INSIDE = [entry for entry in FAULTS.values() if entry.where and "wan" in entry.subjects]

# Hooks that only note what another hook of the same entry needs.
NOTES = {"text-padding-masked": ROOT, "rope-missing-on-queries": "blocks.1.attn1"}

# A mode around the whole forward, which answers calls of attention in the modules that make them.
MODES = {"softmax-in-bfloat16", "attention-in-int8"}


@pytest.fixture(scope="module")
def plain(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Any:
    """A tiny pipeline of two blocks; entries are given copies of it."""
    return load(Case(model=str(tiny_wan["wan21"]), **tiny_case))


@pytest.fixture(scope="module")
def inputs(plain: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = plain.transformer.config
    text = torch.randn(1, 8, config.text_dim, generator=generator)
    text[:, 5:] = 0
    return {
        "hidden_states": torch.randn(1, config.in_channels, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([500.3]),
        "encoder_hidden_states": text,
    }


@pytest.fixture(scope="module")
def right(plain: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return predicted(plain, inputs)


def predicted(pipe: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = pipe.transformer(**inputs, return_dict=False)[0]
    return made


def parts(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """What each module itself is: its class, hooks, forward, plain attributes and tensors."""
    found = {}
    for name, module in named_modules(model).modules.items():
        own = {
            "class": type(module),
            "hooks": (len(module._forward_hooks), len(module._forward_pre_hooks)),
            "forward": "forward" in vars(module),
        }
        own |= {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        own |= {**module._parameters, **module._buffers}
        found[name] = own
    return found


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return bool(first is second or first == second)


def changed(clean: torch.nn.Module, faulty: torch.nn.Module) -> set[str]:
    """Modules that are not what they were."""
    was, now = parts(clean), parts(faulty)
    assert set(was) == set(now)
    return {
        name
        for name in was
        if set(was[name]) != set(now[name])
        or not all(same(value, now[name][key]) for key, value in was[name].items())
    }


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


@pytest.mark.parametrize("entry", INSIDE, ids=lambda entry: entry.name)
def test_a_declared_place_is_where_the_model_differs(entry: Fault, plain: Any) -> None:
    clean = getattr(plain, entry.model)
    pipe = copy.deepcopy(plain)
    entry.apply(pipe)
    found = changed(clean, getattr(pipe, entry.model)) - {NOTES.get(entry.name)}
    declared = places(entry.where, clean)
    assert declared
    if entry.name in MODES:
        assert found == {ROOT}
        asking = {n for n, m in named_modules(clean).modules.items() if hasattr(m, "to_q")}
        assert declared == asking
        return
    assert {name for name in found if not any(within(name, p) for p in declared)} == set()
    assert {p for p in declared if not any(within(name, p) for name in found)} == set()


def test_every_fault_of_a_model_family_declares_its_place() -> None:
    families = {"transformer", "precision", "checkpoint"}
    without = {e.name for e in FAULTS.values() if e.family in families and not e.where}
    assert all("wan" in e.subjects for e in FAULTS.values() if e.family in families)
    assert without == set(WITHOUT)
    assert {e.name for e in INSIDE if e.model == "transformer"} == set(PORTED)


@pytest.mark.parametrize("name", PORTED)
def test_every_mirror_changes_the_port(
    name: str, plain: Any, inputs: dict[str, torch.Tensor], right: torch.Tensor
) -> None:
    pipe = copy.deepcopy(plain)
    PORTED[name].apply(pipe)
    assert type(pipe.transformer).__name__ == "WanPort"
    assert places(PORTED[name].where, plain.transformer)
    made = predicted(pipe, inputs)
    assert torch.isfinite(made).all()
    if FAULTS[name].family != "state":
        assert float((made - right).norm() / right.norm()) > 2e-6
        assert torch.equal(made, predicted(pipe, inputs))


def test_places_are_filled_in(plain: Any) -> None:
    assert resolved(("{middle}.ffn", "rope"), plain.transformer) == ("blocks.1.ffn", "rope")
    assert places(("{before}", "{middle}"), plain.transformer) == {"blocks.0", "blocks.1"}
    assert places(("(root)",), plain.transformer) == {ROOT}
    assert len(places(("{block}",), plain.transformer)) == len(plain.transformer.blocks)


def test_answers_are_judged() -> None:
    wanted = {"blocks.2.attn1.to_k"}
    assert outcome("blocks.2.attn1.to_k", wanted) == "exact"
    assert outcome("blocks.2.attn1", wanted) == "parent"
    assert outcome("blocks.2", wanted) == "parent"
    assert outcome("(root)", wanted) == "wrong"
    assert outcome("(root)", {"rope"}) == "parent"
    assert outcome("blocks.2.attn1.to_q", wanted) == "wrong"
    assert outcome("blocks.1", wanted) == "wrong"
    assert outcome(None, wanted) == "not named"


def test_the_report_lists_every_miss() -> None:
    def row(entry: str, outcome: str, port: str = SAME, **more: Any) -> dict[str, Any]:
        family = FAULTS[entry].family if entry in FAULTS else "benign"
        start = {"subject": "digits", "dtype": "float32", "port": port, "family": family}
        return {**start, "entry": entry, "outcome": outcome, "named": None, "kind": None, **more}

    text = report(
        [
            row("weight-scaled", "exact", named="blocks.1.ffn.net.0.proj"),
            row("rope-theta", "wrong", RENAMED, named="proj_out", where=["rope"]),
            row("rope-in-bfloat16", "without effect"),
            row("rerun", "none named", drilled=None),
            row("rope-offset", "none named", drilled="rope"),
        ]
    )
    assert text.splitlines()[2].startswith("1 of 2 (50.0%) faults inside the transformer")
    assert "| transformer | same names | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| transformer | renamed, fused | 1 | 0 | 0 | 1 | 0 |" in text
    assert "| harmless twins | 2 | 2 | 1 |" in text
    assert "- `rope-theta`, digits in float32, renamed, fused: `proj_out` instead of `rope`" in text
    assert "- `rope-in-bfloat16`: digits in float32, same names" in text
