"""Speed and memory of `truestep weights` on a sharded checkpoint, beside `sha256sum` of its files.

A Wan-shaped transformer in bfloat16 under the names of its authors, and four conversions of it
under those of diffusers: as it is, with fused projections, in float8 with a scale a row, and with
one row of one layer off. Each is judged in a process of its own; memory is all that was resident
at its peak, the interpreter with torch and pages of files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.common import emit

SPEED_BAR = 0.7
MEMORY_BAR_MB = 500
SHARD = 1_300_000_000
ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))


def layer(index: int, width: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Official name, name in diffusers, and values of a layer's parameters."""
    generator = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    at = f"blocks.{index}"
    for own, other in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for short, long in ATTENTION:
            yield f"{at}.{own}.{short}.weight", f"{at}.{other}.{long}.weight", draw(width, width)
            yield f"{at}.{own}.{short}.bias", f"{at}.{other}.{long}.bias", draw(width)
        for norm in ("norm_q", "norm_k"):
            yield f"{at}.{own}.{norm}.weight", f"{at}.{other}.{norm}.weight", 1 + draw(width)
    for own, other, shape in (
        ("ffn.0", "ffn.net.0.proj", (4 * width, width)),
        ("ffn.2", "ffn.net.2", (width, 4 * width)),
    ):
        yield f"{at}.{own}.weight", f"{at}.{other}.weight", draw(*shape)
        yield f"{at}.{own}.bias", f"{at}.{other}.bias", draw(shape[0])
    yield f"{at}.modulation", f"{at}.scale_shift_table", draw(1, 6, width)


class Writer:
    """Writes a sharded checkpoint with its index, a shard at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.size, self.count = folder, 0, 0
        self.waiting: dict[str, torch.Tensor] = {}
        self.files: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; a full shard is written."""
        self.waiting[name] = tensor.contiguous()
        self.size += tensor.numel() * tensor.itemsize
        if self.size > SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        self.count += 1
        name = f"model-{self.count:05d}.safetensors"
        save_file(self.waiting, self.folder / name)
        self.files |= dict.fromkeys(self.waiting, name)
        self.waiting, self.size = {}, 0

    def close(self) -> Path:
        """Write the index; the folder."""
        if self.waiting:
            self.flush()
        index = json.dumps({"metadata": {}, "weight_map": self.files})
        (self.folder / "model.safetensors.index.json").write_text(index)
        return self.folder


def build(folder: Path, width: int, layers: int) -> dict[str, Path]:
    """The checkpoint, `official`, and its conversions."""
    kinds = ("official", "renamed", "fused", "float8", "one row off")
    writers = {kind: Writer(folder / kind.replace(" ", "-")) for kind in kinds}
    for index in range(layers):
        fused: dict[str, list[torch.Tensor]] = {}
        for own, other, tensor in layer(index, width):
            writers["official"].add(own, tensor)
            writers["renamed"].add(other, tensor)
            wrong = index == layers - 1 and other.endswith("attn2.to_k.weight")
            off = tensor.clone()
            off[-1] *= 1.02 if wrong else 1.0
            writers["one row off"].add(other, off)
            add_float8(writers["float8"], other, tensor)
            stem, _, leaf = other.rpartition(".")
            if stem.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
                fused.setdefault(f"{stem[:-5]}.to_qkv.{leaf}", []).append(tensor)
            else:
                writers["fused"].add(other, tensor)
        for name, parts in fused.items():
            writers["fused"].add(name, torch.cat(parts))
    return {kind: writer.close() for kind, writer in writers.items()}


def add_float8(writer: Writer, name: str, tensor: torch.Tensor) -> None:
    """Codes with one scale a row; vectors stay."""
    if not name.endswith(".weight") or tensor.ndim < 2:
        writer.add(name, tensor)
        return
    wide = tensor.float()
    scale = wide.abs().amax(1, keepdim=True) / 448
    writer.add(name, (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn))
    writer.add(f"{name}_scale", scale)


def judge(actual: Path, reference: Path) -> tuple[str, float, float]:
    """Verdict, seconds, and MB resident at the peak, in a process of its own."""
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from truestep.judge.weights import compare_weights\n"
        "result = compare_weights(*sys.argv[1:])\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(status['VmHWM'].split()[0], result.sentence)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(actual), str(reference)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    peak, _, sentence = done.stdout.strip().partition(" ")
    return sentence, seconds, int(peak) * 1024 / 1e6


def main() -> None:
    """Build, judge and time; both are read from the page cache where it holds them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = build(Path(folder), arguments.width, arguments.layers)
        for kind in [kind for kind in paths if kind != "official"]:
            files = [f for at in (paths[kind], paths["official"]) for f in at.glob("*.safetensors")]
            size = sum(file.stat().st_size for file in files)
            start = time.perf_counter()
            subprocess.run(["sha256sum", *map(str, files)], check=True, capture_output=True)
            hashing = time.perf_counter() - start
            sentence, seconds, peak = judge(paths[kind], paths["official"])
            emit(
                "weights",
                conversion=kind,
                gigabytes=round(size / 1e9, 2),
                seconds=round(seconds, 2),
                sha256sum_seconds=round(hashing, 2),
                speed=round(hashing / seconds, 2),
                speed_bar=SPEED_BAR,
                peak_mb=round(peak),
                peak_bar_mb=MEMORY_BAR_MB,
                result=sentence[:160],
            )


if __name__ == "__main__":
    main()
