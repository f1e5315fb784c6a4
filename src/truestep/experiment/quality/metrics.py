"""Metrics of a clip's quality: frames and a prompt in, numbers out; higher is better.

Frames are `f h w c`, float32 in [0, 1]; a picture is one frame. A metric is a function that reads
numbers from one clip. A **score** is one number. A **look** is several, and scores how near they
are to those of the baseline's other seeds of that prompt: what another seed changes costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from truestep.errors import UsageError, last_frame
from truestep.experiment.quality import digits_judge as judge
from truestep.experiment.quality.mutations import Frames, blurred
from truestep.functions import function_of, parts_of

Kind = Literal["score", "look"]

CLIP_FRAMES = 4
"""Frames of a clip that an image model sees, evenly spaced."""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        read: Frames and prompt to numbers.
        kind: `score` or `look`.
        prompted: Whether it judges by the prompt: it must then notice a wrong one.
        digest: Of what decides its numbers, where that is not this package.
    """

    name: str
    read: Callable[[Frames, str], tuple[float, ...]]
    kind: Kind = "score"
    prompted: bool = True
    digest: str = ""


def builtin(model: str) -> tuple[Metric, ...]:
    """What is measured of a model without being asked: `look`, and of the digits their judge."""
    return (*(_DIGITS if model == "builtin:digits" else ()), LOOK)


def _of_judge(name: str) -> Callable[[Frames, str], tuple[float, ...]]:
    def read(frames: Frames, prompt: str) -> tuple[float, ...]:
        asked = judge.asked(prompt)
        if asked is None:
            raise UsageError(
                f"the judge of the digits cannot read the prompt {prompt!r}",
                measured="a COLOUR DIGIT moving WAY, such as: a red three moving left",
                hint="leave out --prompts: the model has 160 of its own",
            )
        return (getattr(judge.see(frames, asked), name),)

    return read


_DIGITS = tuple(Metric(name, _of_judge(name)) for name in ("digit", "direction", "colour"))


def _look(frames: Frames, _: str) -> tuple[float, ...]:
    """Light of each channel, contrast, detail at two scales, and motion, on scales of doubling."""
    light = frames.mean(axis=(0, 1, 2), dtype=np.float64)
    grey = frames.mean(axis=-1, keepdims=True)
    fine = float(np.abs(grey - blurred(grey)).mean())
    finest = float(np.abs(np.diff(grey, axis=2)).mean() + np.abs(np.diff(grey, axis=1)).mean())
    contrast = float(grey.std())
    found = [*(float(value) for value in light), contrast, fine, finest]
    if len(frames) > 1:
        steps = np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2, 3))
        found += [float(steps.mean()), float(steps.max())]
    return tuple(float(np.log2(max(value, 0.0) + 1 / 255)) for value in found)


LOOK = Metric("look", _look, kind="look", prompted=False)


def nearness(
    looks: NDArray[np.float64], baseline: NDArray[np.float64], scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scores `prompt seed` of looks: minus the distance to the mean of the baseline's other seeds.

    The seed itself is left out on both sides, so that noise that both arms share wins nothing.

    Args:
        looks: Of any arm, `prompt seed number`.
        baseline: Of the baseline, likewise; two seeds at least.
        scale: Deviation of each number between the baseline's seeds.
    """
    seeds = baseline.shape[1]
    others = (baseline.sum(axis=1, keepdims=True) - baseline) / (seeds - 1)
    apart: NDArray[np.float64] = -np.sqrt((((looks - others) / scale) ** 2).mean(axis=-1))
    return apart


def scale_of(baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation between seeds of each number of a look, never below 1 % of a doubling."""
    found: NDArray[np.float64] = np.sqrt(baseline.var(axis=1, ddof=1).mean(axis=0))
    return np.maximum(found, 0.01)


def chosen(model: str, named: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of an experiment: the builtin ones, and those of `--metric`.

    Args:
        model: Of the cases.
        named: `FILE.py:FUNCTION`, or `clip:FOLDER`.

    Raises:
        UsageError: One cannot be loaded, or two have the same name.
    """
    found = [*builtin(model), *map(_named, named)]
    names = [metric.name for metric in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"two metrics are called {twice[0]}", hint="give the function another name"
        )
    return tuple(found)


def described(names: Mapping[str, str]) -> tuple[Metric, ...]:
    """Metrics of a kept experiment by name: they read nothing, as what was read is kept."""
    own = {metric.name: metric for metric in (*_DIGITS, LOOK)}
    return tuple(own.get(name) or Metric(name, _unread, digest=names[name]) for name in names)


def _unread(frames: Frames, prompt: str) -> tuple[float, ...]:
    raise RuntimeError("a metric of a kept experiment reads no clip")


def _named(spec: str) -> Metric:
    if spec.startswith("clip:"):
        return clip(Path(spec.removeprefix("clip:")))
    import hashlib

    file, name = parts_of(spec, "--metric")
    function = function_of(Path(file), name, "--metric")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return Metric(name, _of_user(name, function), digest=digest)


def _of_user(name: str, function: Callable[..., Any]) -> Callable[[Frames, str], tuple[float, ...]]:
    def read(frames: Frames, prompt: str) -> tuple[float, ...]:
        try:
            value = function(frames.copy(), prompt)
        except Exception as error:  # the user's own code may raise anything
            text = f"the metric {name} raised {type(error).__name__}: {error}"
            raise _misused(text, function, error) from error
        try:
            return (float(value),)
        except Exception as error:  # and so may what it returns
            text = f"the metric {name} returned {type(value).__name__}, not a number"
            raise _misused(text, function, error) from error

    return read


def _misused(text: str, function: Callable[..., Any], error: BaseException) -> UsageError:
    return UsageError(
        text,
        where=_where(function, error),
        hint="it is called with frames `f h w c` (float32 in [0, 1]) and the prompt, and "
        "returns a number, higher is better",
    )


def _where(function: Callable[..., Any], error: BaseException) -> str:
    """Where the user's code raised; where it is written, if it did not get that far."""
    place = last_frame(error)
    code = getattr(function, "__code__", None)
    if code is None or not place.startswith(f"{__file__}:"):
        return place
    return f"{code.co_filename}:{code.co_firstlineno}"


def clip(folder: Path) -> Metric:
    """Cosine of picture and prompt by a CLIP model, mean over a few frames.

    Args:
        folder: Of a transformers CLIPModel with its processor; only read from the disk.

    Raises:
        UsageError: It is none, or cannot be loaded.
        MissingExtraError: transformers is not installed.
    """
    from truestep.errors import MissingExtraError
    from truestep.runtime.loading import fingerprint

    try:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    except ImportError as error:
        raise MissingExtraError(
            error.name or "transformers", "diffusers", "a CLIP metric"
        ) from None
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise UsageError(
            "the CLIP model cannot be loaded",
            where=str(folder),
            measured=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            likely="a folder holds config.json, model.safetensors, and a tokenizer and "
            "preprocessor_config.json",
            hint="give the folder of a CLIP model: clip:FOLDER",
        ) from error
    model.eval()
    read = _clip_reader(model, tokenizer, processor)
    return Metric("clip", read, digest=fingerprint(folder))


def _clip_reader(
    model: Any, tokenizer: Any, processor: Any
) -> Callable[[Frames, str], tuple[float, ...]]:
    import torch

    most = model.config.text_config.max_position_embeddings

    def read(frames: Frames, prompt: str) -> tuple[float, ...]:
        places = np.linspace(0, len(frames) - 1, min(CLIP_FRAMES, len(frames))).round().astype(int)
        pictures = [np.round(frames[at] * 255).astype(np.uint8) for at in places]
        text = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=most)
        seen = processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            made = model(
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
                pixel_values=seen["pixel_values"],
            )
        words = torch.nn.functional.normalize(made.text_embeds.double(), dim=-1)
        sights = torch.nn.functional.normalize(made.image_embeds.double(), dim=-1)
        return (float((sights @ words.T).mean()),)

    return read


def read_all(
    metrics: Sequence[Metric], frames: Frames, prompt: str
) -> dict[str, tuple[float, ...]]:
    """Numbers of every metric, by name."""
    return {metric.name: metric.read(frames, prompt) for metric in metrics}
