"""Recordings of several ranks as one run: shares put together, branches side by side.

What is shared and how is told from the data: by the reference's noise where there is one, else by
which layout the trusted model agrees with. A tensor that all ranks should hold and do not is kept
beside the first rank's (`Run.repeated`), and is judged as a seam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.engines.branches import with_branches
from truestep.engines.conventions import as_shape
from truestep.engines.expected import ENTERING, NOISE, RANKS
from truestep.engines.ranks.files import RankFile
from truestep.engines.ranks.shares import Split, apart, ranks_said, same, split_of, splits, unique
from truestep.engines.run import Pass, Run, Step
from truestep.engines.seams import seams
from truestep.errors import UsageError
from truestep.keys import step_name
from truestep.text import quoted

Shares = dict[int, torch.Tensor]
"""A tensor of each rank."""

Score = Callable[[Run], float]
"""How far the predictions of a run are from the trusted model's, relative."""

AXES: Mapping[int, Sequence[str]] = {
    5: ("samples", "channels", "frames", "rows", "columns"),
    4: ("samples", "channels", "rows", "columns"),
    3: ("samples", "tokens", "channels"),
}
"""Names of the axes of a latent, by how many it has."""

NEARER = 0.5
"""A layout that nothing but the trusted model speaks for has to be so many times nearer."""


@dataclass(frozen=True)
class Gathered:
    """One run of several ranks.

    Attributes:
        run: As though one process had made it.
        files: Recordings by rank.
        runs: The run of each rank.
        sources: Of a pass, by step and place in it: its place in the step of each rank.
    """

    run: Run
    files: Mapping[int, RankFile]
    runs: Mapping[int, Run]
    sources: Mapping[tuple[int, int], Mapping[int, int]]


def gather(files: Sequence[RankFile], *, known: Run | None, score: Score) -> Gathered:
    """Make one run of the recordings of several ranks.

    Args:
        files: Of all ranks.
        known: The trusted pipeline's run, if there is one.
        score: Asked where only the trusted model can say how ranks share.

    Raises:
        UsageError: Ranks have other numbers of steps.
    """
    runs = {one.rank: seams(one.recording, label=str(one.path)) for one in files}
    _require_same_length(files, runs)
    stepping = {rank: run for rank, run in runs.items() if run.steps}
    label = f"{files[0].path} and {len(files) - 1} more ranks"
    if not stepping:
        run = runs[files[0].rank].but(label=label)
        return Gathered(run, {one.rank: one for one in files}, runs, {})
    gatherer = _Gatherer(stepping, known, label)
    split = _chosen(gatherer, score)
    run, sources = gatherer.run(split)
    idle = sorted({*runs} - {*stepping})
    if idle:
        run = run.but(notes=(*run.notes, f"ranks: {ranks_said(idle)} took no step"))
    return Gathered(run, {one.rank: one for one in files}, runs, sources)


def _require_same_length(files: Sequence[RankFile], runs: Mapping[int, Run]) -> None:
    lengths = {rank: len(run.steps) for rank, run in runs.items() if run.steps}
    if len({*lengths.values()}) <= 1:
        return
    partial = [str(one.rank) for one in files if one.partial]
    likely = "the ranks took another number of steps, or did not end at the same generation"
    if partial:
        likely = f"the process of rank {', '.join(partial)} ended before the generation was over"
    raise UsageError(
        "the ranks have other numbers of steps",
        measured=", ".join(f"rank {rank}: {count}" for rank, count in sorted(lengths.items())[:16]),
        likely=likely,
        hint=f"truestep show {quoted(str(files[0].path))}",
    )


def _chosen(gatherer: _Gatherer, score: Score) -> Split | None:
    """How the latent is shared: None where ranks repeat it, or should."""
    shares = gatherer.latents(0)
    if len(unique(shares)) <= 1:
        return None
    own = {rank: shares[rank] for rank in unique(shares)}
    known = gatherer.known_noise()
    if known is not None:
        if any(share.shape == as_shape(known, share)[0].shape for share in shares.values()):
            return None  # whole ones, and not the same
        exact = split_of(own, known)
        found = exact or next(iter(splits(own, known.shape)), None)
        if found is None:
            raise _no_layout(own, f"the reference's is {tuple(known.shape)}")
        return found
    scored: list[tuple[float, Split | None]] = []
    for split in (None, *splits(own)):
        scored.append((score(gatherer.run(split)[0]), split))
    alone = scored[0][0]
    best = min(scored[1:], key=lambda each: each[0], default=None)
    if best is None:
        sizes = {tuple(share.shape) for share in own.values()}
        if len(sizes) > 1:
            raise _no_layout(own, "")
        return None
    differ = len({tuple(share.shape) for share in own.values()}) > 1
    return best[1] if differ or best[0] < NEARER * alone else None


def _no_layout(shares: Shares, more: str) -> UsageError:
    sizes = ", ".join(f"rank {rank}: {tuple(one.shape)}" for rank, one in shares.items())
    return UsageError(
        "the latents of the ranks are no pieces of one",
        measured="; ".join(part for part in (sizes, more) if part),
        likely="the ranks made samples of their own: each is a run by itself",
    )


@dataclass
class _Gatherer:
    """Puts runs of ranks together under a split of the latent."""

    runs: Mapping[int, Run]
    known: Run | None
    label: str
    notes: dict[str, None] = field(default_factory=dict)
    repeated: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def known_noise(self) -> torch.Tensor | None:
        """The reference's, in as many dimensions as the ranks' own."""
        noise = self.known.noise if self.known else None
        shares = self.latents(0)
        if noise is None or not shares:
            return noise
        like = next(iter(shares.values()))
        while noise.ndim > like.ndim and noise.shape[0] == 1:
            noise = noise[0]
        return noise if noise.ndim == like.ndim else None

    def latents(self, index: int) -> Shares:
        """What enters a step, by rank."""
        return self._of(index, lambda step: step.latent)

    def _of(self, index: int, part: Callable[[Step], torch.Tensor | None]) -> Shares:
        found = {rank: part(run.steps[index]) for rank, run in self.runs.items()}
        return {rank: value for rank, value in found.items() if value is not None}

    def run(self, split: Split | None) -> tuple[Run, dict[tuple[int, int], dict[int, int]]]:
        """The one run, and where each of its passes is from."""
        self.notes, self.repeated = {}, {}
        first = next(iter(self.runs.values()))
        steps: list[Step] = []
        sources: dict[tuple[int, int], dict[int, int]] = {}
        for index, one in enumerate(first.steps):
            steps.append(self._step(index, one, split, sources))
        if split is None and len(unique(self.latents(0))) == 1:
            self.notes[f"latent: repeated on {ranks_said(sorted(self.runs))}"] = None
        elif split is not None:
            self.notes[split.said("latent", _axis(steps[0].latent, split.axis))] = None
        branched = with_branches(first.but(label=self.label, steps=tuple(steps)))
        self._note_branches(branched, sources)
        decoded = next((r for r in self.runs.values() if r.decoded_from is not None), first)
        run = replace(
            branched,
            decoded_from=decoded.decoded_from,
            decoded=decoded.decoded,
            repeated=_renamed(self.repeated, branched),
            notes=tuple(f"ranks: {note}" for note in self.notes),
        )
        return run, sources

    def _step(
        self,
        index: int,
        one: Step,
        split: Split | None,
        sources: dict[tuple[int, int], dict[int, int]],
    ) -> Step:
        number = one.number
        entering = f"{ENTERING}/{number:04d}" if index else NOISE
        latent = self._whole(entering, self.latents(index), split)
        passes = []
        for place, where in enumerate(self._passes(index)):
            given = {rank: self.runs[rank].steps[index].passes[at] for rank, at in where.items()}
            passes.append(self._pass(number, place, given, latent, split))
            sources[number, place] = where
        guided = self._whole(
            step_name(number, "guided"), self._of(index, lambda step: step.guided), split
        )
        after = self._whole(
            f"{ENTERING}/{number + 1:04d}", self._of(index, lambda step: step.after), split
        )
        return one.but(latent=latent, passes=tuple(passes), guided=guided, after=after)

    def _passes(self, index: int) -> list[dict[int, int]]:
        """Passes of a step: place in each rank's that has it; told by the text that is given."""
        found: list[tuple[torch.Tensor | None, int, dict[int, int]]] = []
        for rank, run in self.runs.items():
            seen: dict[int, int] = {}
            for at, one in enumerate(run.steps[index].passes):
                text = one.role("text")
                held = [i for i, (known, _, _) in enumerate(found) if _same_text(text, known)]
                fresh = [i for i in held if rank not in found[i][2]]
                if fresh:
                    found[fresh[0]][2][rank] = at
                else:
                    found.append((text, len(seen), {rank: at}))
                seen[at] = 1
        return [where for _, _, where in found]

    def _pass(
        self,
        number: int,
        place: int,
        given: Mapping[int, Pass],
        latent: torch.Tensor | None,
        split: Split | None,
    ) -> Pass:
        first = next(iter(given.values()))
        inputs = _tensors({rank: one.role("latent") for rank, one in given.items()})
        outputs = {rank: one.output for rank, one in given.items()}
        own = split
        if own is None and latent is not None and len(unique(inputs)) > 1:
            like = next(iter(inputs.values()))
            own = split_of(inputs, latent.to(like.dtype)) if like.ndim == latent.ndim else None
            if own is not None:
                said = own.said("latent of the model", _axis(latent, own.axis))
                self.notes[said] = None
        arguments = dict(first.arguments)
        for name, value in first.arguments.items():
            shares = _tensors({rank: one.arguments.get(name) for rank, one in given.items()})
            is_latent = name == first.names.get("latent")
            if isinstance(value, torch.Tensor) and own is not None and own.fits(shares):
                if is_latent or len(unique(shares)) > 1:
                    arguments[name] = own.gathered(shares)
            elif is_latent and len(unique(shares)) > 1:
                self._differ(step_name(number, "input"), shares)
        output = self._output(number, place, outputs, arguments, first, own)
        return replace(first, arguments=arguments, output=output)

    def _output(
        self,
        number: int,
        place: int,
        outputs: Shares,
        arguments: Mapping[str, Any],
        first: Pass,
        split: Split | None,
    ) -> torch.Tensor:
        """What all ranks of a pass predict."""
        latent = arguments.get(first.names.get("latent", ""))
        if isinstance(latent, torch.Tensor) and first.output.shape != latent.shape:
            if split is not None and split.fits(outputs):
                return split.gathered(outputs)
            by_shape = next(iter(splits(outputs, latent.shape)), None)
            if by_shape is not None and len(outputs) > 1:
                said = by_shape.said("prediction", _axis(latent, by_shape.axis))
                self.notes[said] = None
                return by_shape.gathered(outputs)
        if len(unique(outputs)) > 1:
            self._differ(f"{number}/{place}", outputs)
        return first.output

    def _whole(self, name: str, shares: Shares, split: Split | None) -> torch.Tensor | None:
        if not shares:
            return None
        if split is not None and split.fits(shares):
            return split.gathered(shares)
        if len(unique(shares)) > 1:
            self._differ(name, shares)
        return next(iter(shares.values()))

    def _differ(self, name: str, shares: Shares) -> None:
        """Note the first tensor that ranks should repeat and do not: all later ones follow."""
        if self.repeated:
            return
        first, *others = unique(shares)
        rank = max(others, key=lambda other: apart(shares[other], shares[first]))
        if shares[rank].shape == shares[first].shape:
            self.repeated[f"{RANKS}/{rank}/{name}"] = (shares[rank], shares[first])

    def _note_branches(
        self, run: Run, sources: Mapping[tuple[int, int], Mapping[int, int]]
    ) -> None:
        for step in run.steps:
            where = {
                one.branch: sorted(sources.get((step.number, place), {}))
                for place, one in enumerate(step.passes)
            }
            if len({tuple(ranks) for ranks in where.values()}) > 1:
                parts = [f"{branch} on {ranks_said(ranks)}" for branch, ranks in where.items()]
                self.notes[", ".join(parts)] = None


def _renamed(
    repeated: Mapping[str, tuple[torch.Tensor, torch.Tensor]], run: Run
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Names of passes by their branches, as these are told of the whole run."""
    found = {}
    for name, pair in repeated.items():
        head, rank, rest = name.split("/", 2)
        number, _, place = rest.partition("/")
        if number.isdecimal() and place.isdecimal():
            step = next(step for step in run.steps if step.number == int(number))
            branch = step.passes[int(place)].branch if int(place) < len(step.passes) else "cond"
            rest = step_name(int(number), branch)
        found[f"{head}/{rank}/{rest}"] = pair
    return found


def _tensors(values: Mapping[int, Any]) -> Shares:
    return {rank: value for rank, value in values.items() if isinstance(value, torch.Tensor)}


def _same_text(text: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if text is None or other is None:
        return text is other
    return text.shape == other.shape and same(text, other)


def _axis(like: torch.Tensor | None, axis: int) -> str:
    names = AXES.get(like.ndim if like is not None else 0, ())
    return names[axis] if axis < len(names) else ""
