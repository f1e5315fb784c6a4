"""What `truestep references list` and `status` tell, as records and in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.cli.common import print_screen, verbose
from truestep.cli.moving import size_text
from truestep.recording.lock import Event
from truestep.records import Record
from truestep.screen import Entries

if TYPE_CHECKING:
    from truestep.recording.remote.objects import Remote


class Listed(Record):
    """One reference.

    Attributes:
        name: Its path: tier, device class, kernel, case.
        promoted, draft: Hashes of contents, if there are such.
        here: `yes`, `no`, `changed`, `earlier` or `pointer` (of Git LFS).
        in_store: Of each content that is promoted or a draft, whether the store has it.
        todo: The command that comes next, if one does.
    """

    name: str
    promoted: str | None = None
    draft: str | None = None
    history: tuple[Event, ...] = ()
    here: str = ""
    in_store: dict[str, bool] | None = None
    todo: str = ""


class Listing(Record):
    """All of them."""

    store: str | None
    references: tuple[Listed, ...]

    def tell(self, *, history: bool) -> None:
        """Print them; each event, or the last alone; a line each where there are many."""
        entries = []
        for each in self.references:
            name = each.name.removesuffix(".safetensors")
            events = each.history if history else each.history[-1:]
            lines = [name, *(line for event in events for line in _event_lines(event))]
            lines += [f"  draft     {each.draft[:12]}"] if each.draft else []
            state = f"promoted {str(each.promoted)[:12]}" if each.promoted else "a draft"
            short = [f"  {state:<21} {name}"]
            entries.append(lines if verbose() or len(self.references) == 1 else short)
        promoted = sum(1 for each in self.references if each.promoted)
        drafts = sum(1 for each in self.references if each.draft)
        store = self.store or "none is named"
        many = "s" * (drafts != 1)
        head = f"{counted(len(self.references))}: {promoted} promoted, {drafts} draft{many}"
        print_screen(f"{head}; store: {store}", Entries(entries))

    def tell_status(self) -> None:
        """Print what is where."""
        entries = []
        for each in sorted(self.references, key=lambda each: not each.todo):
            name = each.name.removesuffix(".safetensors")
            stands = [f"promoted {each.promoted[:12]}"] if each.promoted else ["not promoted"]
            stands += [f"draft {each.draft[:12]}"] if each.draft else []
            stands.append({
                "yes": "here", "no": "not here", "changed": "CHANGED here",
                "earlier": "an earlier one is here", "pointer": "a Git LFS pointer is here",
            }[each.here])  # fmt: skip
            if each.in_store is not None:
                lacking = [sha[:12] for sha, there in each.in_store.items() if not there]
                stands.append(
                    f"not in the store: {', '.join(lacking)}" if lacking else "in the store"
                )
            next_line = [f"  next: {each.todo}"] if each.todo else []
            entries.append([name, f"  {'; '.join(stands)}", *next_line])
        waiting = sum(1 for each in self.references if each.todo)
        head = f"{counted(len(self.references))}, {waiting} with something to do"
        store = self.store or "none is named"
        print_screen(f"{head}; store: {store}", Entries(entries, "references"))


def counted(count: int) -> str:
    """So many references."""
    return f"{count} reference{'' if count == 1 else 's'}"


def _event_lines(event: Event) -> Iterator[str]:
    """Who promoted what, when and why."""
    word = "promoted" if event.action == "promote" else "rolled back to"
    commit = f", commit {event.commit[:12]}" if event.commit else ""
    size = size_text(event.size)
    yield (f"  {word:<9} {event.sha256[:12]} {size}, {event.when}, {event.who}{commit}")
    yield f"            {event.reason}"
    if event.verdict:
        yield f"            against {str(event.replaces)[:12]}: {event.sentence}"
    device = event.environment.get("device.name", "")
    libraries = ", ".join(
        f"{name} {event.environment[key]}"
        for name in ("torch", "diffusers")
        if (key := f"library.{name}") in event.environment
    )
    revision = f", revision {event.revision}" if event.revision else ""
    if device or libraries:
        yield f"            made on {device or 'an unknown device'}, {libraries}{revision}"


def listed(root: Path, name: str) -> Listed:
    """A reference as the lock has it."""
    from truestep.recording.placing import draft_of, entry_of

    entry = entry_of(root, name)
    return Listed(name=name, promoted=entry.promoted, draft=draft_of(entry), history=entry.history)


def with_status(root: Path, name: str, remote: Remote | None) -> Listed:
    """A reference with what is here and in the store."""
    from truestep.files import sha256_of
    from truestep.recording.placing import draft_path, entry_of, judged_by
    from truestep.recording.remote.objects import name_of, pointed_at

    told, entry, path = listed(root, name), entry_of(root, name), root / name
    if not path.exists():
        here = "no"
    elif pointed_at(path) is not None:
        here = "pointer"
    else:
        content = sha256_of(path)
        same = content == judged_by(entry) or content == entry.pending
        here = "yes" if same else "earlier" if content in entry.named else "changed"
    shas = [sha for sha in dict.fromkeys((told.promoted, told.draft)) if sha]
    there = {sha: remote.size(name_of(sha)) is not None for sha in shas} if remote else None
    lacking = [sha for sha, is_there in (there or {}).items() if not is_there]
    local = here == "yes" or any(draft_path(root, sha).exists() for sha in lacking)
    todo = ""
    if here == "changed":
        todo = "truestep references pull"
    elif lacking and local:
        todo = "truestep references push"
    elif there is not None and not lacking and here != "yes":
        todo = "truestep references pull"
    elif told.draft and there is not None:
        todo = f"truestep references promote {name.removesuffix('.safetensors')}"
    return told.model_copy(update={"here": here, "in_store": there, "todo": todo})
