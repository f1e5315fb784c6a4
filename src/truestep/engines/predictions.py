"""Predictions of an engine, each set against the trusted model's on the engine's own inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truestep.engines.conventions import (
    AS_IT_IS,
    DENOISED,
    PREDICTIONS,
    TIME_SCALES,
    Conversion,
    as_shape,
    into_vae,
)
from truestep.engines.expected import AGREES, DECODED, FRAMES, Predicted, Seams, time_scale
from truestep.engines.run import COND, Pass, Run, Step
from truestep.engines.trusted import LATENT, SIGMA, Denoiser, Trusted, arguments
from truestep.errors import FOREIGN, UsageError, one_line
from truestep.floors import NoiseRun
from truestep.keys import step_name
from truestep.measure.distance import distance
from truestep.progress import Progress
from truestep.replay.functions import record_function

PREDICTION = step_name(0, "prediction")
"""Of a run whose predictions could not be judged, the row that says so."""

SAMPLES = 4
"""Predictions on which the floor is measured: first, last, and between."""

NEARER = 0.2
"""Another convention is taken where predictions are so many times nearer in it."""


@dataclass(frozen=True)
class _Prediction:
    name: str
    one: Pass
    step: Step
    sigma: float | None


def put_predictions(
    found: Seams, run: Run, known: Run | None, trusted: Trusted, progress: Progress | None
) -> Conversion | None:
    """Each prediction by the trusted model on the engine's inputs, and the floor of these.

    Returns:
        The convention of the engine's predictions, where one could be told.
    """
    every = _every(run)
    if not every:
        found.unjudged["prediction"] = "no prediction was recorded"
        found.undecided[PREDICTION] = "no prediction was recorded"
        return None
    templates = _templates(known)
    try:
        scale, conversion = _convention(every, templates, trusted)
    except UsageError as error:
        found.unjudged["prediction"] = f"{error.what}; {error.measured}"
        found.undecided[PREDICTION] = error.what
        return None
    found.convert(TIME_SCALES[scale])
    found.convert(conversion.name)
    samples: dict[tuple[int, str], list[_Sample]] = {}
    denoisers: dict[tuple[int, str], Denoiser] = {}
    for done, each in enumerate(every):
        model, tensors, plain, how = _called(each, templates, trusted, scale)
        for one in how:
            found.convert(one)
        if conversion is DENOISED and each.step.latent is not None and each.sigma is not None:
            tensors[LATENT], tensors[SIGMA] = each.step.latent, torch.tensor(each.sigma)
        key = (id(model), repr(sorted(plain.items())))
        denoiser = denoisers.setdefault(key, Denoiser(model, plain, conversion))
        actual = conversion.to_trusted(each.one.output, each.step.latent, each.sigma)
        expected = denoiser(**tensors)
        found.put(each.name, actual, expected)
        own = actual if conversion is not DENOISED else None
        time = None if each.one.timestep is None else each.one.timestep * scale
        predicted = Predicted(each.one, own, expected, denoiser, tensors, time)
        found.predictions[each.name] = predicted
        if bool(found.expected[each.name].isfinite().all()):  # else there is nothing to measure
            samples.setdefault(key, []).append((each.name, tensors))
        if progress:
            progress("predictions by the trusted model", done + 1, len(every))
    for key, named in samples.items():
        # What an engine rounds is made larger by a small sigma: no step's floor is another's.
        many = len(named) if conversion is DENOISED else SAMPLES
        found.floor += _floor(denoisers[key], named, progress, many)
    return conversion


def nearness(run: Run, known: Run | None, trusted: Trusted) -> float:
    """How far the first prediction of a run is from the trusted model's on its inputs, relative.

    Infinite where the trusted model does not take these.
    """
    every = _every(run)[:2]
    try:
        with torch.no_grad():
            templates = _templates(known)
            scale, conversion = _convention(every, templates, trusted)
            model, tensors, plain, _ = _called(every[0], templates, trusted, scale)
            native = Denoiser(model, plain, AS_IT_IS)(**tensors)
    except FOREIGN:
        return float("inf")
    size = _size(conversion, every[0], native) if every else None
    return float("inf") if size is None else size


def trusted_call(
    run: Run, known: Run | None, trusted: Trusted, index: int, place: int
) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """The trusted denoiser of a prediction, and what it is called with on the engine's inputs.

    Args:
        run: The engine's.
        known: The trusted pipeline's run, if there is one.
        trusted: The trusted side.
        index: Of the step.
        place: Of the pass in it.

    Raises:
        UsageError: The trusted model needs something that nobody gave.
    """
    templates = _templates(known)
    every = _every(run)
    scale, _ = _convention(every, templates, trusted)
    step, one = run.steps[index], run.steps[index].passes[place]
    called = _Prediction("", one, step, _sigma(run, index, one))
    model, tensors, plain, _ = _called(called, templates, trusted, scale)
    return Denoiser(model, plain, AS_IT_IS), tensors


_Sample = tuple[str, dict[str, torch.Tensor]]
"""Name of a prediction, and what the trusted model is called with for it."""


def _every(run: Run) -> list[_Prediction]:
    return [
        _Prediction(step_name(step.number, one.branch), one, step, _sigma(run, index, one))
        for index, step in enumerate(run.steps)
        for one in step.passes
    ]


def _called(
    each: _Prediction, templates: Mapping[str, Pass], trusted: Trusted, scale: float
) -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, Any], tuple[str, ...]]:
    time = each.one.timestep
    model = trusted.denoiser(None if time is None else time * scale)
    template = templates.get(each.one.branch, templates.get(COND))
    return model, *arguments(each.one, model, template, scale)


def _sigma(run: Run, index: int, one: Pass) -> float | None:
    """Sigma of a prediction: of its step, or what the model is given as such."""
    sigma, time = run.sigma(index), one.timestep
    if sigma is not None:
        return sigma
    return time if time is not None and time <= 1.0 else None


def _templates(known: Run | None) -> dict[str, Pass]:
    """The reference's first prediction of each branch: what else the trusted model is given."""
    found: dict[str, Pass] = {}
    for step in known.steps if known else ():
        for one in step.passes:
            found.setdefault(one.branch, one)
    return found


def _convention(
    every: Sequence[_Prediction], templates: Mapping[str, Pass], trusted: Trusted
) -> tuple[float, Conversion]:
    """Scale of time and kind of prediction under which the engine agrees best, at a middle step.

    Where a reference says the time, its scale is that. Nothing else than what the trusted model
    gives by itself is taken unless it is far nearer.
    """
    middle = every[len(every) // 2]
    template = templates.get(middle.one.branch, templates.get(COND))
    theirs, ours = template.timestep if template else None, every[0].one.timestep
    scales = list(TIME_SCALES)
    if theirs is not None and ours is not None:
        scales = [time_scale(ours, theirs)]
    sizes: dict[tuple[float, int], float] = {}
    failed: BaseException | None = None
    for scale in scales:
        try:
            model, tensors, plain, _ = _called(middle, templates, trusted, scale)
            native = Denoiser(model, plain, AS_IT_IS)(**tensors)
        except UsageError:
            raise
        except FOREIGN as error:
            failed = error
            continue
        for number, conversion in enumerate(PREDICTIONS):
            size = _size(conversion, middle, native)
            if size is not None:
                sizes[scale, number] = size
    if not sizes:
        why = one_line(failed) if isinstance(failed, FOREIGN) else "outputs have other sizes"
        raise UsageError(
            "the trusted model cannot be called with what the engine gave its own", measured=why
        )
    chosen = next(iter(sizes))
    for other, size in sizes.items():
        if size < NEARER * sizes[chosen]:
            chosen = other
    return chosen[0], PREDICTIONS[chosen[1]]


def _size(conversion: Conversion, middle: _Prediction, native: torch.Tensor) -> float | None:
    """How far the engine is from the trusted model under a convention; None where it fits not."""
    try:
        actual = conversion.to_trusted(middle.one.output, middle.step.latent, middle.sigma)
    except ValueError:
        return None
    fitted, _ = as_shape(actual, native)
    return distance(fitted, native).rel_l2 if fitted.shape == native.shape else None


def _floor(
    model: torch.nn.Module,
    named: Sequence[tuple[str, dict[str, torch.Tensor]]],
    progress: Progress | None,
    many: int = SAMPLES,
) -> list[NoiseRun]:
    """Benign runs of the trusted model on some of the engine's inputs, under the rows' names.

    None where an engine's inputs are not finite: no floor holds for these.
    """
    named = [each for each in named if all(bool(t.isfinite().all()) for t in each[1].values())]
    if not named:
        return []
    count = min(many, len(named))
    chosen = [named[round(i * (len(named) - 1) / max(count - 1, 1))] for i in range(count)]
    recording = record_function(model, [tensors for _, tensors in chosen], progress=progress)
    floor = recording.manifest.noise_floor
    names = {f"sample/{i:04d}/output/out": name for i, (name, _) in enumerate(chosen)}
    runs = []
    for one in floor.runs if floor else ():
        rows = [
            row.model_copy(update={"name": names.get(row.name, row.name)}) for row in one.tensors
        ]
        runs.append(one.model_copy(update={"tensors": tuple(rows)}))
    return runs


class _Decoder(torch.nn.Module):
    """A trusted decoder as a function of the latent."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Frames or a picture."""
        frames: torch.Tensor = self.vae.decode(latent, return_dict=False)[0]
        return frames


def put_decoding(
    found: Seams, run: Run, known: Run | None, trusted: Trusted, progress: Progress | None
) -> None:
    """What was decoded by the trusted decoder, from what the engine's was given."""
    if run.decoded_from is None or run.decoded is None:
        return
    vae = trusted.part("vae")
    if vae is None:
        found.unjudged["decoding"] = "the trusted folder has no vae"
        return
    decoder = _Decoder(vae)
    try:
        one = _decoded(decoder, run, trusted)
    except FOREIGN as error:
        found.unjudged["decoding"] = f"the trusted vae does not take it: {one_line(error)}"
        return
    _put_decoded_from(found, run, known, trusted, one)
    fitted, _ = as_shape(run.decoded, one.expected)
    if fitted.shape != one.expected.shape:
        sizes = f"{tuple(run.decoded.shape)}, the trusted vae gives {tuple(one.expected.shape)}"
        found.unjudged["decoding"] = f"sizes {sizes}"
        return
    found.put(FRAMES, run.decoded, one.expected)
    found.floor += _floor(decoder, [(FRAMES, {"latent": one.latent})], progress)


@dataclass(frozen=True)
class _Decoded:
    """How the trusted decoder is given what the engine's was.

    Attributes:
        latent: What it is given.
        expected: What it gives.
        inside: How an engine's decoder brings its latent into the space of the VAE; empty where
            it does not.
        told: Whether what it gives says so: a decoder that is wrong does not.
    """

    latent: torch.Tensor
    expected: torch.Tensor
    inside: str
    told: bool


def _decoded(decoder: _Decoder, run: Run, trusted: Trusted) -> _Decoded:
    """The trusted decoder's of what the engine's was given, in the space that this one takes.

    What the engine's decoder gives tells that space: as for predictions, nothing else than the
    latent as it is is taken unless it is far nearer.
    """
    assert run.decoded_from is not None
    assert run.decoded is not None
    ways = into_vae(run.decoded_from.to(trusted.dtype), trusted.config("vae"))
    made: dict[str, torch.Tensor] = {}
    sizes: dict[str, float] = {}
    for how, latent in ways.items():
        made[how] = decoder(latent)
        fitted, _ = as_shape(run.decoded, made[how])
        if fitted.shape == made[how].shape:
            sizes[how] = distance(fitted, made[how]).rel_l2
        if sizes.get(how, 0.0) <= AGREES:
            break
    nearest = min(sizes, key=lambda how: sizes[how], default="")
    least = sizes.get(nearest, 0.0)
    told = least <= AGREES or all(
        least < NEARER * size for how, size in sizes.items() if how != nearest
    )
    chosen = nearest if told else ""
    return _Decoded(ways[chosen], made[chosen], chosen, told)


def _put_decoded_from(
    found: Seams, run: Run, known: Run | None, trusted: Trusted, one: _Decoded
) -> None:
    """What the decoder is given, against the end of the run.

    That is brought into the space of the VAE as the reference's is, else in the nearest way; or
    not, where the decoder does so itself.
    """
    config = trusted.config("vae")
    ways = _into_vae(run, config)
    if run.decoded_from is None or not ways:
        found.unjudged["decoder's latent"] = "it has another size than the end of the run"
        return
    if one.inside:
        found.convert(f"latent for the VAE, by the engine's decoder: {one.inside}")
        found.put(DECODED, run.decoded_from, ways[""])
        return
    given, ends = run.decoded_from, ways
    theirs = _into_vae(known, config) if known is not None and one.told else {}
    if known is not None and known.decoded_from is not None and theirs:
        given, ends = known.decoded_from, theirs
    sizes = {how: distance(given, end).rel_l2 for how, end in ends.items()}
    how = min(sizes, key=lambda name: sizes[name])
    found.convert(f"latent for the VAE: {how}" if how else "")
    found.put(DECODED, run.decoded_from, ways[how])


def _into_vae(run: Run, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if run.final is None or run.decoded_from is None:
        return {}
    end, _ = as_shape(run.final, run.decoded_from)
    return into_vae(end, config) if end.shape == run.decoded_from.shape else {}
