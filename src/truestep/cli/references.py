"""`truestep references`: share references through a store, promote drafts, go back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from truestep.cli.common import (
    Command,
    end,
    file_option,
    give,
    names_argument,
    print_screen,
    verbose,
    verbose_option,
)
from truestep.cli.moving import byte_bar, size_text
from truestep.screen import facts, rows
from truestep.text import pasteable

if TYPE_CHECKING:
    from truestep.recording.lock import Event
    from truestep.recording.remote.address import Address
    from truestep.recording.remote.objects import Remote
    from truestep.recording.team import Moved, Note

DAYS = 30.0
"""Objects younger than this are not pruned unless that is said."""


@dataclass(frozen=True)
class _Asked:
    """What every part of the verb is asked: which references, where, by which store."""

    names: tuple[str, ...]
    case_file: Path
    references: Path
    store: str | None

    def spelled(self, hint: str) -> str:
        """A hint of this verb, with the folder and the store of this command."""
        from truestep.recording.lock import DEFAULT_ROOT

        if not hint.startswith("truestep references ") or "--references" in hint:
            return hint
        words = ["--references", str(self.references)] if self.references != DEFAULT_ROOT else []
        place = self.address() if self.store else None
        typed = self.store if place is not None and place.folder is not None else None
        words += ["--store", typed or place.shown] if place and not place.secrets else []
        command, comment, text = hint.partition("  # ")
        return " ".join(filter(None, (command, pasteable(words)))) + comment + text

    def address(self) -> Address | None:
        """The store, if there is one."""
        from truestep.recording.remote.address import address, configured

        return address(self.store) if self.store else configured(self.references)

    def remote(self) -> Remote:
        """The store.

        Raises:
            UsageError: None is named.
        """
        from truestep.recording.remote.opening import open_store

        return open_store(self.place())

    def place(self) -> Address:
        """Where the store is; see `remote`."""
        from truestep.errors import UsageError

        place = self.address()
        if place is None:
            raise UsageError(
                "no store is named",
                hint="give --store, TRUESTEP_STORE, or [references] store in truestep.toml",
            )
        return place

    def chosen(self) -> list[str]:
        """Names in the lock of what is asked for; all where nothing is."""
        from truestep.recording.lock import read_lock

        known = list(read_lock(self.references).references)
        if not self.names:
            return known
        return list(dict.fromkeys(key for word in self.names for key in self._of(word, known)))

    def one(self) -> str:
        """The one that is asked for.

        Raises:
            UsageError: It is none, or several.
        """
        from truestep.errors import UsageError

        keys = self.chosen()
        if len(keys) != 1:
            raise UsageError(
                "this is done to one reference at a time",
                where=str(self.references),
                measured=f"{len(keys)} are meant: {', '.join(keys[:5]) or 'the lock is empty'}",
                hint="truestep references list  # each first line names one",
            )
        return keys[0]

    def _of(self, word: str, known: Sequence[str]) -> list[str]:
        """References by the name of a case, by its id, or by their path."""
        from truestep.case import read_cases
        from truestep.errors import UsageError
        from truestep.recording.store import SUFFIX
        from truestep.text import nearest

        path = word.removesuffix(SUFFIX) + SUFFIX
        cases = read_cases(self.case_file) if self.case_file.exists() else {}
        case_id = cases[word].id if word in cases else word
        found = [k for k in known if k == path or k.rpartition("/")[2] == case_id + SUFFIX]
        if not found:
            raise UsageError(
                f"the lock file names no reference of {word!r}",
                where=str(self.references),
                likely=nearest(word, [*cases, *(k.rpartition("/")[2] for k in known)]),
                hint="truestep references list",
            )
        return found


def _asking(function: Command) -> Command:
    """Arguments and options of every part."""
    import functools

    from truestep.recording.store import DEFAULT_ROOT

    def run(
        names: tuple[str, ...],
        case_file: Path,
        references: Path,
        store: str | None,
        **options: object,
    ) -> None:
        from truestep.errors import TruestepError

        asked = _Asked(names, case_file, references, store)
        try:
            function(asked, **options)
        except TruestepError as error:
            error.hint = asked.spelled(error.hint)
            raise

    functools.update_wrapper(run, function)
    for option in (
        verbose_option,
        click.option("--store", metavar="URL", help="Default: TRUESTEP_STORE, or the case file."),
        click.option(
            "--references",
            type=click.Path(path_type=Path),
            default=DEFAULT_ROOT,
            show_default=True,
            help="Reference folder.",
        ),
        file_option,
        names_argument,
    ):
        run = option(run)
    return run  # type: ignore[return-value]


_JSON = click.option(
    "--json", "json_path", is_flag=False, flag_value="-", metavar="[PATH]", help="As JSON."
)
_REASON = click.option("--reason", metavar="TEXT", help="Why; it is kept in the lock file.")
_WHO = click.option("--who", metavar="NAME", help="Default: as git knows you.")


@click.group("references")
def command() -> None:
    """References of a team: behind one URL, promoted by a reason, never lost.

    The lock file in git says what is promoted; the store has the contents, each under its hash. A
    check fetches what is not here. CASES are names in the case file, ids, or paths as they are
    listed; none is all.
    """


@command.command("list")
@_asking
@click.option("--history", is_flag=True, help="Every promotion, first to last.")
@_JSON
def list_(asked: _Asked, history: bool, json_path: str | None) -> None:
    """Show what the lock names: what is promoted, by whom, when and why; and what is a draft."""
    from truestep.cli.references_told import Listing, listed

    keys = asked.chosen()
    place = asked.address()
    rows = [listed(asked.references, key) for key in keys]
    listing = Listing(store=place.shown if place else None, references=tuple(rows))
    give(listing, json_path=json_path, show=lambda: listing.tell(history=history))


@command.command("status")
@_asking
@_JSON
def status(asked: _Asked, json_path: str | None) -> None:
    """Say what is here, what is in the store, and what should be done."""
    from truestep.cli.references_told import Listing, with_status
    from truestep.recording.remote.opening import open_store

    place = asked.address()
    remote = open_store(place) if place else None
    rows = [with_status(asked.references, key, remote) for key in asked.chosen()]
    listing = Listing(store=place.shown if place else None, references=tuple(rows))
    give(listing, json_path=json_path, show=listing.tell_status)


@command.command("push")
@_asking
@click.option(
    "--again", is_flag=True, help="Read what the store has; send again what is damaged there."
)
def push(asked: _Asked, again: bool) -> None:
    """Send to the store what the lock names and the store lacks: promoted, drafts, earlier ones."""
    from truestep.recording.team import push

    remote, keys = asked.remote(), asked.chosen()
    with byte_bar() as progress:
        moved = push(asked.references, keys, remote, again=again, progress=progress)
    _tell_moved(moved, "sent", f"PUSHED to {remote.address.shown}")


@command.command("pull")
@_asking
@click.option("--drafts", is_flag=True, help="Drafts, too.")
def pull(asked: _Asked, drafts: bool) -> None:
    """Fetch what the lock says is promoted, and put it into place.

    What is in its place and nobody knows is kept among the drafts.
    """
    from truestep.recording.team import pull

    place, keys = asked.place(), asked.chosen()
    with byte_bar() as progress:
        moved = pull(asked.references, keys, place, drafts=drafts, progress=progress)
    _tell_moved(moved, "fetched", f"PULLED from {place.shown}")


def _tell_moved(moved: Sequence[Moved], verb: str, head: str) -> None:
    """One line for each that was moved or is missing, and one for all; ends the verb."""
    listed = [
        f"  {each.state}: {each.sha256[:12]} {size_text(each.size)}, {each.name}"
        for each in sorted(moved, key=lambda each: each.state != "missing")
        if each.state in (verb, "missing")
    ]
    done = [each for each in moved if each.state == verb]
    missing = [each for each in moved if each.state == "missing"]
    rest = len(moved) - len(done) - len(missing)
    text = f"{head}: {len(done)} {verb} ({size_text(sum(each.size for each in done))})"
    text += f", {rest} there already"
    if missing:
        text = f"MISSING {len(missing)}: neither here nor in the store. {text}"
    advice = "hint: truestep references push, on a machine that has them"
    print_screen(text, rows(listed), ending=[advice] if missing else [])
    end(3 if missing else 0)


@command.command("verify")
@_asking
def verify(asked: _Asked) -> None:
    """Read every content that the lock names, here and in the store, and compare its hash."""
    from truestep.recording.tending import verify

    remote, keys = asked.remote(), asked.chosen()
    with byte_bar() as progress:
        read, faults = verify(asked.references, keys, remote, progress)
    again = asked.spelled("truestep references push --again")
    advice = f"hint: {again}  # where the contents are: sends what is missing or damaged"
    print_screen(
        f"{'FAILED' if faults else 'VERIFIED'} {read} contents in {remote.address.shown}, "
        f"{len(faults)} faults" + ("" if faults else ": what the lock names is there, bit for bit"),
        rows(f"  BAD {fault.sha256[:12]}: {fault.what}; {fault.name}" for fault in faults),
        ending=[advice] if faults else [],
    )
    end(2 if faults else 0)


@command.command("adopt")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--references", type=click.Path(path_type=Path), help="Reference folder.")
@click.option("--tier", default="default", show_default=True, help="Tier of the case.")
def adopt(file: Path, references: Path | None, tier: str) -> None:
    """Take the recording FILE as the draft of its case, device and kernel, as its manifest names
    them. It is copied, bit for bit, after every tensor's digest was compared."""
    from truestep.recording.format import Recording
    from truestep.recording.placing import adopt
    from truestep.recording.remote.objects import require_content
    from truestep.recording.store import DEFAULT_ROOT, place_of

    require_content(file)
    place = place_of(Recording.open(file), tier=tier)
    sha256, path = adopt(references or DEFAULT_ROOT, place.name, file)
    words = ["references", "promote", place.name.removesuffix(".safetensors")]
    words += ["--references", str(references)] if references else []
    print_screen(
        f"ADOPTED {sha256[:12]} as the draft of {place.name}",
        ending=[f"reference: {path}", f"promote: truestep {pasteable(words)} --reason 'adopted'"],
    )


@command.command("promote")
@_asking
@_REASON
@_WHO
def promote(asked: _Asked, reason: str | None, who: str | None) -> None:
    """Make the draft of one reference the promoted one.

    It is sent to the store first, and judged against the one that it replaces; who, when, commit,
    environment and verdict are kept in the lock file. Commit that file.
    """
    from truestep.recording.team import promote

    key, note = asked.one(), _note(asked, reason, who)
    remote = asked.remote()
    with byte_bar() as progress:
        event = promote(asked.references, key, remote, judge=_judge, note=note, progress=progress)
    _tell_event("PROMOTED", key, event, asked)


@command.command("rollback")
@_asking
@click.option("--to", metavar="HASH", help="How its hash begins; default the one before.")
@_REASON
@_WHO
def rollback(asked: _Asked, to: str | None, reason: str | None, who: str | None) -> None:
    """Make an earlier content of one reference the promoted one again."""
    from truestep.recording.team import rollback

    key, note = asked.one(), _note(asked, reason, who)
    remote = asked.remote()
    with byte_bar() as progress:
        event = rollback(
            asked.references, key, remote, to=to, judge=_judge, note=note, progress=progress
        )
    _tell_event("ROLLED BACK", key, event, asked)


def _note(asked: _Asked, reason: str | None, who: str | None) -> Note:
    """Why, and by whom; the reason is asked for where somebody can answer."""
    import sys

    from truestep.errors import UsageError
    from truestep.recording import versions
    from truestep.recording.team import Note

    if not (reason or "").strip() and sys.stdin.isatty():
        reason = click.prompt("reason", err=True)
    if not (reason or "").strip():
        raise UsageError(
            "a reason is needed: it is what the next reader will ask for",
            hint="give --reason 'TEXT'",
        )
    folder = asked.references if asked.references.is_dir() else Path()
    person = who or versions.who(folder)
    return Note(reason=str(reason).strip(), who=person, commit=versions.commit(folder))


def _judge(actual: Path, reference: Path) -> tuple[str, str]:
    """The verdict on a recording against the one that it replaces."""
    from truestep.judge.compare import compare

    result = compare(actual, reference)
    return str(result.verdict), result.sentence


def _tell_event(head: str, key: str, event: Event, asked: _Asked) -> None:
    against = f"{str(event.replaces)[:12]}, which it replaces: {event.sentence or 'not judged'}"
    commit = (event.commit or "none")[:12]
    print_screen(
        f"{head} {event.sha256[:12]} of {key.removesuffix('.safetensors')}",
        facts(
            [
                ("against", against if event.replaces else ""),
                ("by", f"{event.who}, {event.when}, commit {commit}: {event.reason}"),
            ],
            most=None if verbose() else 3,
        ),
        ending=[f"commit: git add {pasteable([str(asked.references / 'truestep.lock')])}"],
    )


@command.command("prune")
@_asking
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(min=0),
    default=DAYS,
    show_default=True,
    metavar="DAYS",
    help="Younger objects stay: a colleague may have pushed them for a commit that is not here.",
)
@click.option("--yes", is_flag=True, help="Remove them; else they are only listed.")
@click.option("--dry-run", is_flag=True, help="Only list them: the default.")
def prune(asked: _Asked, days: float, yes: bool, dry_run: bool) -> None:
    """List, or with --yes remove, objects of the store that nothing needs.

    What any version of a lock file names stays: of any branch, tag, stash or work tree of this
    repository, and in the history of any reference. Give each repository a store of its own: what
    others need is not known here.
    """
    from truestep.recording import versions
    from truestep.recording.tending import prune

    if asked.names:
        raise click.UsageError("prune looks at the whole store: leave CASES out")
    remote = asked.remote()
    remove = yes and not dry_run
    needless, kept = prune(asked.references, remote, older_s=days * 86400, remove=remove)
    listed = []
    for each in needless:
        state = "removed" if each.removed else "kept" if remove else "would remove"
        age = f"{(each.age_s or 0) / 86400:.0f} days old"
        listed.append(f"  {state}: {each.sha256[:12]} {size_text(each.size)}, {age}")
    size = size_text(sum(each.size for each in needless))
    outside = not versions.in_git(asked.references if asked.references.is_dir() else Path())
    note = "this folder is in no git repository: only its own lock file was looked at"
    gone = sum(each.removed for each in needless)
    head = f"PRUNED {gone} of" if remove else "WOULD PRUNE"
    head += f" {len(needless)} objects{'' if remove else f' ({size})'}"
    again = ""
    if needless and not remove:
        from truestep.environment import command_line

        again = f"remove them: {command_line()} --yes"
    print_screen(
        f"{head}, {kept} are needed or too young",
        facts([("note", note if outside else "")], most=2),
        rows(listed, "objects"),
        ending=[again],
    )
    end(0)
