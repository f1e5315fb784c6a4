"""The latent gate for any engine: signature slices, FastVideo's two gates, and the full verdict.

Source of the reproduced gates: FastVideo, `latent_similarity_utils` (bundle format_version 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, ValidationError, field_validator

from truestep.errors import UsageError
from truestep.judge.floor import Limits
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.recording import readers as sources
from truestep.recording.readers import Source
from truestep.verdict import Comparison, Difference, GateResult, Record, Row, Side, Verdict

LATENT = "latent/final"
SIGNATURE = "signature"
SLICE_THRESHOLD = 5e-3
FULL_THRESHOLD = 1e-2
GATE = "fastvideo-latent/1"


class SliceSpec(Record):
    """A named, versioned signature slice.

    `ranges` holds (start, stop) for each dimension of the latent; stop None runs to the end.
    """

    kind: str = Field(min_length=1, max_length=100)
    version: int = Field(default=1, ge=1)
    ranges: tuple[tuple[int, int | None], ...] = ()

    @field_validator("ranges")
    @classmethod
    def _not_empty(
        cls, ranges: tuple[tuple[int, int | None], ...]
    ) -> tuple[tuple[int, int | None], ...]:
        for start, stop in ranges:
            if start < 0 or (stop is not None and stop <= start):
                raise ValueError(f"range ({start}, {stop}) holds nothing, or counts from the end")
        return ranges

    def cut(self, latent: torch.Tensor) -> torch.Tensor:
        """The signature of a latent: 1-D float32.

        Raises:
            UsageError: The latent has another rank or is too small.
        """
        shape = tuple(latent.shape)
        if len(self.ranges) != latent.ndim:
            raise UsageError(
                f"signature slice {self.kind!r} does not fit the latent",
                measured=f"it cuts {len(self.ranges)} dimensions; the latent's shape is {shape}",
                hint="give slice_spec=: " + ", ".join(SLICES),
            )
        for axis, ((start, stop), size) in enumerate(zip(self.ranges, shape, strict=True)):
            if (stop if stop is not None else start + 1) > size:
                raise UsageError(
                    f"the latent is too small for signature slice {self.kind!r}",
                    measured=f"dimension {axis} has {size}, the slice needs {stop or start + 1}",
                )
        index = tuple(slice(start, stop) for start, stop in self.ranges)
        return latent[index].detach().to("cpu", torch.float32).reshape(-1)


SLICES: Mapping[str, SliceSpec] = {
    "corner_3x3_first_frame": SliceSpec(
        kind="corner_3x3_first_frame", ranges=((0, 1), (0, None), (0, 1), (0, 3), (0, 3))
    ),
    "audio_first_8_timesteps": SliceSpec(
        kind="audio_first_8_timesteps", ranges=((0, 1), (0, None), (0, 8))
    ),
    "corner_3x3": SliceSpec(kind="corner_3x3", ranges=((0, 1), (0, None), (0, 3), (0, 3))),
}
"""Built-in slices for video `b c f h w`, audio `b c l` and image `b c h w` latents."""

_BY_RANK = {5: "corner_3x3_first_frame", 3: "audio_first_8_timesteps", 4: "corner_3x3"}


SliceLike = SliceSpec | str | Mapping[str, Any] | None
"""A slice, the name of a built-in one, `{kind, version}` as FastVideo writes it, or the default."""


def slice_for(latent: torch.Tensor, spec: SliceLike) -> SliceSpec:
    """The slice asked for, or the built-in one for the latent's rank.

    Raises:
        UsageError: The name is unknown, or no built-in slice has this rank.
    """
    if isinstance(spec, SliceSpec):
        return spec
    if isinstance(spec, Mapping):
        if "ranges" in spec:
            try:
                return SliceSpec.model_validate(dict(spec))
            except ValidationError as error:
                reason = " ".join(str(error).splitlines()[1:3])
                raise UsageError("slice_spec is not a slice", measured=reason) from None
        named = slice_for(latent, str(spec.get("kind")))
        return named.model_copy(update={"version": spec.get("version", named.version)})
    name = spec if spec is not None else _BY_RANK.get(latent.ndim)
    if name is None or name not in SLICES:
        raise UsageError(
            f"no signature slice named {name!r}"
            if name
            else f"no built-in signature slice for a latent of {latent.ndim} dimensions",
            measured="video is b c f h w, audio b c l, image b c h w",
            hint="give slice_spec=SliceSpec(kind=..., ranges=...) or one of " + ", ".join(SLICES),
        )
    return SLICES[name]


def check_latent(
    latent: object,
    reference: object,
    *,
    slice_spec: SliceLike = None,
    slice_cosine_threshold: float = SLICE_THRESHOLD,
    full_cosine_threshold: float = FULL_THRESHOLD,
    tolerance: float | None = None,
) -> Comparison:
    """Gate a latent that any engine produced against a stored one.

    Args:
        latent: Video `b c f h w`, audio `b c l` or image `b c h w`; tensor, array or path.
        reference: Likewise, a `Recording`, a truestep latent bundle, or a FastVideo .pt bundle.
        slice_spec: The signature slice; default by rank. A bundle made with another slice is
            `incomparable`.
        slice_cosine_threshold: Largest cosine distance of the signature (float32).
        full_cosine_threshold: Largest cosine distance of the whole, after a float16 round trip.
        tolerance: Limit on rel_l2 for the full verdict; default a noise floor.

    Returns:
        The full verdict, never laxer than the two gates, except where they fail vectors that are
        equal (their cosine of two zero vectors is 0); the gates' own outcome, reproduced as they
        are (NaN passes them), is in `gates`.

    Raises:
        UsageError: A threshold is not above 0, or the slice does not fit.
        FileFormatError: A file cannot be read.
    """
    thresholds = {"slice_cosine": slice_cosine_threshold, "full_cosine": full_cosine_threshold}
    for name, value in thresholds.items():
        if not 0 < value < 1:
            raise UsageError(
                f"threshold {name} = {value:g} cannot gate anything",
                measured="a cosine distance limit lies between 0 and 1",
                likely="a similarity was given where a distance is meant" if value < 1.01 else "",
            )
    ours, theirs = _latent_of(latent, "latent"), _latent_of(reference, "reference")
    actual, expected = ours.tensors[LATENT], theirs.tensors[LATENT]
    spec = slice_for(expected, slice_spec)
    changed = _slice_differences(spec, theirs, expected)
    rows = compare_tensors(
        {LATENT: actual},
        {LATENT: expected},
        limits=Limits(
            theirs.manifest.noise_floor if theirs.manifest else None, tolerance=tolerance
        ),
    )
    gates: tuple[GateResult, ...] = ()
    if not changed and actual.shape == expected.shape:
        stored = theirs.tensors.get(SIGNATURE)
        signature = stored if stored is not None else spec.cut(expected)
        gate, over = _fastvideo_gate(actual, expected, spec, signature, thresholds)
        gates = (gate,)
        rows = [_no_laxer(row, over) for row in rows]
    result = build_comparison(
        rows,
        actual=Side(label=ours.label, path=str(ours.path) if ours.path else None),
        reference=Side(label=theirs.label, path=str(theirs.path) if theirs.path else None),
        case_differences=changed,
        gates=gates,
        looked_at=(_coverage(spec),),
        hint="record the reference again with this slice, or give its own slice_spec="
        if changed
        else "",
    )
    if result.verdict is not Verdict.INCOMPARABLE or not changed:
        return result
    named = "; ".join(f"{d.key} {d.actual} against {d.reference}" for d in changed)
    return result.model_copy(update={"sentence": f"incomparable: {named[:300]}"})


def _coverage(spec: SliceSpec) -> str:
    return f"the whole latent and its signature {spec.kind} v{spec.version}"


def _latent_of(what: object, label: str) -> Source:
    source = sources.load(what, label=label)
    tensors = dict(source.tensors)
    if LATENT not in tensors and len(tensors) == 1:
        tensors = {LATENT: next(iter(tensors.values()))}
    if LATENT not in tensors:
        raise UsageError(
            f"the {label} holds no single latent",
            where=source.label,
            measured=f"tensors: {', '.join(list(tensors)[:5])}",
            hint=f"give one tensor, or a file whose tensor is called {LATENT}",
        )
    kept = {LATENT: tensors[LATENT]}
    if SIGNATURE in tensors:
        kept[SIGNATURE] = tensors[SIGNATURE]
    return Source(source.label, kept, source.path, source.manifest, source.bundle)


def _slice_differences(
    spec: SliceSpec, reference: Source, latent: torch.Tensor
) -> tuple[Difference, ...]:
    """What differs between the slice asked for and the one a bundle was made with."""
    found = _spec_differences(spec, reference)
    signature = reference.tensors.get(SIGNATURE)
    if found or signature is None or latent.ndim != len(spec.ranges):
        return found
    wanted, stored = spec.cut(latent).numel(), signature.numel()
    if wanted == stored:
        return ()
    return (Difference(key="signature length", actual=str(wanted), reference=str(stored)),)


def _spec_differences(spec: SliceSpec, reference: Source) -> tuple[Difference, ...]:
    stored: Mapping[str, Any] | None = None
    if reference.manifest is not None:
        stored = reference.manifest.settings.get("slice_spec")
    elif reference.bundle:
        stored = reference.bundle.get("slice_spec")
    if not isinstance(stored, Mapping):
        return ()
    wanted = spec.model_dump(mode="json")
    return tuple(
        Difference(key=f"slice_spec.{key}", actual=str(wanted[key]), reference=str(stored[key]))
        for key in ("kind", "version", "ranges")
        if key in stored and _plain(stored[key]) != _plain(wanted[key])
    )


def _plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str))


def _fastvideo_gate(
    actual: torch.Tensor,
    expected: torch.Tensor,
    spec: SliceSpec,
    signature: torch.Tensor,
    thresholds: Mapping[str, float],
) -> tuple[GateResult, str]:
    """FastVideo's arithmetic as it is: cosine in float32, the whole after float16, strict `>`.

    Returns:
        Its outcome, and which thresholds unequal vectors exceed.
    """
    own, stored = spec.cut(actual), signature.detach().to("cpu", torch.float32).reshape(-1)
    slice_distance = cosine_float32(own, stored)
    halves = [t.detach().to("cpu", torch.float16).to(torch.float32) for t in (actual, expected)]
    full_distance = cosine_float32(halves[0].reshape(-1), halves[1].reshape(-1))
    largest = float((halves[0] - halves[1]).abs().max())
    judged = (
        ("slice_cosine", slice_distance, torch.equal(own, stored)),
        ("full_cosine", full_distance, torch.equal(*halves)),
    )
    failed = any(value > thresholds[name] for name, value, _ in judged)
    over = ", ".join(
        f"{name} {value:.1e} > {thresholds[name]:g}"
        for name, value, equal in judged
        if value > thresholds[name] and not equal
    )
    zero = [n for n, value, equal in judged if equal and value > thresholds[n]]
    blind = [n for n, v in (("slice", slice_distance), ("full", full_distance)) if math.isnan(v)]
    notes = [f"blind: the {' and '.join(blind)} distance is NaN, which passes"] if blind else []
    notes += [f"{' and '.join(zero)} fails equal vectors of zeros"] if zero else []
    gate = GateResult(
        name=GATE,
        passed=not failed,
        metrics={
            "slice_cosine_distance": slice_distance,
            "full_cosine_distance": full_distance,
            "max_abs_diff": largest,
        },
        thresholds=dict(thresholds),
        note="; ".join(notes),
    )
    return gate, over


def cosine_float32(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - cosine similarity of two vectors in float32, as the reproduced gate computes it."""
    rows = actual.unsqueeze(0), reference.unsqueeze(0)
    return 1.0 - torch.nn.functional.cosine_similarity(*rows, dim=1).item()


def _no_laxer(row: Row, over: str) -> Row:
    if not over or row.verdict.exit_code in (1, 3):
        return row
    note = "; ".join(part for part in (f"{GATE}: {over}", row.note) if part)
    return row.model_copy(update={"verdict": Verdict.DRIFTED, "note": note})
