"""Peaks of memory of a recording and of checks beside that of a plain run, of a model on disk.

On CUDA what torch's allocator gave out in this process; elsewhere all resident memory of a process
of its own (`bench.bench_sizes`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import truestep
from bench.accelerator.place import Budget, Here
from bench.bench_sizes import BARS, CONTENT, SIZE, asked, build, fault

Row = dict[str, Any]
DTYPE = "bfloat16"
REAL = {"layers": 4, "heads": 12, "ffn_dim": 8960}
"""Of Wan 2.1 1.3B, with 4 of its 30 blocks."""
TINY = {"layers": 1, "heads": 2, "ffn_dim": 256}
LARGE_CALL = {"height": 480, "width": 512}
"""As large as the positions of `bench.bench_sizes.build` allow: 32 patches a side."""


def rows(here: Here, budget: Budget) -> Iterator[Row]:
    """A row each of `record`, `check` and `check --depth modules`."""
    with tempfile.TemporaryDirectory(prefix="bench-accelerator-") as folder:
        model = Path(folder) / "model"
        count = build(model, DTYPE, **(REAL if here.real else TINY))
        peak = _on_device(model, here) if here.is_cuda else _in_a_process(model)
        plain: Row | None = None
        for what in ("plain", *BARS):
            if not budget.allows(f"memory of {what}", "run"):
                continue
            with budget.spent("run"):
                found = peak(what)
            row = {"model": "wan", "dtype": DTYPE, "parameters": count, "work": what, **found}
            if plain is not None:
                row["times_plain"] = round(found["peak_mb"] / plain["peak_mb"], 3)
            plain = plain or found
            yield row


def _on_device(model: Path, here: Here) -> Callable[[str], Row]:
    call = {**CONTENT, **SIZE, "max_sequence_length": 64, "num_inference_steps": 6}
    call |= LARGE_CALL if here.real else {}
    case = truestep.CallCase(model=str(model), dtype=DTYPE, device=here.device, call=call)
    path = model.parent / "reference.safetensors"

    def peak(what: str) -> Row:
        here.clear()
        before = torch.cuda.memory_allocated(here.device)
        said = _done(what, case, path, here)
        here.wait()
        most = torch.cuda.max_memory_allocated(here.device)
        return {"peak_mb": round((most - before) / 1e6, 1), "held_mb": before // 10**6, **said}

    return peak


def _done(what: str, case: truestep.CallCase, path: Path, here: Here) -> Row:
    """Do one thing, and what it says."""
    import diffusers

    if what == "plain":
        dtype = getattr(torch, DTYPE)
        pipe = diffusers.WanPipeline.from_pretrained(case.model, dtype=dtype).to(here.device)
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            pipe(**case.call, generator=torch.Generator().manual_seed(0), output_type="pt")
        return {}
    if what == "record":
        truestep.record(case, path=path)
        return {}
    change, depth = (None, "steps") if what == "check" else (fault, "modules")
    result = truestep.check(case, path, apply=change, depth=depth)  # type: ignore[arg-type]
    first = result.first_divergence
    return {"verdict": result.verdict.value, "at": first and first.fqn}


def _in_a_process(model: Path) -> Callable[[str], Row]:
    def peak(what: str) -> Row:
        found = asked(model, DTYPE, False, what, steps=3, disk=False)
        said = {key: found[key] for key in ("verdict", "at") if key in found}
        return {"peak_mb": found["mb"], **said}

    return peak
