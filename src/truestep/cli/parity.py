"""`truestep parity`: scaffold, run and report component parity tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.common import end, print_screen, verbose, verbose_option
from truestep.screen import Entries, aligned, facts, rows
from truestep.text import nearest, pasteable, quoted, say, say_json, wrapped

if TYPE_CHECKING:
    from truestep.pairing.conversion import State
    from truestep.parity.ledger import Block, Status

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group("parity")
def command() -> None:
    """Component parity: is a ported component the same as the official one, and what proves it?

    States are derived from what was run: scaffold_skip (a named part is missing), debug_red (both
    sides load, and differ or prove nothing), non_skip_pass, blocked (a decision is needed).
    """


@command.command("new")
@click.argument("family")
@click.argument("component")
@click.option(
    "--kind",
    required=True,
    help="dit, vae, encoder, scheduler, conditioner, upsampler, vocoder, generic or pipeline.",
)
@click.option(
    "--coverage",
    default="both",
    show_default=True,
    help="production_loader, implementation_subcomponent or both.",
)
@click.option("--official", default="", metavar="MODULE:CLASS", help="Official class.")
@click.option("--port", default="", metavar="MODULE:CLASS", help="Class of the port.")
@click.option("--official-dir", type=_FOLDER, help="Official repository, searched by syntax only.")
@click.option("--output", type=_FOLDER, default=Path(), help="Folder of the test.")
@click.option("--force", is_flag=True, help="Replace a test that exists.")
def new(  # 9 parameters: the options of the verb
    family: str,
    component: str,
    kind: str,
    coverage: str,
    official: str,
    port: str,
    official_dir: Path | None,
    output: Path,
    force: bool,
) -> None:
    """Write a parity test of FAMILY's COMPONENT, and its component packet."""
    from truestep.parity.missing import Family
    from truestep.parity.scaffold import write_scaffold

    test, packet = write_scaffold(
        family,
        component,
        kind=kind,
        coverage=coverage,
        output=output,
        official=official,
        port=port,
        official_dir=official_dir,
        force=force,
    )
    run = pasteable(["truestep", "parity", "run", str(test)])
    if official_dir is not None:
        variable = Family(family).variable("OFFICIAL_REF")
        if os.environ.get(variable) != str(official_dir):
            run = f"{variable}={quoted(str(official_dir))} {run}"
    print_screen(
        f"WRITTEN {family}/{component}: a parity test and its packet",
        ending=[f"test: {test}", f"packet: {packet}", f"next: {run}"],
    )


@command.command("run")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("-k", "keyword", help="Only tests that match, as pytest's -k.")
@click.option("--keep", type=_FOLDER, help="Keep the recordings of both sides here.")
@click.option("--json", "json_path", metavar="PATH|-", help="Write the status as JSON.")
@verbose_option
def run(
    paths: tuple[Path, ...], keyword: str | None, keep: Path | None, json_path: str | None
) -> None:
    """Run parity tests (default: all below this folder) and write what they prove."""
    from truestep.errors import ProcessEndedError

    arguments = [sys.executable, "-m", "pytest", "-q", "-m", "parity", "--truestep-parity"]
    arguments += ["-p", "no:cacheprovider", "-rs", "--tb=short"]
    arguments += ["-k", keyword] if keyword else []
    arguments += [f"--truestep-parity-keep={keep.resolve()}"] if keep else []
    arguments += [str(path) for path in paths or (Path(),)]
    with tempfile.TemporaryDirectory() as folder:
        finished = Path(folder) / "session.xml"  # pytest writes it when its session has ended
        arguments.append(f"--junitxml={finished}")
        done = subprocess.run(arguments, stdout=sys.stderr, check=False)
        if not finished.exists() and done.returncode not in (2, 3, 4):
            raise ProcessEndedError(
                "a parity test ended pytest before its session was over",
                measured=f"exit status {done.returncode}; the ledgers say what was proven before",
                likely="a test or a side called os._exit, crashed or was killed",
                hint="truestep parity status",
            )
    if done.returncode not in (0, 1, 2, 5):
        end(2)
    folders = sorted({p if p.is_dir() else p.parent for p in paths or (Path(),)})
    blocks = _blocks(folders)
    _write(blocks, json_path=json_path, markdown=False)
    code = _exit_code(blocks)
    end(code if code or done.returncode in (0, 5) else 1)


@command.command("status")
@click.argument("folder", type=_FOLDER, default=Path())
@click.option("--markdown", is_flag=True, help="As a status block in Markdown.")
@click.option("--json", "json_path", metavar="PATH|-", help="Write it as JSON.")
@verbose_option
def status(folder: Path, markdown: bool, json_path: str | None) -> None:
    """Show every ledger below FOLDER; a state whose grounds have changed is shown as expired."""
    blocks = _blocks([folder])
    _write(blocks, json_path=json_path, markdown=markdown)
    end(_exit_code(blocks))


@command.command("show")
@click.argument("name", metavar="FAMILY/COMPONENT")
@click.argument("folder", type=_FOLDER, default=Path())
@verbose_option
def show(name: str, folder: Path) -> None:
    """Show one component: its numbers; with -v its evidence and packet as they are kept."""
    from truestep.errors import UsageError
    from truestep.parity import tomlfile
    from truestep.parity.packet import packet_path, read_packet
    from truestep.parity.showing import details

    apart = "/" not in name and not folder.exists()  # FAMILY COMPONENT, as parity new takes them
    asked = f"{name}/{folder}" if apart else name
    blocks = _blocks([Path() if apart else folder])
    found = [(block, item) for block in blocks for item in block.everything]
    chosen = [] if apart else [p for p in found if name == f"{p[1].family}/{p[1].component}"]
    if not chosen:
        known = [f"{item.family}/{item.component}" for _, item in found]
        part = [one for one in known if one == asked or name in one.split("/")]
        place = "" if apart or folder == Path() else f" {quoted(str(folder))}"
        raise UsageError(
            f"a component is FAMILY/COMPONENT, got {name!r} and {str(folder)!r}"
            if apart
            else f"no component {name!r}",
            measured=f"there are: {', '.join(known) or 'none'}",
            likely=nearest(asked, known) if not part else "",
            hint=f"truestep parity show {quoted(part[0])}{place}" if part else "",
        )
    for block, item in chosen:
        head, *lines = details(item).splitlines()
        kept = []
        if verbose():
            evidence = _filled(item.evidence.model_dump(mode="json"))
            kept += ["", *tomlfile.dumps({"evidence": evidence}).splitlines()]
            path = packet_path(Path(block.path).parent / item.test.partition("::")[0])
            packet = read_packet(path)
            if packet is not None:
                filled = _filled(packet.model_dump(mode="json"))
                kept += ["", *tomlfile.dumps({"packet": filled}).splitlines()]
        print_screen(head, rows(lines), rows(kept))


def _filled(value: Any) -> Any:
    """Plain data without what is empty."""
    if isinstance(value, dict):
        kept = {key: _filled(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, "", [], {})}
    return [_filled(item) for item in value] if isinstance(value, list) else value


@command.command("keys")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--write",
    "write_to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a conversion skeleton here.",
)
@verbose_option
def keys(sources: tuple[Path, ...], write_to: Path | None) -> None:
    """List both state dicts side by side: of a parity test, or of files OFFICIAL and PORT."""
    from truestep.files import write_text
    from truestep.pairing.checkpoints import compare_checkpoints
    from truestep.pairing.conversion import pair_keys, side_by_side, skeleton

    official, port = _states(sources)
    pairs = pair_keys(port, official)
    cells: list[tuple[str, ...]] = [("official", "", "port", "", "how", "evidence")]
    cells += side_by_side(pairs, port, official)
    sentence = compare_checkpoints(pairs, port, official).sentence
    unmatched = sum(not pair.how for pair in pairs)
    if write_to is not None:
        write_text(write_to, skeleton(pairs, port, official), "the conversion skeleton")
    if verbose():
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        told = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        lines = [line.rstrip() for line in told]
    else:
        head, *rest = [(official, port, how) for official, _, port, _, how, _ in cells]
        ordered = sorted(rest, key=lambda row: row[2] != "unmatched")
        lines = aligned([head, *ordered], left=(0, 1, 2))
    print_screen(
        f"{len(pairs) - unmatched} pairs of {len(official)} official and {len(port)} port "
        f"parameters; {unmatched} unmatched",
        facts([("compared", sentence)], most=None if verbose() else 2),
        rows(lines, "parameters"),
        ending=[f"conversion: {write_to}" if write_to is not None else ""],
    )


def _states(sources: tuple[Path, ...]) -> tuple[State, State]:
    from truestep.errors import UsageError
    from truestep.parity.weights import load_state

    if len(sources) == 2:
        return load_state(sources[0]), load_state(sources[1])
    if len(sources) != 1 or sources[0].suffix != ".py":
        raise UsageError("give a parity test, or two weight files: OFFICIAL PORT")
    from truestep.parity.component import Loaded
    from truestep.parity.locating import parameters
    from truestep.parity.session import parity_of
    from truestep.parity.sides import loaded

    parity = parity_of(sources[0])
    sides = [loaded(load()) for load in (parity.official, parity.port)]
    official, port = (dict(parameters(s)) if isinstance(s, Loaded) else {} for s in sides)
    for name, state in (("official side", official), ("port", port)):
        if not state:
            raise UsageError(
                f"the {name} has no known parameters",
                hint="Loaded(call, module=...), state=..., or weights=[...] of files with names",
            )
    return official, port


def _blocks(folders: list[Path]) -> list[Block]:
    from truestep.environment import Environment
    from truestep.errors import UsageError
    from truestep.parity.evidence import relevant
    from truestep.parity.ledger import LEDGER, block_of

    paths = sorted({path for folder in folders for path in folder.rglob(LEDGER)})
    if not paths:
        raise UsageError(
            f"no {LEDGER} below {', '.join(str(folder) for folder in folders)}",
            hint="begin: truestep parity new FAMILY COMPONENT --kind KIND; truestep parity run",
        )
    environment = relevant(Environment.current(None))
    return [block_of(path.parent, environment, date.today()) for path in paths]


def _write(blocks: list[Block], *, json_path: str | None, markdown: bool) -> None:
    import json

    from truestep.files import write_text
    from truestep.parity import ledger

    if json_path is not None:
        data = {"schema_version": 1, "ledgers": [block.model_dump(mode="json") for block in blocks]}
        text = json.dumps(data, indent=2)
        if json_path == "-":
            say_json(text)
            return
        write_text(json_path, text, "the status")
    if markdown:
        say(ledger.markdown(blocks).removesuffix("\n"), lines=True)
        return
    every = [item for block in blocks for item in block.everything]
    proven = sum(item.proven for item in every)
    left = [f"next: {_next(b, i)}" for b in blocks for i in b.everything if not i.proven]
    noun = "component" if len(every) == 1 else "components and pipelines"
    entries = []
    for block in blocks:
        entries += [[f"ledger: {block.path}"]] if verbose() or blocks[1:] else []
        ordered = sorted(block.everything, key=lambda item: item.proven)
        entries += [_lines(item) for item in (block.everything if verbose() else ordered)]
    print_screen(
        f"{proven} of {len(every)} {noun} proven",
        Entries(entries),
        ending=[
            *([] if verbose() or blocks[1:] else [f"ledger: {block.path}" for block in blocks]),
            *left[:1],
        ],
        exit_code=_exit_code(blocks),
    )


def _next(block: Block, item: Status) -> str:
    """What comes next of a component that is not proven."""
    folder = Path(block.path).parent
    if item.expired:
        return f"truestep parity run {quoted(str(folder / item.test.partition('::')[0]))}"
    place = "" if folder == Path() else f" {quoted(str(folder))}"
    return f"truestep parity show {quoted(f'{item.family}/{item.component}')}{place} -v"


def _lines(item: Status) -> list[str]:
    """One line a component, and below it where a red one departs, or where a part was sought."""
    from truestep.parity.ledger import measured

    name = f"{item.family}/{item.component}"
    fault, numbers, part = item.evidence.fault, item.evidence.numbers, item.evidence.missing
    detail = item.reason or measured(item.evidence)
    below: list[tuple[str, str]] = []
    if fault is not None and numbers is not None:
        detail = numbers.sentence
        partner = f" ({fault.port_module} in the port)" if fault.port_module else ""
        kind = f": {fault.kind}" if fault.kind else ""
        below = [
            ("module", f"{fault.module}{partner}{kind}" if fault.module else fault.note),
            ("at", fault.operator),
            ("weights", fault.weights),
        ]
    elif part is not None:
        below = [("searched", ", ".join(part.searched))]
    word = item.status if not item.expired else f"{item.status} (was {item.state})"
    lines = wrapped("", f"{name:<24}  {word:<14}  {detail}", indent=2)
    return [*lines, *(f"    {label:<8}  {text}" for label, text in below if text)]


def _exit_code(blocks: list[Block]) -> int:
    """0 all proven; 1 one is red or expired; 3 what is not proven only lacks named parts."""
    left = [item for block in blocks for item in block.everything if not item.proven]
    if not left:
        return 0
    waiting = all(i.state in ("scaffold_skip", "blocked") and not i.expired for i in left)
    return 3 if waiting else 1
