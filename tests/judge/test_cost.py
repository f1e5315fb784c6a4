"""What a comparison costs, counted: nothing here looks at a clock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.counting import calls, calls_of, peak_bytes
from truestep import compare
from truestep.floors import NoiseFloor
from truestep.judge.floor import Limits
from truestep.judge.rows import compare_tensors, measured_run

Tensors = dict[str, torch.Tensor]


def tensors(count: int, *, name: str = "layer.{}.out") -> Tensors:
    drawn = torch.Generator().manual_seed(0)
    return {name.format(i): torch.randn(16, generator=drawn) for i in range(count)}


def near(reference: Tensors, size: float) -> Tensors:
    return {name: tensor * (1 + size) for name, tensor in reference.items()}


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("name", ["layer.{}.out", "layer.{}.weight"])
def test_calls_grow_with_the_number_of_tensors_and_no_faster(size: float, name: str) -> None:
    def run(count: int) -> int:
        reference = tensors(count, name=name)
        actual = near(reference, size)
        return calls(lambda: compare(actual, reference))

    run(10)  # what is imported and cached once
    few, many = run(100), run(200)
    assert many <= 2.2 * few
    assert many / 200 < 400


@pytest.mark.parametrize("size", [1e-6, 0.1])
def test_so_they_do_with_a_measured_floor(size: float) -> None:
    def run(count: int) -> int:
        reference = tensors(count)
        made = [
            measured_run(
                "jitter",
                str(i),
                "float32/float32",
                {k: (v, reference[k]) for k, v in near(reference, 1e-7 * (i + 1)).items()},
            )
            for i in range(3)
        ]
        floor = NoiseFloor(runs=tuple(made))
        actual = near(reference, size)
        return calls(lambda: compare_tensors(actual, reference, limits=Limits(floor)))

    run(10)
    assert run(200) <= 2.2 * run(100)


def test_python_memory_grows_with_the_rows_only() -> None:
    def run(count: int) -> int:
        reference = tensors(count)
        actual = near(reference, 1e-6)
        return peak_bytes(lambda: compare(actual, reference))

    run(10)
    few, many = run(100), run(200)
    assert many <= 2.2 * few
    assert many / 200 < 12_000


def test_names_are_not_searched(tmp_path: Path) -> None:
    save_file(tensors(50), tmp_path / "a.safetensors")
    save_file(tensors(60), tmp_path / "b.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert calls_of(lambda: compare(*paths), "get_close_matches") == 0
    assert calls_of(lambda: compare(*paths), "read_header") == 2
    assert calls_of(lambda: compare(*paths), "read") <= 2 * 60


PEAK = """
import sys, torch
torch.set_num_threads(1)
from truestep import compare

def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) // 1024

small, *large = sys.argv[1:]
compare(small, small)
before = peak()
compare(*large)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["layer.{}.out", "layer.{}.weight"])
def test_no_more_than_a_pair_of_tensors_is_in_memory(name: str, tmp_path: Path) -> None:
    """Two files of 80 MB in tensors of 4 MB: pages go when their tensor has been judged."""
    base = {name.format(i): torch.randn(1_000_000) for i in range(20)}
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_file({name.format(0): torch.ones(4)}, paths[0])
    save_file(base, paths[1])
    save_file(near(base, 1e-6), paths[2])
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 60
