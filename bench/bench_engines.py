"""Real engines with the same tiny Wan weights: right ones, and six faults planted in each.

    python -m bench.bench_engines [--engine NAME] [FAULT ...]

TRUESTEP_COMFYUI, TRUESTEP_WAN, ... name the folders of these repositories (`ENGINES`).
`make engines` makes the environment that they run in (`.engines`; TRUESTEP_ENGINES names another
Python). An engine that is not there is left out, and said to be. One JSON line a run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import truestep
from bench.engines import tiny_cosmos_predict2, tiny_hunyuan
from bench.engines.tiny_wan import SCALE, STEPS, make, make_two
from truestep.calls.recording import read
from truestep.engines.named import run_of
from truestep.engines.ranks.checking import check_paths
from truestep.engines.running import run_engine
from truestep.engines.watch.request import Looked

HERE = Path(__file__).parent / "engines"
ENGINES = {
    "diffsynth": "",
    "comfyui": "TRUESTEP_COMFYUI",
    "wan": "TRUESTEP_WAN",
    "wan22": "TRUESTEP_WAN22",
    "hunyuan": "TRUESTEP_HUNYUAN",
    "cosmos_predict2": "TRUESTEP_COSMOS_PREDICT2",
    "xdit": "TRUESTEP_XDIT",
}
"""Name to the variable that says where it is; empty: a wheel in the environment."""

FAULTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "shift": ("schedule",),
    "sign": ("guidance",),
    "swapped": ("guidance",),
    "time": ("schedule",),
    "tail": ("text",),
    "order": ("latent", "update"),
}
"""Fault to the stages at which it may be named: what is stepped from is either's."""


OF_TWO_EXPERTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "late": ("prediction",),
    "early": ("prediction",),
    "experts": ("prediction",),
    "scales": ("guidance",),
    "eps": ("prediction",),
    "bias": ("prediction",),
}
"""Likewise of Wan 2.2; the last two are in a module each."""

FAMILIES: dict[str, Any] = {
    "hunyuan": tiny_hunyuan,
    "cosmos_predict2": tiny_cosmos_predict2,
}
"""Engines of other models than Wan: each module makes the weights and the trusted recording."""

RANKS = {"xdit": ("-m", "torch.distributed.run", "--nproc-per-node", "2")}
"""How an engine of several ranks is started."""

OF_RANKS: dict[str, tuple[str, ...]] = {"exchange": ("prediction",)}
"""What is wrong between ranks: the order of heads after they are exchanged."""

OPENED = ("norm", "exchange")
"""Faults inside of a prediction: runs with them are opened."""

TRUSTED = {"wan": "trusted-unipc", "wan22": "trusted-two"}
"""Folder by engine; of all others `trusted`."""


def main() -> None:
    options = _options()
    python = os.environ.get("TRUESTEP_ENGINES", str(Path(".engines/bin/python").absolute()))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "wan")
        make_two(place / "wan")
        names = dict.fromkeys(("trusted", *TRUSTED.values()))
        references = {name: reference(place, name) for name in names}
        for engine in options.engine or ENGINES:
            why = absent(engine, python)
            if why:
                print(json.dumps({"engine": engine, "not executed": why}), flush=True)
                continue
            for fault in options.fault or faults(engine):
                row = judged(engine, fault, python, place, references)
                print(json.dumps(row), flush=True)


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Judge real engines.")
    parser.add_argument("--engine", action="append", choices=list(ENGINES))
    parser.add_argument("fault", nargs="*")
    return parser.parse_args()


def faults(engine: str) -> dict[str, tuple[str, ...]]:
    """Faults that are planted in an engine, and the stages in which they may be named."""
    if engine in FAMILIES:
        return FAULTS | FAMILIES[engine].FAULTS
    if engine in RANKS:
        return FAULTS | OF_RANKS
    return OF_TWO_EXPERTS if engine == "wan22" else FAULTS


def prepared(engine: str, place: Path, references: dict[str, Path]) -> tuple[Path, Path, Path]:
    """Folder of weights and inputs, trusted model and trusted recording of an engine."""
    if engine not in FAMILIES:
        trusted = TRUSTED.get(engine, "trusted")
        return place / "wan", place / "wan" / trusted, references[trusted]
    folder, recording = place / engine, place / f"{engine}-reference.safetensors"
    if not recording.exists():
        FAMILIES[engine].make(folder)
        FAMILIES[engine].reference(folder, recording)
    return folder, folder / "trusted", recording


def absent(engine: str, python: str) -> str:
    """Why an engine cannot run here; empty where it can."""
    if not Path(python).exists():
        return f"no {python}: make engines"
    variable = ENGINES[engine]
    if not variable:
        return ""
    if variable not in os.environ:
        return f"{variable} is not set"
    return "" if Path(os.environ[variable]).is_dir() else f"{variable} names no folder"


def reference(place: Path, name: str) -> Path:
    """The trusted pipeline's recording; Euler's with the sigmas that engines give it."""
    from diffusers import WanPipeline
    from safetensors.torch import load_file

    pipe = WanPipeline.from_pretrained(str(place / "wan" / name))
    own = pipe.scheduler.set_timesteps
    if name == "trusted":
        even = torch.linspace(1.0, 0.0, STEPS + 1)[:-1].tolist()
        pipe.scheduler.set_timesteps = lambda steps, device=None: own(sigmas=even, device=device)
    given = load_file(place / "wan" / "inputs.safetensors")
    call = {
        "prompt_embeds": given["cond"],
        "negative_prompt_embeds": given["uncond"],
        "latents": given["noise"],
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
    }
    if name == "trusted-two":
        call |= {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    path = place / f"{name}.safetensors"
    truestep.record(pipe, call=call, floor="none", keep="all", path=path)
    return path


def judged(
    engine: str, fault: str, python: str, place: Path, references: dict[str, Path]
) -> dict[str, Any]:
    """Run an engine with a fault, and say whether it is named where it is."""
    folder, trusted, reference_of = prepared(engine, place, references)
    program = [python, *RANKS.get(engine, ()), str(HERE / f"run_{engine}.py"), str(folder), fault]
    output = place / f"{engine}-{fault}.safetensors"
    # The official `unipc` has sigmas of its own: it is given the trusted ones.
    given = read(reference_of) if engine in TRUSTED and fault != "shift" else None
    inside = Looked() if engine == "wan22" or fault in OPENED else None
    ran = run_engine([*program, str(place / "watched")], output, inject=given, inside=inside)
    row: dict[str, Any] = {"engine": engine, "fault": fault, "exit": ran.code}
    if not ran.recordings:
        return {**row, "not recorded": [str(error) for error in ran.failures]}
    if given is None:
        subprocess.run([*program, str(place / "alone")], check=False, capture_output=True)
        row["bit_equal"] = (place / "alone").read_bytes() == (place / "watched").read_bytes()
    known = run_of(reference_of)
    depth: Any = "modules" if inside else "steps"
    result = check_paths([ran.recordings[0][0]], trusted, reference=known, depth=depth)
    first = result.first_divergence
    stage = first.stage if first else ""
    wanted = faults(engine)[fault]
    right = stage in wanted if wanted else result.verdict.passed
    sizes = [r.metrics.rel_l2 for r in result.rows if r.stage == "prediction" and r.metrics]
    return {
        **row,
        "verdict": result.verdict.value,
        "stage": stage,
        "at": first.name if first else "",
        "module": (first.fqn or "") if first else "",
        "right": right,
        "predictions": len(sizes),
        "largest": max(sizes, default=None),
        "notes": [note for note in result.notes if not note.startswith("not judged")],
    }


if __name__ == "__main__":
    sys.exit(main())
