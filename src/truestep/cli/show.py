"""`truestep show`: what a file or folder is and holds, and what profiles say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.screens import be_verbose, print_screen, verbose, verbose_option
from truestep.screen import Entries, aligned, facts, rows
from truestep.text import pasteable, quoted, say, say_json, wrapped

if TYPE_CHECKING:
    from truestep.controls import Cell

_ID = re.compile(r"[a-z]\d+(\.[a-z]\d+)*")
"""Of a part of a result."""


@click.command("show")
@click.argument(
    "what",
    nargs=-1,
    required=True,
    metavar="FILE | FOLDER | RESULT ID | profile [A [B]] | settings",
)
@verbose_option
@click.option(
    "--all",
    is_flag=True,
    expose_value=False,
    callback=be_verbose,
    help="The same as -v.",
    hidden=True,
)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON; of a file, its manifest.")
@click.option("--brief", is_flag=True, help="Of a file of results: what --brief of its verb gives.")
@click.option(
    "--frames",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write the key frames of a bundle there, as PNG.",
)
@click.option(
    "--model-explorer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Write the modules of a result there, as node data of Model Explorer.",
)
def command(  # one parameter an option
    what: tuple[str, ...],
    as_json: bool,
    brief: bool,
    frames: Path | None,
    model_explorer: Path | None,
) -> None:
    """Show what a file or folder is and holds; of a recording, its header alone is read.

    Of a file of results (--json), `truestep show RESULT ID` prints what an id of its brief stands
    for: a case c0, a row c0.r12, a note c0.n3.

    `truestep show profile` lists the references that an LTX-2 run can follow; with a name, every
    control of it with its source; with two, those in which they differ. `truestep show settings`
    lists what --set changes of a model that truestep runs in stages.
    """
    from truestep.errors import UsageError

    first, *names = what
    if first == "profile":
        _show_profiles(names, as_json=as_json)
    elif first == "settings" and not names and not Path(first).exists():
        _show_settings(as_json=as_json)
    elif brief:
        _show_brief(first, names)
    elif model_explorer is not None:
        _write_modules(first, names, model_explorer)
    elif len(names) == 1 and _ID.fullmatch(names[0]):
        _show_detail(first, names[0], as_json=as_json)
    elif names:
        raise UsageError("show takes one file", measured=f"got {len(what)}: {', '.join(what)}")
    else:
        show_file(Path(first), as_json=as_json)
        if frames is not None:
            _write_frames(Path(first), frames)


def _show_settings(*, as_json: bool) -> None:
    """List what --set changes."""
    import json

    from truestep.case import setting_names

    names = setting_names()
    if as_json:
        say_json(json.dumps({"settings": names}, indent=2))
        return
    say(f"{len(names)} settings of a case: --set KEY=VALUE changes one")
    for line in wrapped("", ", ".join(names), indent=2):
        say(line)


def _write_frames(file: Path, folder: Path) -> None:
    """Write the pictures that a bundle holds."""
    from truestep.cli.contents import contents_of
    from truestep.errors import UsageError
    from truestep.files import replacing
    from truestep.recording.keyframes import read_key_frames

    manifest = contents_of(file).manifest
    held = read_key_frames(manifest.settings, where=str(file)) if manifest is not None else None
    if held is None:
        raise UsageError(
            "the file holds no key frames",
            where=str(file),
            likely="nothing that was decoded is in it, or it is no bundle: `truestep bundle` makes "
            "one, with --frames of a video",
            hint=f"truestep show {quoted(str(file))}  # says what it holds",
        )
    for number, data in held.pictures.items():
        path = folder / f"{file.stem}.frame{number:04d}.png"
        with replacing(path, "a frame") as temporary:
            temporary.write_bytes(data)
        say(f"frame {number}: {path}", err=True)


def _write_modules(file: str, names: list[str], path: Path) -> None:
    """Write the modules of a result for Model Explorer, and say how it opens them."""
    from truestep.errors import UsageError
    from truestep.report.model_explorer import write
    from truestep.report.results_file import read_result

    if names:
        raise UsageError("show --model-explorer takes one file of results", measured=names[0])
    graph = write(path, read_result(file))
    say(f"node data: {path}")
    say(f"open: {pasteable(['model-explorer', str(graph), f'--node_data_paths={path}'])}")


def _show_brief(file: str, names: list[str]) -> None:
    """Print a file of results in brief."""
    from truestep.errors import UsageError
    from truestep.report.brief import brief_of
    from truestep.report.results_file import read_result

    if names:
        raise UsageError("show --brief takes one file of results", measured=f"got also {names[0]}")
    say_json(brief_of(read_result(file), path=file).to_json())


def _show_detail(file: str, name: str, *, as_json: bool) -> None:
    """Print what an id of a result stands for."""
    import json

    from truestep.report.details import detail, lines
    from truestep.report.results_file import read_result

    found = detail(read_result(file), name)
    if as_json:
        say_json(json.dumps(found, indent=2))
        return
    head, *rest = lines(found)
    print_screen(f"{name}  {head}", rows(f"  {line}" for line in rest))


def _show_profiles(names: list[str], *, as_json: bool) -> None:
    """List the profiles, print one, or compare two."""
    from truestep.errors import UsageError

    if len(names) > 2:
        raise UsageError(
            "show profile takes two names at most",
            measured=f"got {len(names)}: {', '.join(names)}",
            hint="compare all of them: truestep ab ablate CASE --all",
        )
    if as_json:
        import json

        say_json(json.dumps(_profile_data(names), indent=2))
    elif not names:
        _list_profiles()
    elif len(names) == 1:
        _print_profile(names[0])
    else:
        _print_differences(*names)


def _profile_data(names: list[str]) -> dict[str, Any]:
    """What is printed of profiles, as JSON values."""
    from truestep.controls import differences, find_profile, profiles

    if len(names) == 2:
        return {
            "profiles": names,
            "differences": {
                name: dict(zip(names, map(_cell_data, cells), strict=True))
                for name, cells in differences(*names).items()
            },
        }
    chosen = [find_profile(name) for name in names] or [*profiles().values()]
    return {
        "profiles": {
            profile.name: {
                "about": profile.about,
                "versions": list(profile.versions),
                "defaults": dict(profile.defaults),
                "controls": {name: _cell_data(cell) for name, cell in profile.cells.items()},
            }
            for profile in chosen
        }
    }


def _cell_data(cell: Cell) -> dict[str, Any]:
    value = list(cell.value) if isinstance(cell.value, tuple) else cell.value
    return {"value": value, "source": cell.source}


def _list_profiles() -> None:
    from truestep.controls import profiles

    known = profiles()
    cells = [
        (name, f"{profile.model}-{', '.join(profile.versions)}", profile.about)
        for name, profile in known.items()
    ]
    print_screen(
        f"{len(known)} profiles: truestep show profile NAME prints the controls of one, two names "
        "what differs",
        rows(aligned(cells, left=(0, 1, 2)), "profiles"),
    )


def _print_profile(name: str) -> None:
    from truestep.controls import find_profile, value_text

    profile = find_profile(name)
    width = max(map(len, profile.cells))
    entries = [
        [
            f"  {key:<{width}}  {value_text(cell.value)}",
            *(_source(cell.source) if verbose() else ()),
        ]
        for key, cell in profile.cells.items()
    ]
    defaults = ", ".join(f"{key} {value}" for key, value in profile.defaults.items())
    print_screen(
        f"{profile.name}: {profile.about}; {profile.model}-{' and '.join(profile.versions)}",
        facts([("defaults", defaults)], most=None if verbose() else 2),
        Entries(entries, "controls"),
    )


def _print_differences(first: str, second: str) -> None:
    from truestep.controls import NAMES, differences, value_text

    found = differences(first, second)
    if not found:
        print_screen(f"{first} and {second} agree in all {len(NAMES)} controls")
        return
    entries = []
    for name, cells in found.items():
        lines = [f"  {name}"]
        for profile, cell in zip((first, second), cells, strict=True):
            lines.append(f"    {profile}: {value_text(cell.value)}")
            lines += _source(cell.source)
        values = " | ".join(value_text(cell.value) for cell in cells)
        entries.append(lines if verbose() else [f"  {name}: {values}"])
    print_screen(
        f"{first} and {second} differ in {len(found)} of {len(NAMES)} controls",
        Entries(entries, "controls"),
    )


def _source(text: str) -> list[str]:
    return wrapped("", text, indent=6)


def show_file(file: Path, *, as_json: bool) -> None:
    """Print what a file or folder is and holds."""
    import json

    from truestep.cli.contents import contents_of

    found = contents_of(file)
    if as_json:
        manifest = found.manifest
        text = (
            json.dumps(found.plain(), indent=2)
            if manifest is None
            else manifest.model_dump_json(indent=2)
        )
        say_json(text)
        return
    size = "" if file.is_dir() else f", {file.stat().st_size / 1e6:.1f} MB"
    holds = found.rows or found.manifest is not None
    count = f", {len(found.rows)} {found.noun}" if holds else ""
    told = _manifest_lines(found.manifest) if found.manifest is not None else []
    if not verbose():
        told = _telling(told)
    cells = [(name, kind, _shape(last)) for name, kind, last in found.rows]
    print_screen(
        f"{file}: {found.kind}{count}{size}",
        facts(told, most=None if verbose() else 2),
        rows(f"  {line}" for line in found.lines),
        rows(aligned(cells, left=(0, 1, 2)), found.noun),
    )


_TELLING = (
    *("case", "recorded", "level", "engine", "call", "prompt", "prepared", "kept", "key frames"),
    "floor",
)
"""What of a recording is shown by default."""


def _telling(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What tells most of a recording, its calls as a number."""
    calls = sum(label == "calls" for label, _ in lines)
    kept = [line for line in lines if line[0] in _TELLING]
    return [*kept, *([("calls", f"of {calls} methods (-v)")] if calls else [])]


def _shape(shape: tuple[int, ...] | str) -> str:
    return shape if isinstance(shape, str) else "x".join(map(str, shape)) or "scalar"


def _engine_lines(engine: object) -> list[tuple[str, str]]:
    """Which engine a recording is of, and how it was started."""
    if not isinstance(engine, dict):
        return []
    program = engine.get("program")
    words = [str(word) for word in program] if isinstance(program, list) else []
    rank = f", rank {engine['rank']}" if engine.get("rank") is not None else ""
    lines = [("engine", f"{engine.get('name')}{rank}")]
    return [*lines, ("command", pasteable(words)[:200])] if words else lines


def _frame_lines(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which key frames a bundle holds."""
    from truestep.recording.manifest import KEY_FRAMES

    if KEY_FRAMES not in settings:
        return []
    from truestep.recording.keyframes import read_key_frames

    pictures = read_key_frames(settings, where="the manifest")
    return [] if pictures is None else [("key frames", pictures.text())]


def _manifest_lines(manifest: object) -> list[tuple[str, str]]:
    """What is to be said of a recording, labelled."""
    from truestep.cli.contents import call_lines
    from truestep.recording.manifest import Manifest
    from truestep.records import SKETCH_SIZE, STATS

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
    lines += _engine_lines(manifest.settings.get("engine"))
    case = manifest.case or {}
    if case:
        lines.append(("model", str(case.get("model"))))
        if "prompt" in case:
            lines.append(("prompt", str(case["prompt"])[:80]))
        keys = ("seed", "steps", "guidance_scale", "height", "width", "num_frames", "dtype")
        lines.append(("settings", ", ".join(f"{k} {case[k]}" for k in keys if k in case)))
    lines += call_lines(manifest)
    lines += _frame_lines(manifest.settings)
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
    return lines
