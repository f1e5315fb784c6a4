"""What an entry of the corpus is, and the decorators that make one of a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ALL",
    "CONSTRUCTED",
    "FAMILIES",
    "PIPELINES",
    "Change",
    "Fault",
    "NotApplicable",
    "benign",
    "fault",
]

FAMILIES = (
    "text",
    "guidance",
    "schedule",
    "transformer",
    "latents",
    "vae",
    "precision",
    "checkpoint",
    "state",
    "joint",
    "benign",
)
"""Modules of the corpus, in the order of a run; the last holds what is harmless."""

CONSTRUCTED = "constructed"
"""Source of an entry for which no report was found upstream."""

PIPELINES = ("wan", "ltx2")
"""Subjects of an entry that acts on any pipeline."""

ALL = (*PIPELINES, "module")
"""Subjects of an entry that acts on any model."""

Change = Callable[[Any], Any]
"""Receives a fresh pipeline and changes it, or returns another: what `--apply` takes."""


class NotApplicable(Exception):  # noqa: N818 - it says that there is nothing to break, not an error
    """The pipeline has nothing that this entry could change."""


@dataclass(frozen=True)
class Fault:
    """One planted bug, or one harmless change.

    Attributes:
        name: Unique, with dashes: `gelu-exact`.
        family: One of `FAMILIES`.
        acts: Where: a stage, a step, a module path.
        source: URL of a thread where such a bug happened, or `constructed`; of a harmless change,
            why it is harmless.
        apply: What `--apply FILE.py:FUNCTION` takes.
        subjects: `wan`: Wan and Cosmos pipelines. `ltx2`: LTX-2 pipelines, of video and sound.
            `module`: any torch module as `pipe.transformer`.
        where: Modules that are right answers to where it broke: globs of the names in diffusers'
            Wan models, with `{middle}`, `{before}` and `{block}` as in `places`; `(root)` is the
            model's own code. Empty where nothing acts inside a model.
        model: Attribute of the pipeline that holds the model.
        stage: Where a check must say that it drifted (`truestep.keys`), declared for
            models of video and sound; with the `branch`, where one only is wrong.
        modality: `audio` or `video`, where it is wrong, or more wrong than the other; None where
            both are as wrong, or share what is wrong.
        bits: Of a harmless change: no bit differs.
        note: What the bug is: the first line of the docstring.
        slow: Takes more than 20 s before the first forward is done.
    """

    name: str
    family: str
    acts: str
    source: str
    apply: Change
    subjects: frozenset[str]
    where: tuple[str, ...] = ()
    model: str = "transformer"
    note: str = ""
    slow: bool = False
    stage: str = ""
    branch: str | None = None
    modality: str | None = None
    bits: bool = False


def fault(
    *,
    acts: str,
    source: str = CONSTRUCTED,
    subjects: Iterable[str] = ("wan",),
    where: tuple[str, ...] = (),
    model: str = "transformer",
    stage: str = "",
    branch: str | None = None,
    modality: str | None = None,
) -> Callable[[Change], Change]:
    """Make a planted bug of a function; its family is the module that it stands in."""

    def mark(function: Change) -> Change:
        family = function.__module__.rpartition(".")[2].removeprefix("truestep_apply_")
        return _mark(
            function,
            family=family,
            acts=acts,
            source=source,
            subjects=subjects,
            where=where,
            model=model,
            stage=stage,
            branch=branch,
            modality=modality,
        )

    return mark


def benign(
    *,
    acts: str,
    why: str,
    subjects: Iterable[str] = ("wan",),
    slow: bool = False,
    bits: bool = False,
) -> Callable[[Change], Change]:
    """Make a harmless twin of a function; `why` says what keeps it harmless."""

    def mark(function: Change) -> Change:
        return _mark(
            function,
            family="benign",
            acts=acts,
            source=why,
            subjects=subjects,
            slow=slow,
            bits=bits,
        )

    return mark


def _mark(
    function: Change,
    *,
    family: str,
    acts: str,
    source: str,
    subjects: Iterable[str],
    **fields: Any,
) -> Change:
    entry = Fault(
        name=function.__name__.replace("_", "-"),
        family=family,
        acts=acts,
        source=source,
        apply=function,
        subjects=frozenset(subjects),
        note=(function.__doc__ or "").strip().partition("\n")[0],
        **fields,
    )
    function.entry = entry  # type: ignore[attr-defined]
    return function
