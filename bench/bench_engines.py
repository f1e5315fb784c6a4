"""Real engines with the same tiny weights: right ones, and six faults and more planted in each.

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
from bench.engines import tiny_cosmos_predict2, tiny_flux, tiny_hunyuan, tiny_ltx2
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
    "flux": "TRUESTEP_FLUX",
    "ltx2": "TRUESTEP_LTX2",
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

OF_FLUX: dict[str, tuple[str, ...]] = {
    "none": (),
    "shift": ("schedule",),
    "sign": ("guidance",),
    "scale": ("guidance",),
    "time": ("schedule",),
    "tail": ("text",),
    "permuted": ("text",),
    "pooled": ("text",),
    "order": ("latent", "update"),
    "latent": ("decoding",),
    "scaled": ("decoding",),
    "eps": ("prediction",),
    "bias": ("prediction",),
}
"""Likewise of flux, which has one branch and is given the scale of its guidance."""

OF_LTX2: dict[str, tuple[str, ...]] = {
    **FAULTS,
    "tokens": ("schedule",),
    "sound": ("latent",),
    "bias": ("prediction",),
}
"""Likewise of LTX-2; `tokens` is how most of its pipelines call its scheduler."""

PLANTED = {
    "wan22": OF_TWO_EXPERTS,
    "flux": OF_FLUX,
    "ltx2": OF_LTX2,
    "hunyuan": FAULTS | tiny_hunyuan.FAULTS,
    "cosmos_predict2": FAULTS | tiny_cosmos_predict2.FAULTS,
    "xdit": {**FAULTS, "exchange": ("prediction",)},
}
"""Faults by engine; of all others `FAULTS`. `exchange`: the order of heads after ranks exchange
them."""

MODULES = {
    ("wan22", "eps"): "blocks.1.attn1.norm_q",
    ("flux", "eps"): "transformer_blocks.1.attn",
    ("flux", "bias"): "transformer_blocks.1.attn.to_add_out",
    ("ltx2", "bias"): "transformer_blocks.1.attn2.to_out.0",
    ("hunyuan", "norm"): "transformer_blocks.1.attn.norm_q",
}
"""The module in which a fault is, where one is named."""

RANKS = {"xdit": ("-m", "torch.distributed.run", "--nproc-per-node", "2")}
"""How an engine of several ranks is started."""

OF_OTHERS: dict[str, Any] = {
    "flux": tiny_flux,
    "ltx2": tiny_ltx2,
    "hunyuan": tiny_hunyuan,
    "cosmos_predict2": tiny_cosmos_predict2,
}
"""Engines that run no Wan: each module makes their weights, the trusted pipeline and its call."""

TRUSTED = {"wan": "trusted-unipc", "wan22": "trusted-two", **{name: name for name in OF_OTHERS}}
"""Recording of the trusted pipeline by engine; of all others `trusted`."""

INJECTED = ("wan", "wan22")
"""Engines with sigmas of their own, which are given the trusted ones."""


def main() -> None:
    options = _options()
    python = os.environ.get("TRUESTEP_ENGINES", str(Path(".engines/bin/python").absolute()))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place / "wan")
        make_two(place / "wan")
        for name, own in OF_OTHERS.items():
            own.make(place / name)
        names = dict.fromkeys(("trusted", *TRUSTED.values()))
        references = {name: reference(place, name) for name in names}
        for engine in options.engine or ENGINES:
            why = absent(engine, python)
            if why:
                print(json.dumps({"engine": engine, "not executed": why}), flush=True)
                continue
            for fault in options.fault or PLANTED.get(engine, FAULTS):
                row = judged(engine, fault, python, place, references)
                print(json.dumps(row), flush=True)


def _options() -> Any:
    parser = argparse.ArgumentParser(description="Judge real engines.")
    parser.add_argument("--engine", action="append", choices=list(ENGINES))
    parser.add_argument("fault", nargs="*")
    return parser.parse_args()


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


def weights(place: Path, engine: str) -> tuple[Path, Path]:
    """The folder that an engine's program is given, and the trusted model's."""
    if engine in OF_OTHERS:
        return place / engine, place / engine / "trusted"
    return place / "wan", place / "wan" / TRUSTED.get(engine, "trusted")


def reference(place: Path, name: str) -> Path:
    """The trusted pipeline's recording; Euler's with the sigmas that engines give it."""
    from diffusers import WanPipeline
    from safetensors.torch import load_file

    path = place / f"{name}.safetensors"
    if name in OF_OTHERS:
        own = OF_OTHERS[name]
        pipe, call = own.pipeline(place / name), own.call(place / name)
        truestep.record(pipe, call=call, floor="none", keep="all", path=path)
        return path
    pipe = WanPipeline.from_pretrained(str(place / "wan" / name))
    set_timesteps = pipe.scheduler.set_timesteps
    if name == "trusted":
        even = torch.linspace(1.0, 0.0, STEPS + 1)[:-1].tolist()
        pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(
            sigmas=even, device=device
        )
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
    truestep.record(pipe, call=call, floor="none", keep="all", path=path)
    return path


def judged(
    engine: str, fault: str, python: str, place: Path, references: dict[str, Path]
) -> dict[str, Any]:
    """Run an engine with a fault, and say whether it is named where it is."""
    trusted, wanted = TRUSTED.get(engine, "trusted"), PLANTED.get(engine, FAULTS)[fault]
    given_folder, folder = weights(place, engine)
    started = [python, *RANKS.get(engine, ()), str(HERE / f"run_{engine}.py")]
    program = [*started, str(given_folder), fault]
    output = place / f"{engine}-{fault}.safetensors"
    given = read(references[trusted]) if engine in INJECTED and fault != "shift" else None
    inside = Looked() if "prediction" in wanted else None
    ran = run_engine([*program, str(place / "watched")], output, inject=given, inside=inside)
    row: dict[str, Any] = {"engine": engine, "fault": fault, "exit": ran.code}
    if not ran.recordings:
        return {**row, "not recorded": [str(error) for error in ran.failures]}
    if given is None:
        subprocess.run([*program, str(place / "alone")], check=False, capture_output=True)
        row["bit_equal"] = (place / "alone").read_bytes() == (place / "watched").read_bytes()
    known = run_of(references[trusted])
    depth: Any = "modules" if inside else "steps"
    paths = [ran.recordings[0][0]]
    result = check_paths(paths, folder, reference=known, depth=depth)
    first = result.first_divergence
    stage = first.stage if first else ""
    stage = "prediction" if stage == "module" else stage  # what is opened is a prediction
    right = stage in wanted if wanted else result.verdict.passed
    module = MODULES.get((engine, fault))
    right &= module is None or (first is not None and first.fqn == module)
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
