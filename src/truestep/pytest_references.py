"""What the checks of a test store as their references, and where. Imports no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from truestep.recording.format import Recording
    from truestep.recording.store import Place

KEPT = {
    "there": "there already",
    "rule": "there already, made by another rule than the test's of now",
    "promoted": "promoted: what was made is a draft beside it",
}
"""Why an update did not replace a reference."""


@dataclass(frozen=True)
class Made:
    """What a check would store as its reference.

    Attributes:
        settings: By which the reference is judged, kept with it.
        record: Records it, where that takes a run of its own.
    """

    tensors: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    record: Callable[[], Recording] | None = None

    def recording(self, place: Place) -> Recording:
        """The reference."""
        if self.record is not None:
            return self.record()
        return _recording(self.tensors, place, self.settings)

    def kept(self, reference: Path) -> str:
        """Why an update of missing references does not replace one: a word of `KEPT`."""
        from truestep.recording.format import Recording

        settings = Recording.open(reference).manifest.settings
        known = {name: settings.get(name) for name in self.settings}
        return "there" if known == dict(self.settings) else "rule"


def _recording(tensors: Mapping[str, Any], place: Place, settings: Mapping[str, Any]) -> Recording:
    from truestep.environment import Environment
    from truestep.recording.format import Recording
    from truestep.recording.table import manifest_of

    environment = Environment.current("cpu" if place.device_class == "cpu" else None)
    manifest = manifest_of(tensors, environment, case_id=place.case_id, settings=dict(settings))
    return Recording.in_memory(tensors, manifest)


def reference_id(nodeid: str, name: str) -> str:
    """File name of a check's reference: readable, and as unique as the test and the name."""
    full = f"{nodeid}::{name}"
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", f"{nodeid.rsplit('/', 1)[-1]} {name}").strip("-")
    return f"{slug[:100]}-{hashlib.sha256(full.encode()).hexdigest()[:10]}"


def reference_root(config: pytest.Config) -> Path:
    given = config.getoption("truestep_references")
    return Path(given) if given else config.rootpath / "truestep-references"
