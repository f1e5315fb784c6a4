"""A corpus of planted faults and harmless twins, on tiny pipelines of many families.

For a gate of one's own:

    from truestep.testing import corpus

    def gate(trusted, candidate):  # tuples of tensors
        return all(torch.allclose(a, b, atol=1e-3) for a, b in zip(trusted, candidate))

    for subject, entry in corpus.pairs():
        print(corpus.run(gate, subject, entry))

No hub and no download: see `truestep.testing.tiny`.
"""

from __future__ import annotations

from collections.abc import Iterator

from truestep.testing.corpus import images, latents, models, schedule, text
from truestep.testing.corpus import twins as _twins
from truestep.testing.corpus.entry import Change, Entry, NotApplicable, entries_of, fault, twin
from truestep.testing.corpus.running import TRUESTEP, Gate, Outcome, planted, run, trusted_side
from truestep.testing.corpus.subjects import SUBJECTS, Subject

__all__ = [
    "TRUESTEP",
    "Change",
    "Entry",
    "Gate",
    "NotApplicable",
    "Outcome",
    "Subject",
    "fault",
    "faults",
    "pairs",
    "planted",
    "run",
    "subjects",
    "trusted_side",
    "twin",
    "twins",
]

_FAULTS = {
    entry.name: entry
    for module in (text, images, latents, schedule, models)
    for entry in entries_of(module)
    if entry.kind == "fault"
}
_TWINS = {entry.name: entry for entry in entries_of(_twins) if entry.kind == "twin"}


def subjects() -> dict[str, Subject]:
    """The families, by name."""
    return dict(SUBJECTS)


def faults(subject: str | None = None) -> dict[str, Entry]:
    """Planted faults by name, all or those of a subject."""
    return {n: e for n, e in _FAULTS.items() if subject is None or subject in e.subjects}


def twins(subject: str | None = None) -> dict[str, Entry]:
    """Harmless twins by name, all or those of a subject."""
    return {n: e for n, e in _TWINS.items() if subject is None or subject in e.subjects}


def pairs(*names: str) -> Iterator[tuple[Subject, Entry]]:
    """Every subject with every entry that is for it, or those of some subjects."""
    for name in names or SUBJECTS:
        for entry in (*faults(name).values(), *twins(name).values()):
            yield SUBJECTS[name], entry
