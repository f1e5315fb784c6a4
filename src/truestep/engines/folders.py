"""A folder of diffusers, looked at before it is loaded: what it is and how it is called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.call_case import CallCase
from truestep.engines.arguments import Signature
from truestep.environment import library_version
from truestep.errors import CaseError, ModelLoadError
from truestep.text import nearest, quoted

LIBRARIES = ("diffusers", "transformers")
"""Whose code is run."""


@dataclass(frozen=True)
class Model:
    """A model folder that was looked at, and is not loaded yet.

    Attributes:
        folder: Where it is.
        name: Of its pipeline class, or of its blocks.
        pipeline: Class of the object that is loaded.
        signature: What its call takes.
        scheduler: A class in the place of the model's own.
        load: Loads it in a dtype, on the CPU.
    """

    folder: Path
    name: str
    pipeline: type
    signature: Signature
    scheduler: type | None
    load: Callable[[Any], Any]


@contextmanager
def still(library: str) -> Iterator[None]:
    """Let diffusers or transformers say nothing that is no error."""
    logging = importlib.import_module(f"{library}.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def refuse_code(file: Path, index: Mapping[str, Any]) -> None:
    """Refuse a model that brings code: none is run that is not an installed library's.

    Args:
        file: The index.
        index: What is in it: parts as `[library, class]`, with a third part in a modular one.

    Raises:
        ModelLoadError: It does.
    """
    from diffusers import pipelines

    strange = "" if isinstance(index.get("_class_name"), str) else "the pipeline"
    for part, kind in index.items():
        if part.startswith("_") or not isinstance(kind, list) or len(kind) not in (2, 3):
            continue
        hint = kind[2].get("type_hint") if kind[2:] and isinstance(kind[2], dict) else None
        for library, name in (kind[:2], hint if isinstance(hint, list) and hint[1:] else kind[:2]):
            ours = str(library).partition(".")[0] in LIBRARIES or hasattr(pipelines, str(library))
            if library is not None and not ours:
                strange = strange or f"{part} is of {library}.{name}"
    if strange:
        raise ModelLoadError(
            "the model brings code of its own, which is not run",
            where=str(file),
            measured=f"{strange}, not of {' or '.join(LIBRARIES)}",
            likely="made for custom_pipeline= or trust_remote_code=True",
            hint=f"truestep show {quoted(str(file.parent))}  # says what it holds",
        )


def no_class(name: str, kind: str, *, where: str) -> CaseError:
    """The error for a class of a kind (`Pipeline`, `Scheduler`) that the library has not."""
    import diffusers

    known = [each for each in dir(diffusers) if each.endswith(kind)]
    near = known if kind != "Pipeline" else [n for n in dir(diffusers) if _pipeline_like(n)]
    return CaseError(
        f"diffusers has no {kind.lower()} class {name!r}",
        where=where,
        measured=f"diffusers {library_version('diffusers')}, {len(known)} classes",
        likely=nearest(name, near),
        hint="truestep doctor",
    )


def _pipeline_like(name: str) -> bool:
    return name.endswith(("Pipeline", "Blocks"))


def scheduler_class(case: CallCase, own: object, folder: Path) -> type | None:
    """The scheduler class that a case asks for, if any.

    Args:
        case: What is asked for.
        own: The model's own entry: library and class.
        folder: The model, for errors.

    Raises:
        CaseError: There is none to replace, no such class, or it has not such a setting.
    """
    import diffusers

    if case.scheduler is None and not case.scheduler_settings:
        return None
    if not isinstance(own, list) or len(own) < 2 or own[1] is None:
        raise CaseError("the model has no scheduler to replace", where=str(folder))
    name = case.scheduler or str(own[1])
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and hasattr(cls, "set_timesteps")):
        raise no_class(name, "Scheduler", where="scheduler")
    settings = [n for n in inspect.signature(cls).parameters if n != "self"]
    for key in case.scheduler_settings:
        if key not in settings:
            raise CaseError(
                f"{name} has no setting {key!r}",
                where="scheduler_settings",
                measured=f"it has: {', '.join(settings)}",
                likely=nearest(key, settings),
            )
    return cls
