"""The two guidance branches on two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truestep.case import Case
from truestep.errors import UsageError
from truestep.runtime.loading import load
from truestep.runtime.pipeline import generate

PROGRAM = """
import os, signal, sys, torch
from truestep.case import Case
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Observer, generate

torch.set_num_threads(1)
mode, output = sys.argv[1], sys.argv[2]
rank = int(os.environ["RANK"])

class Dies(Observer):
    def step_done(self, index, total):
        if mode == "dies" and rank == 1 and index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

case = Case(model="builtin:digits", prompt="a red three moving left", steps=4,
            settings={"device": "cpu", "cfg": "parallel"})
pipe = load(case)
calls = []
pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
try:
    latent = generate(pipe, observer=Dies())
except Exception as error:
    print(f"RANK {rank} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(7)
torch.save((latent, len(calls)), f"{output}/{rank}.pt")
"""


def two(mode: str, folder: Path, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(program), mode, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRUESTEP_RANK_TIMEOUT_S": "60"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    done = two("runs", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, calls), (second, others) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert torch.equal(first, second)
    assert (calls, others) == (4, 4)
    settings = {"device": "cpu"}
    case = Case(
        model="builtin:digits", prompt="a red three moving left", steps=4, settings=settings
    )
    torch.testing.assert_close(first, generate(load(case)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_an_error(tmp_path: Path) -> None:
    done = two("dies", tmp_path)
    assert done.returncode != 0
    assert "rank 1 is gone: the branches cannot be exchanged" in done.stderr or (
        "Signal 9 (SIGKILL)" in done.stderr
    )
    assert not (tmp_path / "0.pt").exists()


def test_one_process_is_told_how_to_start_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    case = Case(
        model="builtin:digits",
        prompt="a red three moving left",
        steps=2,
        settings={"device": "cpu", "cfg": "parallel"},
    )
    with pytest.raises(UsageError, match="cfg = parallel needs two processes") as caught:
        generate(load(case))
    assert "this is a single process" in str(caught.value)
    assert "torchrun --nproc-per-node 2" in str(caught.value)
