"""Which layers a change costs most in: as a screen, and as a list for other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.files import write_text
from truestep.screen import aligned, facts, print_lines, rows, screen

if TYPE_CHECKING:
    from truestep.experiment.sensitivity_records import LayerSensitivity, Sensitivity

LIST_VERSION = 1


def print_sensitivity(
    result: Sensitivity, *, verbose: bool, output: str | None, again: str = ""
) -> None:
    """The answer, the most sensitive layers, and where the list is.

    Args:
        output: The file that the list was written to.
        again: What to do next.
    """
    print_lines(
        screen(
            f"{'RANKED' if result.exit_code == 0 else 'UNDECIDED'} {result.change}: "
            f"{result.sentence}",
            facts(_facts(result), most=None if verbose else 2),
            rows(_table(result), "layers"),
            ending=(f"list: {output}" if output else again,),
            verbose=verbose,
        ),
        exit_code=result.exit_code,
    )


def _facts(result: Sensitivity) -> Iterator[tuple[str, str]]:
    share = result.kept_bytes / result.total_bytes if result.total_bytes else 0.0
    yield (
        "kept",
        f"{len(result.kept)} of {len(result.layers)} layers, {share:.1%} of their bytes",
    )
    pairs = zip(
        result.steps, result.nothing_kept.predictions, result.list_kept.predictions, strict=True
    )
    told = ", ".join(f"step {step}: {none:.2g} to {kept:.2g}" for step, none, kept in pairs)
    yield "predictions", told
    yield "frames", f"{result.nothing_kept.frames:.2g} to {result.list_kept.frames:.2g} (rel_l2)"
    if result.left_out:
        yield "left out", f"{len(result.left_out)}: {'; '.join(result.left_out[:2])}"
    times = result.forwards / result.forwards_generation if result.forwards_generation else 0.0
    yield "cost", f"{result.forwards} forwards, {times:.2g} generations"


def _table(result: Sensitivity) -> list[str]:
    heads = ("layer", "kept", *(f"step {step}" for step in result.steps), "end")
    return aligned([heads, *map(_cells, result.layers)])


def _cells(layer: LayerSensitivity) -> tuple[str, ...]:
    errors = (f"{error:.1e}" for error in layer.errors)
    return (layer.name, "keep" if layer.kept else "", *errors, f"{layer.score:.1e}")


def keep_list(result: Sensitivity) -> dict[str, object]:
    """The list as other tools take it.

    `modules_to_not_convert` is what diffusers' and transformers' quantisation configurations call
    it, names without the model before them, by model; `patterns` are regular expressions that match
    these names alone.
    """
    by_model: dict[str, list[str]] = {}
    for name in result.kept:
        model, _, fqn = name.partition(".")
        by_model.setdefault(model, []).append(fqn)
    return {
        "schema_version": LIST_VERSION,
        "change": result.change,
        "case": result.case_id,
        "modules_to_not_convert": by_model,
        "patterns": {
            model: [f"^{re.escape(fqn)}$" for fqn in names] for model, names in by_model.items()
        },
    }


def write_list(result: Sensitivity, path: Path) -> None:
    """Write the list as TOML where the file is called so, else as JSON."""
    found = keep_list(result)
    if path.suffix != ".toml":
        write_text(str(path), json.dumps(found, indent=2) + "\n", "the list")
        return
    lines = []
    for key, value in found.items():
        if not isinstance(value, dict):
            lines.append(f"{key} = {json.dumps(value)}")
    for key, value in found.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]"]
            lines += [
                f"{json.dumps(model)} = {json.dumps(names)}" for model, names in value.items()
            ]
    write_text(str(path), "\n".join(lines) + "\n", "the list")
