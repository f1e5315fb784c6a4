"""Memory of record, check and check --depth modules beside that of plain generation; and a check of
a checkpoint that is larger than the memory it may have.

python -m bench.bench_sizes              330 M parameters, two dtypes, both ways to run Wan
python -m bench.bench_sizes --from-disk  a checkpoint of 6.7 GB in a process limited to 2.5 GB
python -m bench.bench_sizes --low-memory a text encoder as large as the denoiser, 150 M each
python -m bench.bench_sizes --recordings bytes of thinned recordings of 50 steps, by what is kept

Every number is the peak of all resident memory of a process of its own, mapped pages of files
included (VmHWM); `child_mb` is that of the largest process that it started, beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import emit

WIDTH = 1024
"""Of the text encoder and the denoiser that are as large as each other."""

BARS = {"record": 1.25, "check": 1.1, "modules": 1.4}
"""Peaks as ratios to that of plain generation."""

LIMIT = 2_500_000_000
"""Bytes of address space, and of data, of the process that checks from disk."""

CONTENT = {"prompt": "a red cat", "negative_prompt": "dark"}
SIZE = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 5.0}


def build(folder: Path, dtype: str, *, layers: int, heads: int, ffn_dim: int) -> int:
    """Write a Wan pipeline whose transformer is as wide and deep as asked, in shards.

    Returns:
        Number of its parameters.
    """
    import diffusers
    import torch

    from truestep.testing import tiny

    if not folder.exists():
        tiny.save("WanPipeline", folder, dtype=dtype)
    part = folder / "transformer"
    config = json.loads((part / "config.json").read_text())
    config |= {"num_layers": layers, "num_attention_heads": heads}
    config |= {"attention_head_dim": 128, "ffn_dim": ffn_dim}
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        plain = {k: v for k, v in config.items() if not k.startswith("_")}
        model = diffusers.WanTransformer3DModel.from_config(plain).eval()
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.02, generator=generator)
    shutil.rmtree(part)
    model.save_pretrained(part, max_shard_size="500MB")
    return sum(weight.numel() for weight in model.parameters())


def build_encoder(folder: Path, *, layers: int) -> int:
    """Give a pipeline another text encoder, and its transformer texts of that width.

    Returns:
        Number of its parameters.
    """
    import torch
    import transformers

    part = folder / "text_encoder"
    config = transformers.AutoConfig.from_pretrained(part)
    own = {"d_model": WIDTH, "d_kv": 64, "num_heads": 16, "d_ff": 4096, "num_layers": layers}
    config.update(own)
    shutil.rmtree(part)
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(config).eval()
    model.save_pretrained(part)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_dim": WIDTH}))
    return sum(weight.numel() for weight in model.parameters())


def fault(pipe: Any) -> None:
    """One projection's weight, 2 % off."""
    import torch

    with torch.no_grad():
        pipe.transformer.blocks[len(pipe.transformer.blocks) // 2].attn1.to_q.weight.mul_(1.02)


def run(  # 7 parameters: what is asked of a process of its own
    folder: Path, dtype: str, runtime: bool, what: str, *, steps: int, disk: bool, low: bool = False
) -> None:
    """Do one thing in this process, and print what it took."""
    import diffusers
    import torch

    import truestep

    torch.set_num_threads(1)
    words = {**CONTENT, **SIZE, "max_sequence_length": 64}
    call = {**words, "num_inference_steps": steps}
    case: Any
    if runtime:
        case = truestep.Case(model=str(folder), dtype=dtype, steps=steps, **words)
    else:
        case = truestep.CallCase(model=str(folder), dtype=dtype, call=call)
    path = folder.parent / f"{folder.name}-{dtype}-{runtime}.safetensors"
    if disk:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    start, said = time.perf_counter(), {}
    if what == "plain":
        pipe = diffusers.WanPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt")
    elif what == "record":
        truestep.record(case, path=path, low_memory=low)
        said["bytes"] = path.stat().st_size
    else:
        change, depth = (None, "steps") if what == "check" else (fault, "modules")
        how: dict[str, Any] = {"from_disk": disk, "low_memory": low}
        result = truestep.check(case, path, apply=change, depth=depth, **how)
        first = result.first_divergence
        said |= {"verdict": result.verdict.value, "at": first and first.fqn}
    children = [peak(pid) for task in Path("/proc/self/task").iterdir() for pid in _children(task)]
    if children:  # what plays the run by other instructions, beside this one
        said["child_mb"] = max(children)
    print(json.dumps({"mb": peak(), "s": round(time.perf_counter() - start, 1), **said}))


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def peak(process: str = "self") -> int:
    """Largest resident memory of a process so far, in MB of 1,024,000 bytes."""
    from truestep.progress import resident_peak

    return (resident_peak(process) or 0) // 1_024_000


def asked(folder: Path, dtype: str, runtime: bool, what: str, **options: Any) -> dict[str, Any]:
    """What `run` prints in a process of its own."""
    words = [json.dumps([str(folder), dtype, runtime, what, options])]
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_sizes", "--run", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(folder: Path, dtype: str, runtime: bool, *, steps: int = 6) -> dict[str, Any]:
    """Peaks of everything beside plain generation."""
    plain = asked(folder, dtype, runtime, "plain", steps=steps, disk=False)
    found = {"plain_mb": plain["mb"]}
    for what in BARS:
        one = asked(folder, dtype, runtime, what, steps=steps, disk=False)
        found |= {f"{what}_{key}": value for key, value in one.items()}
        found[f"{what}_ratio"] = round(one["mb"] / plain["mb"], 3)
    return found


def memory(folder: Path) -> None:
    """The table of a 330 M model."""
    for dtype in ("float32", "bfloat16"):
        part = folder / dtype
        count = build(part, dtype, layers=19, heads=8, ffn_dim=4096)
        for runtime in (True, False):
            found = ratios(part, dtype, runtime)
            met = all(found[f"{what}_ratio"] <= bar for what, bar in BARS.items())
            way = "stages" if runtime else "calls"
            emit("sizes", dtype=dtype, way=way, parameters=count, **found, bars=BARS, met=met)


def from_disk(folder: Path) -> None:
    """Check a checkpoint of 6.7 GB in bfloat16 in 2.5 GB; the reference is made without a limit."""
    part = folder / "large"
    build(part, "bfloat16", layers=12, heads=32, ffn_dim=16384)
    files = sorted((part / "transformer").glob("*.safetensors"))
    asked(part, "bfloat16", True, "record", steps=4, disk=False)
    start = time.perf_counter()
    for file in files * 3:
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    reading = time.perf_counter() - start
    size = sum(file.stat().st_size for file in files) / 1e9
    for what in ("check", "modules"):
        found = asked(part, "bfloat16", True, what, steps=4, disk=True)
        emit(
            "sizes_from_disk",
            what=what,
            checkpoint_gb=round(size, 2),
            limit_gb=LIMIT / 1e9,
            reading_three_times_s=round(reading, 1),
            **found,
        )


def low_memory(folder: Path) -> None:
    """Peaks with one model in memory at a time, where two are as large as each other."""
    from truestep.testing import tiny

    part = folder / "low"
    tiny.save("WanPipeline", part, dtype="float32")
    counts = {"text_encoder": build_encoder(part, layers=9)}
    counts["transformer"] = build(part, "float32", layers=9, heads=8, ffn_dim=4096)
    for runtime in (True, False):
        plain = asked(part, "float32", runtime, "plain", steps=4, disk=False)
        for low in (False, True):
            for what in BARS:
                one = asked(part, "float32", runtime, what, steps=4, disk=False, low=low)
                ratio = round(one["mb"] / plain["mb"], 3)
                way = "stages" if runtime else "calls"
                told = {"way": way, "what": what, "low_memory": low, **one, "ratio": ratio}
                emit("sizes_low_memory", parameters=counts, plain_mb=plain["mb"], **told)


def recordings() -> None:
    """What recordings of truestep's own stages hold, as multiples of the final latent and texts."""
    import truestep
    from bench.faults.draws import DRAWS
    from bench.faults.subjects import Wan, subjects

    for subject in subjects():
        for dtype in subject.dtypes if isinstance(subject, Wan) else ():
            case = subject.case(DRAWS[0], dtype).replace(steps=50)
            floor: Any = "none" if dtype == "float32" else "steps"  # raised tensors come with it
            told = shares(truestep.record(case, floor=floor))
            emit("sizes_recordings", subject=subject.name, dtype=dtype, **told)


def shares(recording: Any) -> dict[str, Any]:
    """Bytes of a recording's tensors by stage, raised ones apart, over those of its final latents
    and texts."""
    from truestep.keys import FINALS, key_of

    sizes: dict[str, int] = {}
    unit = 0
    for name in recording:
        key, size = key_of(name), recording[name].nbytes
        kind = f"{key.precision} {key.stage}" if key.precision else key.stage
        sizes[kind] = sizes.get(kind, 0) + size
        unit += size * (kind == "text" or name in FINALS)
    decoded = sum(size for kind, size in sizes.items() if "decoding" in kind)
    total = sum(sizes.values())
    told = {kind: round(size / unit, 2) for kind, size in sizes.items()}
    without = round((total - decoded) / unit, 1)
    return {"total": round(total / unit, 1), "without_media": without, "by_stage": told}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--recordings", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where models are written; default temporary.")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        folder, dtype, runtime, what, named = json.loads(options.run)
        run(Path(folder), dtype, runtime, what, **named)
        return
    if options.recordings:
        recordings()
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        way = low_memory if options.low_memory else from_disk if options.from_disk else memory
        way(Path(folder))


if __name__ == "__main__":
    main()
