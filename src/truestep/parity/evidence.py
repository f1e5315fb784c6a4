"""Evidence of one run of a parity test, the state that follows from it, and when it expires.

A state is a function of evidence and of the world as it is now; nobody types one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from datetime import date
from enum import Enum
from pathlib import Path

from pydantic import Field

from truestep.environment import library_version
from truestep.verdict import Float, Record

SMALL = 256 * 2**20
"""Weight files up to this size are hashed whole, larger ones by 64 evenly spaced MiB."""

LIBRARIES = (
    *("truestep", "torch", "numpy", "diffusers", "transformers", "accelerate"),
    *("safetensors", "onnxruntime", "einops", "flash_attn", "xformers", "triton"),
)
"""Libraries whose version expires a state, if they were loaded when it was proven."""

_SITE = "<site-packages>"
_SAMPLES = 64


class State(str, Enum):
    """How far a component's parity is."""

    SCAFFOLD_SKIP = "scaffold_skip"
    DEBUG_RED = "debug_red"
    NON_SKIP_PASS = "non_skip_pass"
    BLOCKED = "blocked"

    __str__ = str.__str__


class MissingPart(Record):
    """A part that was not there."""

    kind: str
    what: str
    searched: tuple[str, ...] = ()
    decision: str = ""


class Numbers(Record):
    """What the comparison measured; the worst of all tensors."""

    verdict: str
    sentence: str
    tensors: int
    samples: int
    worst_tensor: str = ""
    rel_l2: Float | None = None
    ratio: Float | None = Field(default=None, description="to the noise floor")
    floor: Float | None = None
    floor_source: str = ""
    detectable: Float | None = None
    rule: str = ""


class Tolerance(Record):
    """A loosened tolerance as it was declared."""

    rel_l2: Float
    reason: str
    owner: str
    expires: str


class SideEvidence(Record):
    """One side: content hash of its outputs, and hashes of its source and weight files."""

    recording: str = ""
    code: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)
    keys: int = 0


class Fault(Record):
    """Where a red run departs, as far as it could be told.

    Attributes:
        output: First output that differs.
        module, port_module: The official module that is wrong on right inputs, and its partner.
        kind: What the difference looks like.
        operator: The call inside the module, with its line, at which the two sides part.
        weights: Parameters that do not fit their partners.
        note: Why no module is named.
    """

    output: str
    module: str = ""
    port_module: str = ""
    kind: str = ""
    operator: str = ""
    weights: str = ""
    note: str = ""

    def text(self) -> str:
        """What the state's reason adds to the verdict's sentence."""
        partner = f"`{self.port_module}` in the port" if self.port_module else ""
        return "; ".join(part for part in (partner, self.weights) if part)


class Frames(Record):
    """Decoded frames of both sides; the worst of all samples.

    Attributes:
        ssim: Mean over the frames of one video; 1 is equal. See `truestep.measure.frames`.
        psnr_db: At 8 bits, as that of every other result; infinite where both show the same.
        largest: Largest difference of one value, in [0, 2].
        count: Frames of one video.
    """

    ssim: Float | None = None
    psnr_db: Float
    largest: Float
    count: int


class Evidence(Record):
    """One run of a parity test. `result` is what pytest made of it."""

    result: str = "failed"
    date: str
    missing: MissingPart | None = None
    raised: str = ""
    numbers: Numbers | None = None
    fault: Fault | None = None
    frames: Frames | None = None
    official: SideEvidence = SideEvidence()
    port: SideEvidence = SideEvidence()
    test: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    stubs: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    tolerance: Tolerance | None = None
    uncovered: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def state_of(evidence: Evidence, today: date) -> tuple[State, str]:
    """The state that evidence proves, and why it is no better."""
    part = evidence.missing
    if part is not None:
        if part.decision:
            return State.BLOCKED, f"missing: {part.kind}: {part.what}; needs: {part.decision}"
        return State.SCAFFOLD_SKIP, f"missing: {part.kind}: {part.what}"
    if evidence.raised:
        return State.DEBUG_RED, evidence.raised
    if evidence.numbers is None:
        return State.DEBUG_RED, f"{evidence.result}, and no numbers were compared"
    if evidence.numbers.verdict not in ("identical", "equivalent"):
        told = evidence.fault.text() if evidence.fault else ""
        return State.DEBUG_RED, "; ".join(
            part for part in (evidence.numbers.sentence, told) if part
        )
    if evidence.shared:
        return State.DEBUG_RED, f"proves nothing: both sides share {', '.join(evidence.shared)}"
    if evidence.tolerance and today > date.fromisoformat(evidence.tolerance.expires):
        held = f"{evidence.tolerance.expires} (owner: {evidence.tolerance.owner})"
        return State.DEBUG_RED, f"the loosened tolerance expired on {held}"
    if evidence.uncovered:
        return State.DEBUG_RED, evidence.uncovered
    if evidence.result != "passed":
        return State.DEBUG_RED, f"{evidence.result}, although the numbers agree"
    return State.NON_SKIP_PASS, ""


def expiry(
    evidence: Evidence, root: Path, environment: Mapping[str, str] | None
) -> tuple[str, ...]:
    """What has changed since the run, so that its state no longer holds.

    Args:
        evidence: The run.
        root: The ledger's folder, which paths count from.
        environment: The present one; None leaves it unchecked.
    """
    found = []
    sides = {"official": evidence.official, "port": evidence.port}
    code = [(f"{side}: {n}", n, h) for side, e in sides.items() for n, h in e.code.items()]
    code += [(name, name, value) for name, value in evidence.test.items()]
    for kind, entries in (
        ("code", code),
        ("weights", [(n, n, h) for e in sides.values() for n, h in e.weights.items()]),
    ):
        changed = []
        for text, name, before in entries:
            path = place(name, root)
            now = (code_hash(path) if kind == "code" else weights_hash(path)) if path else before
            if now != before:
                changed.append(f"{text} {'gone' if now == GONE else ''}".strip())
        if changed:
            found.append(f"{kind} changed: {_few(changed)}")
    if environment is not None and evidence.environment:
        now_there = {
            key: _library(key) if key.startswith("library.") else environment.get(key, "-")
            for key in evidence.environment
        }
        was = [
            f"{key} {value} -> {now_there[key]}"
            for key, value in sorted(evidence.environment.items())
            if now_there[key] != value
        ]
        if was:
            found.append(f"environment changed: {_few(was)}")
    return tuple(found)


def _library(key: str) -> str:
    return library_version(key.removeprefix("library.")) or "(not installed)"


def _few(items: list[str]) -> str:
    more = len(items) - 3
    return ", ".join(items[:3]) + (f" and {more} more" if more > 0 else "")


GONE = "gone"


def code_hash(path: Path) -> str:
    """SHA-256 of a source file's text, however its lines end."""
    try:
        data = path.read_bytes()
    except OSError:
        return GONE
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()


def weights_hash(path: Path) -> str:
    """SHA-256 of a weight file; of a large one, of its size and evenly spaced parts."""
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            if size <= SMALL:
                while block := file.read(2**20):
                    digest.update(block)
                return digest.hexdigest()
            for index in range(_SAMPLES):
                file.seek((size - 2**20) * index // (_SAMPLES - 1))
                digest.update(file.read(2**20))
    except OSError:
        return GONE
    return f"sampled:{digest.hexdigest()}"


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment whose change expires a state: libraries in use, device, Python.

    The processor's model, thread counts and variables may differ between machines that run the
    same evidence; a GPU is named by `device.class`.
    """
    kept = {
        key: value
        for key, value in environment.items()
        if key in ("device.class", "torch.cuda", "torch.cudnn")
    }
    for name in LIBRARIES:
        if name in sys.modules:
            kept[f"library.{name}"] = _library(name)
    if "python" in environment:
        kept["python"] = ".".join(environment["python"].split(".")[:2])
    return kept


def label(path: Path, root: Path, named: Mapping[str, Path] | None = None) -> str:
    """A path as the ledger keeps it: from the ledger's folder, or from a place with a name."""
    import os

    resolved = path.resolve()
    for name, folder in (named or {}).items():
        if folder.resolve() in resolved.parents:
            return f"<{name}>/{resolved.relative_to(folder.resolve()).as_posix()}"
    site = Path(sysconfig.get_paths()["purelib"]).resolve()
    if site in resolved.parents:
        return f"{_SITE}/{resolved.relative_to(site).as_posix()}"
    return Path(os.path.relpath(resolved, root.resolve())).as_posix()


def place(name: str, root: Path) -> Path | None:
    """The path that a label names here; None where its place is not known or not a file."""
    import os

    if name.startswith("("):
        return None
    if name.startswith("<"):
        head, _, rest = name.partition("/")
        if head == _SITE:
            return Path(sysconfig.get_paths()["purelib"]) / rest
        folder = os.environ.get(head.strip("<>"))
        return Path(folder).expanduser() / rest if folder else None
    return root / name


def hashes(
    paths: Iterable[Path], root: Path, *, code: bool, named: Mapping[str, Path] | None = None
) -> dict[str, str]:
    """Label to hash of files, sorted."""
    make = code_hash if code else weights_hash
    return dict(sorted((label(path, root, named), make(Path(path))) for path in paths))
