"""`truestep show`: what a file holds, from its header alone. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

import click

SHOWN = 20


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help=f"Every tensor, not the first {SHOWN}.")
@click.option("--json", "as_json", is_flag=True, help="The manifest (or tensor list) as JSON.")
def command(file: Path, everything: bool, as_json: bool) -> None:
    """Show what a recording or any safetensors file holds; reads the header only."""
    import json

    from truestep.recording.header import read_header, read_manifest

    header = read_header(file)
    manifest = read_manifest(file)
    if as_json:
        if manifest is not None:
            click.echo(manifest.model_dump_json(indent=2))
            return
        plain = {
            name: {"dtype": info.dtype, "shape": list(info.shape)}
            for name, info in header.tensors.items()
        }
        click.echo(json.dumps({"tensors": plain}, indent=2))
        return
    size = file.stat().st_size
    count = len(header.tensors if manifest is None else manifest.tensors)
    click.echo(f"{file}: {count} tensors, {size / 1e6:.1f} MB")
    if manifest is None:
        click.echo("a safetensors file that truestep did not write")
        rows = [(n, i.dtype, "x".join(map(str, i.shape))) for n, i in header.tensors.items()]
    else:
        _print_manifest(manifest)
        rows = [
            (e.name, e.dtype, "x".join(map(str, e.shape)) or "scalar") for e in manifest.tensors
        ]
    shown = rows if everything else rows[:SHOWN]
    widths = [max((len(row[i]) for row in shown), default=0) for i in range(2)]
    click.echo()
    for name, dtype, shape in shown:
        click.echo(f"  {name:<{widths[0]}}  {dtype:<{widths[1]}}  {shape}")
    if len(rows) > len(shown):
        click.echo(f"  ... {len(rows) - len(shown)} more (--all)")


def _print_manifest(manifest: object) -> None:
    from truestep.recording.manifest import SKETCH_SIZE, STATS, Manifest

    assert isinstance(manifest, Manifest)
    kept = {
        "full": "",
        "sketch": f": {SKETCH_SIZE:,} floats and {len(STATS)} moments of each tensor",
        "stats": f": {len(STATS)} moments of each tensor",
    }
    lines = [
        ("case", manifest.case_id or "-"),
        ("recorded", f"{manifest.created} by truestep {manifest.tool_version}"),
        ("level", manifest.level + kept[manifest.level]),
    ]
    case = manifest.case or {}
    if case:
        lines.append(("model", str(case.get("model"))))
        lines.append(("prompt", str(case.get("prompt"))[:80]))
        keys = ("seed", "steps", "guidance_scale", "height", "width", "num_frames", "dtype")
        lines.append(("settings", ", ".join(f"{k} {case[k]}" for k in keys if k in case)))
    environment = manifest.environment
    for label, key in (
        ("device", "device.name"),
        ("attention", "attention.kernel"),
        ("torch", "library.torch"),
        ("diffusers", "library.diffusers"),
    ):
        if key in environment:
            lines.append((label, environment[key]))
    floor = manifest.noise_floor
    if floor is None:
        lines.append(("floor", "none measured"))
    else:
        for pair in floor.pairs():
            runs = [run for run in floor.runs if run.pair == pair]
            kinds = ", ".join(sorted({run.kind for run in runs}))
            worst = max(
                (m.rel_l2 for run in runs for m in run.tensors if math.isfinite(m.rel_l2)),
                default=0.0,
            )
            lines.append(
                ("floor", f"{pair}: {len(runs)} runs ({kinds}), largest rel_l2 {worst:.1e}")
            )
    if manifest.timings_s:
        times = ", ".join(f"{k} {sum(v):.2f} s" for k, v in manifest.timings_s.items())
        lines.append(("time", times))
    for label, text in lines:
        click.echo(f"  {label:<10} {text}")
