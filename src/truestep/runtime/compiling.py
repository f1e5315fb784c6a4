"""torch.compile as a setting: `compile=on`, or one of torch's modes; the denoisers are compiled.

`torch.nn.Module.compile` compiles in place when a module is first called, so what changes the
pipeline after it is loaded is compiled with it.
"""

from __future__ import annotations

from typing import Any, TypeVar

from truestep.errors import UsageError

PipeT = TypeVar("PipeT")

DENOISERS = ("transformer", "transformer_2", "unet", "prior")
"""Components that are compiled: what runs at every step."""


def compile_pipeline(pipe: PipeT, mode: str) -> PipeT:
    """Compile the denoisers of a pipeline in place, as a case says; `off` does nothing.

    Raises:
        UsageError: Nothing there can be compiled, or no C++ compiler is here.
    """
    if mode == "off":
        return pipe
    from truestep.pairing.naming import runs_compiled

    models = [model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None]
    if not models:
        raise UsageError(
            f"compile={mode}: the pipeline has no denoiser that could be compiled",
            where=type(pipe).__name__,
            measured=f"looked for {', '.join(DENOISERS)}",
        )
    require_compiler(models[0])
    for model in models:
        if not runs_compiled(model):
            compile_model(model, mode)
    return pipe


def compile_model(model: Any, mode: str = "on") -> None:
    """torch.compile in place: the repeated blocks where diffusers names them, else all of it.

    Args:
        model: A module.
        mode: One of `call_case.COMPILE_MODES` but `off`; `on` is torch's default.
    """
    options = {} if mode == "on" else {"mode": mode}
    if getattr(model, "_repeated_blocks", None) and hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks(**options)
    else:
        model.compile(**options)


def require_compiler(model: Any) -> None:
    """Refuse before any compute where the code for a model on the CPU could not be built.

    Raises:
        UsageError: It names the compiler that is missing.
    """
    import torch

    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if parameter is not None and parameter.device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(
            "compile needs a C++ compiler, and none is here",
            measured="torch.compile looks for g++, clang++ or what CXX names",
            hint="apt-get install g++, or leave compile out",
        ) from None
