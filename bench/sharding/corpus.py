"""What is run of the sharded port: right splits, and planted faults with where they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

PORT = Path(__file__).with_name("port.py")

INPUTS = {"even": (4, 8, 8), "uneven": (3, 6, 6)}
"""Frames, rows and columns of a latent; 64 tokens, and 27."""

DTYPES = ("float32", "bfloat16")

KINDS = ("ulysses", "gathered", "ring", "zigzag", "tensor", "guidance", "frames", "reversed")
"""Kinds of splits on two ranks; on four `mixed`, too."""

LIBRARY = ("library",)
"""diffusers' own, which splits tokens evenly alone; its ring needs a kernel that CPUs have not."""


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        kind, name: Of the port.
        marks: Lines of the port at which it may be named: marks of its collectives.
        missing: Where a collective is missing, the place at which that is to be said.
        inputs: That it needs.
        worlds: Numbers of ranks that it is planted on.
    """

    kind: str
    name: str
    marks: tuple[str, ...] = ()
    missing: str = ""
    inputs: str = "even"
    worlds: tuple[int, ...] = (2, 4)


FAULTS = (
    Fault("gathered", "order", ("shares",)),
    Fault("gathered", "values-order", ("turned",)),
    Fault("gathered", "stale", ("shares",)),
    Fault("gathered", "off-by-one", missing="blocks.0.norm1", inputs="uneven"),
    Fault("gathered", "rope", ("shares",)),
    Fault("ulysses", "axis", ("back",)),
    Fault("ulysses", "values", ("values",)),
    Fault("ulysses", "head-order", ("back",), worlds=(2,)),  # on four a rank has one head
    Fault("ulysses", "unmasked", ("heads", "back"), inputs="uneven"),
    Fault("ulysses", "front", ("tokens",), inputs="uneven"),
    Fault("ulysses", "order", ("tokens",)),
    Fault("ulysses", "not-gathered", missing="the model's output"),
    Fault("ring", "rescale", ("ring",)),
    Fault("ring", "skipped", ("ring",)),
    Fault("ring", "ring-values", ("ring",)),
    Fault("ring", "unmasked", ("ring",), inputs="uneven"),
    Fault("zigzag", "order", ("tokens",)),
    Fault("tensor", "bias", ("biased",)),
    Fault("tensor", "unreduced", missing="blocks.0.attn1.to_out.0"),
    Fault("tensor", "mean", ("sum",)),
    Fault("tensor", "twice", ("again",)),
    Fault("tensor", "norm", missing="blocks.0.attn1.norm_q"),
    Fault("tensor", "noise", missing="before the first prediction"),
    Fault("guidance", "exchanged", ("branches",)),
    Fault("guidance", "own-branch", ("own",)),
    Fault("mixed", "wrong-group", ("heads",), worlds=(4,)),
    Fault("frames", "end-order", ("end",)),
    Fault("frames", "end", missing="after the last step"),
)


def right(world: int) -> list[str]:
    """Cases of right splits on as many ranks."""
    kinds = (*KINDS, "mixed") if world == 4 else KINDS
    cases = [f"{k}/none/{name}/{dtype}" for k in kinds for name in INPUTS for dtype in DTYPES]
    return [*cases, *(f"{kind}/none/even/{dtype}" for kind in LIBRARY for dtype in DTYPES)]


def faulty(world: int) -> dict[str, Fault]:
    """Cases of planted faults on as many ranks."""
    chosen = [fault for fault in FAULTS if world in fault.worlds]
    return {f"{one.kind}/{one.name}/{one.inputs}/float32": one for one in chosen}


def marks() -> dict[int, str]:
    """Marked lines of the port, by number."""
    lines = PORT.read_text(encoding="utf-8").splitlines()
    found = ((number, re.search(r"# at: (\S+)", line)) for number, line in enumerate(lines, 1))
    return {number: match[1] for number, match in found if match}


def is_named(fault: Fault, notes: tuple[str, ...]) -> bool:
    """Whether a result names a fault at its collective, or at the place where one is missing."""
    told = [note for note in notes if note.startswith(("first wrong", "the collective", "no coll"))]
    if fault.missing:
        here = any(fault.missing in note for note in told)
        return here and any(note.startswith("no collective") for note in told)
    known = marks()
    lines = {int(n) for note in told for n in re.findall(rf"{PORT.name}:(\d+)", note)}
    first = {known.get(line, "") for line in lines}
    return bool(first) and first <= {*fault.marks}


def make(folder: Path) -> None:
    """Write a tiny Wan with four heads, and inputs, into a folder."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "scale_shift" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.05)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    wan = folder / "wan"
    for part, name in ((model, "transformer"), (vae, "vae")):
        part.save_pretrained(wan / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(wan / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (wan / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    dice = torch.Generator().manual_seed(0)
    for name, sizes in INPUTS.items():
        tensors = {
            "noise": torch.randn(1, 16, *sizes, generator=dice),
            "cond": torch.randn(1, 10, 32, generator=dice),
            "uncond": torch.randn(1, 10, 32, generator=dice),
        }
        save_file(tensors, folder / f"{name}.safetensors")


def reference(folder: Path, name: str, dtype: str) -> Path:
    """The trusted run of the inputs of a name, as a file of tensors by seam."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file, save_file

    from bench.sharding.port import SCALE, STEPS, Euler

    path = folder / f"reference-{name}-{dtype}.safetensors"
    if path.exists():
        return path
    kind = getattr(torch, dtype)
    inputs = {k: v.to(kind) for k, v in load_file(folder / f"{name}.safetensors").items()}
    model = WanTransformer3DModel.from_pretrained(folder / "wan/transformer", torch_dtype=kind)
    model.eval()
    scheduler = Euler()
    scheduler.set_timesteps(STEPS)
    latent = inputs["noise"].float()
    made = {
        "schedule/sigmas": torch.cat([scheduler.sigmas, torch.zeros(1)]),
        "schedule/timesteps": scheduler.timesteps,
        "latent/initial": latent,
        "text/cond": inputs["cond"],
        "text/uncond": inputs["uncond"],
    }
    with torch.no_grad():
        for number, time in enumerate(scheduler.timesteps):
            at = f"step/{number:04d}"
            for branch in ("cond", "uncond"):
                given = (latent.to(kind), time[None], inputs[branch])
                made[f"{at}/{branch}"] = model(*given, return_dict=False)[0]
            cond, uncond = made[f"{at}/cond"].float(), made[f"{at}/uncond"].float()
            guided = uncond + SCALE * (cond - uncond)
            made |= {f"{at}/latent": latent, f"{at}/timestep": time[None], f"{at}/guided": guided}
            latent = scheduler.step(guided, number, latent)
            made[f"{at}/next"] = latent
    made["latent/final"] = latent
    save_file({key: value.clone().contiguous() for key, value in made.items()}, path)
    return path
