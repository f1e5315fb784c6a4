"""References in a local folder: `<root>/<tier>/<device class>/<attention kernel>/<case id>`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.case import DEFAULT_TIER
from truestep.errors import FileFormatError, ReferenceNotFoundError, UsageError
from truestep.progress import Progress, silent
from truestep.recording.lock import DEFAULT_ROOT as DEFAULT_ROOT
from truestep.recording.lock import Entry, put_entry, read_lock
from truestep.text import quoted

if TYPE_CHECKING:
    from truestep.case import AnyCase
    from truestep.recording.format import Recording
    from truestep.recording.remote.address import Address

SUFFIX = ".safetensors"
PARTIAL = ".partial"
"""What is added to the name of a recording for the folder of what is finished of it."""

CANDIDATE = ".candidate"
"""What is added to the name of a reference that is not there yet, for what would be it."""

_PART = re.compile(r"[\w][\w.+-]*")


@dataclass(frozen=True)
class Place:
    """What a reference is found by. `attention` is the kernel that really ran (`flash-cpu`)."""

    case_id: str
    tier: str = DEFAULT_TIER
    device_class: str = "cpu"
    attention: str = "unknown"

    @property
    def name(self) -> str:
        """Relative path, POSIX."""
        for part in (self.tier, self.device_class, self.attention, self.case_id):
            if not _PART.fullmatch(part) or len(part.encode()) > 220:
                raise UsageError(
                    f"{part!r} cannot be part of a reference's path",
                    hint="use letters, digits, dots, dashes and underscores",
                )
        return f"{self.tier}/{self.device_class}/{self.attention}/{self.case_id}{SUFFIX}"


def candidate_of(path: Path) -> Path:
    """Where what a check made is kept until there is a reference; `Store.save` removes it."""
    return path.with_name(path.name + CANDIDATE)


def _is_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer in the place of a file."""
    from truestep.recording.remote.objects import pointed_at

    return pointed_at(path) is not None


def place_of(recording: Recording, *, tier: str = DEFAULT_TIER) -> Place:
    """Where a recording belongs, by what its manifest says really ran."""
    manifest = recording.manifest
    return Place(
        case_id=manifest.case_id or "unnamed",
        tier=tier,
        device_class=manifest.environment.get("device.class", "cpu"),
        attention=manifest.environment.get("attention.kernel", "unknown"),
    )


def is_draft(root: Path, path: Path) -> bool:
    """Whether `Store.save` has put a recording beside a promoted one."""
    from truestep.recording.placing import DRAFTS

    return path.parent == root / DRAFTS


def place_named(name: str) -> Place | None:
    """The place of a relative path; None of any other path."""
    parts = name.removesuffix(SUFFIX).split("/")
    if not name.endswith(SUFFIX) or len(parts) != 4:
        return None
    tier, device_class, attention, case_id = parts
    place = Place(case_id, tier, device_class, attention)
    try:
        return place if place.name == name else None
    except UsageError:
        return None


class Store:
    """A folder of references with a lock file, and the team's store behind it, if there is one."""

    def __init__(self, root: Path = DEFAULT_ROOT, *, progress: Progress = silent) -> None:
        self.root = root
        self._progress = progress

    @property
    def address(self) -> Address | None:
        """The team's store, as the environment or a case file says."""
        from truestep.recording.remote.address import configured

        return configured(self.root)

    def known(self) -> list[Place]:
        """Every reference that is in the folder or can be fetched into it, sorted."""
        places = {place.name: place for place in self.places()}
        lock = read_lock(self.root).references
        others = {name for name, entry in lock.items() if entry.sha256 and name not in places}
        if others and self.address is not None:
            places |= {name: place for name in others if (place := place_named(name))}
        return [places[name] for name in sorted(places)]

    def holds(self, place: Place) -> bool:
        """Whether a reference is in the folder or can be fetched into it."""
        return (self.root / place.name).exists() or place in self.known()

    def present(self, place: Place) -> Path:
        """A reference as it is in the folder; fetched where it is not there."""
        path = self.root / place.name
        return path if path.exists() else self.verified(place)

    def places(self) -> list[Place]:
        """Every reference in the folder, sorted."""
        found = []
        for path in sorted(self.root.glob(f"*/*/*/*{SUFFIX}")):
            if path.name.startswith("."):
                continue
            tier, device_class, attention, name = path.relative_to(self.root).parts
            found.append(Place(name.removesuffix(SUFFIX), tier, device_class, attention))
        return found

    def unused(self, case_ids: set[str]) -> list[Place]:
        """References of none of these cases."""
        return [place for place in self.places() if place.case_id not in case_ids]

    def partial_of(self, case_id: str, tier: str, device_class: str) -> Path:
        """What a record keeps its finished runs beside, until it shows which kernel runs."""
        place = self.root / Place(case_id, tier, device_class).name
        return place.parent.with_name(place.name)

    def save(self, recording: Recording, place: Place, *, update: bool = False) -> Path:
        """Store a recording as the reference; a kill leaves the old one or the new one.

        Of several writers at once one is last, and what it wrote is there. Where a reference is
        promoted, what is stored is a draft beside it.

        Raises:
            UsageError: A reference exists and `update` is false.
            WriteError: It could not be written; an existing reference is untouched.
        """
        from truestep.files import alone, beside, settle, sha256_of
        from truestep.recording.format import WHAT, stage

        path = self.root / place.name
        self.refuse_existing(place, update=update)
        with beside(path, WHAT) as temporary:
            sha256 = stage(temporary, recording)
            with alone(self.root, WHAT):
                self.refuse_existing(place, update=update)  # another writer may have been first
                entry = read_lock(self.root).references.get(place.name)
                if entry is not None and entry.history:
                    from truestep.recording.placing import keep_draft

                    kept = keep_draft(self.root, place.name, temporary, sha256)
                    candidate_of(path).unlink(missing_ok=True)
                    return kept
                before = sha256_of(path) if path.exists() else None
                put_entry(self.root, place.name, Entry(sha256=before, pending=sha256))
                settle(temporary, path)
                put_entry(self.root, place.name, Entry(sha256=sha256))
        candidate_of(path).unlink(missing_ok=True)
        return path

    def refuse_existing(self, place: Place, *, update: bool) -> None:
        """Raise where a reference exists that may not be replaced."""
        path = self.root / place.name
        if not update and self.holds(place):
            raise UsageError(
                "a reference of this case exists",
                where=str(path),
                hint="truestep record CASE --update  # replaces it",
            )

    def find(
        self, case: AnyCase, *, tier: str = DEFAULT_TIER, device_class: str, seed_command: str
    ) -> Path:
        """The reference of a case on a device class.

        Where references of several attention kernels exist, that of the kernel which torch picks
        here is taken; a single one is taken as it is, and the check names the kernel if it differs.

        Raises:
            ReferenceNotFoundError: There is none, or none of the kernel used here.
            FileFormatError: Its content does not match the lock.
        """
        mine = [place for place in self.known() if place.case_id == case.id]
        fitting = [p for p in mine if (p.tier, p.device_class) == (tier, device_class)]
        if len(fitting) > 1:
            from truestep.environment import attention_kernel

            kernel = attention_kernel(case.device, case.dtype)
            fitting = [place for place in fitting if place.attention == kernel]
        if not fitting:
            raise self._not_found(case, tier, device_class, mine, seed_command)
        return self.verified(fitting[0])

    def verified(self, place: Place) -> Path:
        """Path of a reference whose content matches the lock; fetched where it is not here.

        Raises:
            FileFormatError: It does not.
            EndpointError: The team's store does not answer.
        """
        from truestep.files import sha256_of

        path = self.root / place.name
        entry = read_lock(self.root).references.get(place.name)
        if entry is not None and (entry.history or not path.exists() or _is_pointer(path)):
            from truestep.recording.placing import restored

            return restored(self.root, place.name, self.address, progress=self._progress)
        while entry is not None:
            if sha256_of(path) in (entry.sha256, entry.pending):
                return path
            before, entry = entry, read_lock(self.root).references.get(place.name)
            if entry == before:  # else a writer has replaced it in between
                break
        folder = "" if self.root == DEFAULT_ROOT else f" --references {quoted(str(self.root))}"
        raise FileFormatError(
            "the reference does not match the lock file"
            if entry
            else "the reference is not in the lock file",
            where=str(path),
            likely="it was changed or copied without `truestep record`",
            hint=f"truestep references status{folder}",
        )

    def _not_found(
        self, case: AnyCase, tier: str, device_class: str, mine: list[Place], seed_command: str
    ) -> ReferenceNotFoundError:
        if mine:
            there = "for this case there is: " + "; ".join(
                f"tier {p.tier}, {p.device_class}, {p.attention}" for p in mine[:5]
            )
        else:
            ids = sorted({place.case_id for place in self.known()})
            near = difflib.get_close_matches(case.id, ids, n=1) or ids[:1]
            there = (
                f"the folder holds {len(ids)} other cases, the nearest {near[0]}"
                if near
                else "the folder holds no references"
            )
        return ReferenceNotFoundError(
            f"no reference for case {case.id}",
            where=str(self.root / tier / device_class / "*" / f"{case.id}{SUFFIX}"),
            measured=there,
            hint=seed_command,
        )
