"""Modules by the name PyTorch gives them, without wrappers, and choosing among them by globs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.nests import safe_fqn

ROOT = "(root)"

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"})
"""Classes whose `module` is a wrapped model; any other `module` is a name like another."""


@dataclass
class Named:
    """The modules of a root.

    Attributes:
        modules: fqn to module, in PyTorch's order; of a wrapper and what it wraps, the wrapper.
        compiled: fqn of each module that runs as one compiled graph, to the number of modules in
            it, which no hook can see.
    """

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)


def named_modules(root: torch.nn.Module, prefix: str = "") -> Named:
    """Name a root's modules, without wrapper prefixes; each once, as PyTorch does.

    Args:
        prefix: Goes before every name; alone, it is the root's name.
    """
    named = Named()
    _walk(root, prefix, named, set())
    return named


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside wrappers: of compilation, sharding, checkpointing or data parallelism."""
    while True:
        inner = next((c for n, c in module._modules.items() if c and _wraps(module, n)), None)
        if inner is None:
            return module
        module = inner


def _walk(module: torch.nn.Module, fqn: str, named: Named, seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    named.modules.setdefault(fqn or ROOT, module)
    if compiled(module):
        inner = {id(m) for m in module.modules()} - {id(module), id(unwrapped(module))}
        named.compiled[fqn or ROOT] = len(inner)
        return
    for name, child in module._modules.items():
        if child is not None:
            own = fqn if _wraps(module, name) else f"{fqn}.{safe_fqn(name)}".removeprefix(".")
            _walk(child, own, named, seen)


def compiled(module: Any) -> bool:
    """Whether a module's own call runs a graph, so that no Python runs for those inside it."""
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
        or isinstance(module, torch.jit.ScriptModule)
    )


def runs_compiled(model: Any) -> bool:
    """Whether a module, or one inside it, runs compiled code."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(map(compiled, modules))


def callable_module(module: torch.nn.Module) -> bool:
    """Whether a module can be called: containers like ModuleList have no forward."""
    none: Any = torch.nn.Module.forward
    return "forward" in vars(module) or getattr(type(module), "forward", none) is not none


def _wraps(module: torch.nn.Module, name: str) -> bool:
    return name in _WRAPPERS or (name == "module" and type(module).__name__ in _PARALLEL)


def patterns(select: str) -> tuple[list[str], list[str]]:
    """Globs to take, and globs to leave out (those after `!`).

    Raises:
        UsageError: There is no glob.
    """
    globs = [part.strip() for part in select.split(",") if part.strip()]
    if not globs:
        raise UsageError("no modules were chosen", hint="--select '*'  # takes all")
    taken = [glob for glob in globs if not glob.startswith("!")]
    return taken or ["*"], [glob[1:] for glob in globs if glob.startswith("!")]


def choose(fqns: Iterable[str], select: str) -> list[str]:
    """Names that globs choose: `blocks.*, !*.norm*`.

    Raises:
        UsageError: A glob matches no name; with the closest ones.
    """
    names = list(dict.fromkeys(fqns))
    for glob in unmatched(names, select):
        raise UsageError(
            f"no module matches {glob!r}",
            measured=f"there are {len(names)}; the closest: {', '.join(_closest(glob, names))}",
            hint="a name is matched whole: 'blocks.0*' takes a block and what is in it",
        )
    return matching(names, select)


def matching(names: Iterable[str], select: str) -> list[str]:
    """Names that globs choose, be there any or not."""
    taken, left = patterns(select)
    return [
        name
        for name in names
        if any(fnmatchcase(name, glob) for glob in taken)
        and not any(fnmatchcase(name, glob) for glob in left)
    ]


def unmatched(names: Iterable[str], select: str) -> list[str]:
    """Globs that match none of the names."""
    names = list(names)
    taken, left = patterns(select)
    return [glob for glob in (*taken, *left) if not any(fnmatchcase(n, glob) for n in names)]


def _closest(glob: str, names: list[str]) -> list[str]:
    bare = glob.strip("*.?")
    holding = [name for name in names if bare and bare in name]
    near = difflib.get_close_matches(bare or glob, names, n=3, cutoff=0.0)
    return [*dict.fromkeys((*holding, *near))][:3]
