"""From an empty folder to a proven component: every state of a parity test, in one go.

A small official network, and a port of it with two faults: the other form of GELU, and a weight
that was transposed. Run it with `python examples/parity/walkthrough.py`; it works in a temporary
folder, or in the one that is given, and prints what each command prints.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

OFFICIAL = '''"""The official implementation."""

import torch


class Mixer(torch.nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.act = torch.nn.GELU(approximate="tanh")
        self.down = torch.nn.Linear(2 * width, width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.out(x + self.down(self.act(self.up(self.norm(x)))))


def build():
    return Mixer(width=32)
'''

PORT = '''"""The port."""

import torch


class OwnMixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(32))
        self.shift = torch.nn.Parameter(torch.zeros(32))
        self.first = torch.nn.Linear(32, 64)
        self.gelu = torch.nn.GELU({form})
        self.second = torch.nn.Linear(64, 32)
        self.last = torch.nn.Linear(32, 32)

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        y = self.first(scaled * self.gain + self.shift)
        return self.last(x + self.second(self.gelu(y)))
'''

WEIGHTS = '''"""Stands for a download: official weights, and the conversion's first attempt."""

import sys

import torch
from safetensors.torch import save_file
from acme_net import build

NAMES = {"norm.weight": "gain", "norm.bias": "shift"}
NAMES |= {"up": "first", "down": "second", "out": "last"}

torch.manual_seed(0)
official = build().state_dict()
save_file(official, "official_weights/model.safetensors")
converted = {}
for name, tensor in official.items():
    module, _, kind = name.rpartition(".")
    converted[NAMES.get(name) or f"{NAMES[module]}.{kind}"] = tensor
if "transposed" in sys.argv:
    converted["last.weight"] = converted["last.weight"].T.contiguous()
save_file(converted, "converted_weights/model.safetensors")
'''


def main(folder: Path) -> None:
    """Walk through all states in a folder."""
    for name in ("official", "official_weights", "converted_weights"):
        (folder / name).mkdir()
    (folder / "official" / "acme_net.py").write_text(OFFICIAL)
    (folder / "make_weights.py").write_text(WEIGHTS)
    walk = Walk(folder)

    walk.say("A test is written; it says what it lacks")
    walk.run(
        "truestep parity new acme mixer --kind generic --official acme_net:Mixer"
        " --port acme_port:OwnMixer --official-dir official",
        expect=0,
    )
    walk.run("truestep parity run", expect=3)

    walk.say("Weights and a port are there: both sides load, the numbers differ")
    walk.environment |= {
        "ACME_LOCAL_WEIGHTS_DIR": "official_weights",
        "ACME_CONVERTED_WEIGHTS_DIR": "converted_weights",
    }
    walk.run("python make_weights.py transposed", expect=0)
    (folder / "acme_port.py").write_text(PORT.format(form=""))
    walk.run("truestep parity run", expect=1)

    walk.say("The weight is put right: the other fault is left")
    walk.run("python make_weights.py", expect=0)
    walk.run("truestep parity run", expect=1)

    walk.say("The activation is put right")
    (folder / "acme_port.py").write_text(PORT.format(form='approximate="tanh"'))
    walk.run("truestep parity run", expect=0)
    walk.run("truestep parity status --markdown", expect=0)

    walk.say("A file is changed: what was proven no longer holds")
    with (folder / "acme_port.py").open("a") as file:
        file.write("\n# a later change\n")
    walk.run("truestep parity status", expect=1)
    walk.run("truestep parity run", expect=0)


class Walk:
    """Runs commands in a folder and shows them as a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"ACME_OFFICIAL_REF_DIR": "official", "PYTHONPATH": "official:."}

    def say(self, text: str) -> None:
        print(f"\n# {text}", flush=True)

    def run(self, command: str, *, expect: int) -> None:
        """Run a command; its data is shown, what the test runner says is not.

        Raises:
            SystemExit: It ended with another code than is expected.
        """
        print(f"$ {command}", flush=True)
        program, _, rest = command.partition(" ")
        start = [sys.executable] + (["-m", "truestep"] if program == "truestep" else [])
        done = subprocess.run(
            [*start, *rest.split()],
            cwd=self.folder,
            env={**os.environ, **self.environment, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stdout, end="", flush=True)
        if done.returncode != expect:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(f"{command}: exit code {done.returncode}, expected {expect}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
