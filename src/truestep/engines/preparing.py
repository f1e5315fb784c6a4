"""What a case does to a loaded pipeline before it runs: LoRA files, then a function of the user."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from truestep.call_case import CallCase
from truestep.calls.subject import components_of
from truestep.engines.folders import still
from truestep.engines.pipelines import Change, changed
from truestep.errors import (
    CaseError,
    MissingExtraError,
    TruestepError,
    UsageError,
    last_frame,
    one_line,
)
from truestep.functions import function_of
from truestep.recording.format import read_plain
from truestep.recording.header import read_header
from truestep.runtime.applying import change_name
from truestep.text import nearest, quoted

_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_(down|up)|lora\.(down|up)|lora_linear_layer\.(down|up)|lokr_\w+|hada_\w+)"
    r"(\.\w+)*$"
)
"""What follows the module's name in the keys of such a file."""

_UP = re.compile(r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)(\.\w+)*$")
"""What follows it in the keys of the second factor: where that is zero, so is the product."""

_SHOWN = 3


def refuse_preparation(case: CallCase, pipeline: type) -> None:
    """Refuse, before weights are loaded, files that are not there and what cannot take them.

    Raises:
        CaseError: A file is absent, or the pipeline takes no LoRA.
        FileFormatError: A LoRA file cannot be read.
        MissingExtraError: Loading a LoRA needs a package that is not installed.
        UsageError, ProcessEndedError: The file of `prepare` cannot be run, or lacks the function.
    """
    for lora in case.loras:
        path = case.path_of(lora.path)
        _refuse_absent(path, "lora")
        if path.suffix.lower() != ".safetensors":
            raise CaseError(
                "a LoRA is read from a safetensors file",
                where=str(path),
                likely="a pickle could run code" if path.suffix in (".bin", ".pt") else "",
            )
        read_header(path)
    if case.loras and not hasattr(pipeline, "load_lora_weights"):
        raise CaseError(f"{pipeline.__name__} takes no LoRA", where="lora")
    if case.loras:
        try:
            importlib.import_module("peft")
        except ImportError:
            raise MissingExtraError("peft", "lora", "loading a LoRA") from None
    if case.prepare is not None:
        _refuse_absent(case.path_of(case.prepare.rpartition(":")[0]), "prepare")
        _function(case, case.prepare)


def prepared(pipe: Any, case: CallCase) -> Any:
    """A loaded pipeline as its case prepares it.

    Raises:
        CaseError: A LoRA has no module to be laid over.
        UsageError, ProcessEndedError: The function raised, or ended the process.
    """
    names = [f"lora_{index}" for index in range(len(case.loras))]
    for name, lora in zip(names, case.loras, strict=True):
        _lay_over(pipe, case.path_of(lora.path), name)
    if names:
        pipe.set_adapters(names, [lora.scale for lora in case.loras])
    if case.prepare is None:
        return pipe
    return changed(pipe, _function(case, case.prepare), what="the preparation")


def idle_loras(case: CallCase) -> list[str]:
    """The LoRA files of a case that change nothing, each with the reason."""
    said = []
    for lora in case.loras:
        reason = "its scale is 0" if lora.scale == 0 else ""
        if not reason and _all_zero(case.path_of(lora.path)):
            reason = "its second factor (B, up) is zero everywhere"
        if reason:
            said.append(f"lora {lora.path} x {lora.scale:g} changes nothing: {reason}")
    return said


def _all_zero(path: Path) -> bool:
    tensors = read_plain(path)
    modules = {_ADAPTER.sub("", key) for key in tensors if _ADAPTER.search(key)}
    ups = [key for key in tensors if _UP.search(key)]
    zero = all(not tensors[key].any() for key in ups)
    return bool(ups) and zero and modules == {_UP.sub("", key) for key in ups}


def parts_of(pipe: Any) -> frozenset[str]:
    """Names of the components that a pipeline has."""
    held = components_of(pipe) or {}
    return frozenset(str(name) for name, part in held.items() if part is not None)


@contextmanager
def removed_named(
    before: frozenset[str], pipe: Any, *, case: CallCase, change: Change | None
) -> Iterator[None]:
    """Name the component that a preparation took away, where the pipeline does not run without it.

    Args:
        before: Components as they were loaded.
        pipe: The pipeline that runs in the block.
        case, change: Whose function it was.

    Raises:
        UsageError: The pipeline met None.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        gone = sorted(before - parts_of(pipe))
        if not gone or "NoneType" not in str(error):
            raise
        names = [] if case.prepare is None else [f"the preparation {case.prepare}"]
        names += [] if change is None else [f"the change {change_name(change)}"]
        raise UsageError(
            f"the pipeline does not run once {' or '.join(names) or 'it is prepared'} has set "
            f"{', '.join(gone)} to None",
            where=last_frame(error),
            measured=one_line(error)[:300],
        ) from error


def _function(case: CallCase, spec: str) -> Change:
    file, _, name = spec.rpartition(":")
    function: Callable[[Any], Any] = function_of(case.path_of(file), name, "prepare")
    return function


def _refuse_absent(path: Path, key: str) -> None:
    if not path.is_file():
        raise CaseError(
            f"the file of {key} is not there",
            where=str(path),
            measured="" if not path.exists() else "it is no file",
            likely="paths in a case file count from that file",
            hint=f"ls {quoted(str(path.parent))}",
        )


def _lay_over(pipe: Any, path: Path, name: str) -> None:
    """Load a LoRA file; every module that it names has to be there."""
    folder = str(path.parent)
    where = {"weight_name": path.name, "local_files_only": True, "use_safetensors": True}
    try:
        with _still():
            state = type(pipe).lora_state_dict(folder, **where)
            keys = state if isinstance(state, Mapping) else state[0]
            _refuse_unmatched(pipe, path, keys)
            pipe.load_lora_weights(folder, adapter_name=name, **where)
    except TruestepError:
        raise
    except Exception as error:  # diffusers and peft raise almost anything over what a file holds
        raise CaseError(
            "the LoRA cannot be loaded",
            where=str(path),
            measured=one_line(error)[:300],
            likely="made for another model",
            hint=f"truestep show {quoted(str(path))}  # says what it holds",
        ) from error
    if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
        raise _unmatched(pipe, path, [str(key) for key in keys], len(keys))


def _refuse_unmatched(pipe: Any, path: Path, keys: Mapping[str, Any]) -> None:
    """Refuse a file that names modules which the pipeline has not, as far as names can be told."""
    modules = set(_modules(pipe))
    named = sorted({_ADAPTER.sub("", key) for key in keys if _ADAPTER.search(key)})
    missing = [name for name in named if name not in modules]
    ours = all(name.partition(".")[0] in pipe.components for name in named)
    if missing and (ours or len(missing) < len(named)):
        raise _unmatched(pipe, path, missing, len(named))


def _unmatched(pipe: Any, path: Path, missing: list[str], count: int) -> CaseError:
    shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    near = nearest(missing[0], _modules(pipe)) if missing else ""
    return CaseError(
        f"the LoRA names modules that {type(pipe).__name__} has not",
        where=str(path),
        measured=f"{len(missing)} of {count} are not in it: {shown}",
        likely="; ".join(filter(None, ("made for another model", near))),
        hint=f"truestep show {quoted(str(path))}  # says what it holds",
    )


def _modules(pipe: Any) -> Iterator[str]:
    for name, part in pipe.components.items():
        for fqn, _ in part.named_modules() if hasattr(part, "named_modules") else ():
            yield f"{name}.{fqn}".rstrip(".").replace(".base_layer", "")


@contextmanager
def _still() -> Iterator[None]:
    """Let the libraries say nothing of parts without a LoRA, or with several."""
    with still("diffusers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        yield
