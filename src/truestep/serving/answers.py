"""What a trusted endpoint answered, kept in one safetensors file: pictures and what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch

from truestep.errors import FileFormatError
from truestep.files import replacing
from truestep.progress import Progress
from truestep.reading import parse_json
from truestep.recording.format import Plain
from truestep.recording.header import read_header
from truestep.serving.judging import Answers
from truestep.serving.plan import Ask, Plan, plan_of

KEY = "truestep.serve"
"""Of the metadata that says what was asked."""


def gather(
    plan: Plan, ask: Callable[[Ask], torch.Tensor], *, label: str, progress: Progress
) -> Answers:
    """Make all requests of a plan, one after the other."""
    asks = plan.asks()
    pictures = {}
    for number, (name, request) in enumerate(asks.items(), 1):
        progress(f"asking {label}", number, len(asks))
        pictures[name] = ask(request)
    return Answers(label, pictures)


def write(path: Path, plan: Plan, answers: Answers) -> None:
    """Write what an endpoint answered.

    Raises:
        WriteError: It could not be written; an existing file is untouched.
    """
    from safetensors.torch import save_file

    said = {
        "plan": plan.as_json(),
        "label": answers.label,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    tensors = {name: picture.contiguous() for name, picture in answers.pictures.items()}
    with replacing(path, "the answers") as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(said)})


def read(path: Path) -> tuple[Plan, Answers]:
    """Read what `write` wrote.

    Raises:
        FileFormatError: It is damaged, or no such file.
    """
    header = read_header(path)
    try:
        said = parse_json(header.metadata[KEY]) if KEY in header.metadata else None
        if not isinstance(said, dict):
            raise ValueError("it says nothing of what was asked")
        plan = plan_of(said["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            "the file holds no answers of an endpoint",
            where=str(path),
            measured=str(error),
            hint="one is written by truestep serve-check --output",
        ) from None
    pictures: Mapping[str, torch.Tensor] = Plain(header)
    wrong = [n for n in plan.asks() if n not in pictures or not _is_picture(pictures[n])]
    if wrong or set(pictures) != set(plan.asks()):
        raise FileFormatError(
            "the file's pictures are not those that were asked for",
            where=str(path),
            measured=f"missing or no pictures: {', '.join(wrong[:5])}"
            if wrong
            else "there are more",
        )
    return plan, Answers(str(path), dict(pictures.items()))


def _is_picture(tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype == torch.uint8
        and tensor.ndim == 4
        and tensor.shape[-1] == 3
        and (tensor.numel() > 0)
    )
