"""`truestep new test`: what it writes is made, passes, and fails where the model is damaged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import Run, runner
from truestep.testing import tiny
from truestep.testing.new_test import new_test

MODULES = """
import torch

def linear():
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.GELU())

def convolution():
    return torch.nn.Conv2d(3, 4, 3)

def embedding():
    return torch.nn.Embedding(10, 4)

def several():
    return torch.nn.Bilinear(2, 3, 4), {"input1": torch.ones(1, 2), "input2": torch.ones(1, 3)}

class Two(torch.nn.Linear):
    def forward(self, input):
        return (super().forward(input), input)

def pair():
    return Two(6, 4)

def untold():
    return torch.nn.Bilinear(2, 3, 4)

def nothing():
    return 3

def needs(name):
    return None
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `truestep new test`."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd, "new", "test")


def printed(out: str, label: str) -> list[str]:
    """The words of a command that was printed."""
    (line,) = re.findall(rf"^{label}: pytest (.*)$", out, re.MULTILINE)
    return line.split()


def ended_as(*arguments: str, **environment: str) -> dict[str, str]:
    """Run pytest in a process of its own; what became of each test, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^(PASSED|FAILED) \S+::test_(\w+)", done.stdout, re.MULTILINE)
    return {name: word for word, name in found} | {"": done.stdout}


@pytest.mark.slow
def test_a_pipeline_from_its_folder_to_a_failure(run: Run) -> None:
    tiny.save("FluxPipeline", "flux")
    code, out, _ = run("flux")
    assert code == 0
    assert out.startswith("WROTE test_flux.py: one test of FluxPipeline\n")
    update, check = printed(out, "reference"), printed(out, "check")
    text = Path("test_flux.py").read_text("utf-8")
    assert text.count("# edit: ") >= 4
    missing = ended_as(*check)
    assert missing["flux"] == "FAILED"
    assert "E   ReferenceNotFoundError: this check has no reference yet" in missing[""]
    assert list(Path().rglob("*.candidate")) == []  # it was told before the pipeline ran
    assert ended_as(*update)["flux"] == "PASSED"
    assert ended_as(*check)["flux"] == "PASSED"
    (weights,) = Path("flux/transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 0.1
    save_file(tensors, weights, {"format": "pt"})
    damaged = ended_as(*check, "--truestep-json=r.json")
    assert damaged["flux"] == "FAILED"
    lines = damaged[""].splitlines()
    place = "transformer.forward (cond) at step 0: output 0"
    (at,) = [n for n, line in enumerate(lines) if line.startswith(f"E   FAILED drifted: {place}, ")]
    before = [line for line in lines[at - 3 : at] if set(line) - set(" ^")]  # what Python marks
    assert re.fullmatch(r"test_flux\.py:\d+: in test_flux", before[-2])
    assert before[-1].startswith("    truestep.check_pipeline(pipe, CALL)")
    assert '"prompt": "a small red cube on a wooden table"' in Path("r.json").read_text("utf-8")


@pytest.mark.parametrize("folder", ["", "inner/"])
def test_modules_by_the_functions_that_load_them(run: Run, folder: str) -> None:
    Path("given_modules.py").write_text(MODULES)
    names = ("linear", "convolution", "embedding", "several", "pair")
    for name in names:
        code, out, _ = run(f"given_modules.py:{name}", "--output", f"{folder}test_{name}.py")
        assert code == 0
        assert printed(out, "check") == [f"{folder}test_{name}.py"]
        assert printed(out, "reference") == [f"{folder}test_{name}.py", "--truestep-update"]
    paths = [f"{folder}test_{name}.py" for name in names]
    for arguments in ([*paths, "--truestep-update"], paths):
        made = ended_as(*arguments)
        assert [made[name] for name in names] == ["PASSED"] * 5
    for path in map(Path, paths):
        change = "    next(module.parameters()).mul_(1.01)\n    # edit: here goes"
        path.write_text(path.read_text().replace("    # edit: here goes", change))
    made = ended_as(*paths)
    assert [made[name] for name in names] == ["FAILED"] * 5
    assert made[""].count("\nE   FAILED drifted: ") == 5


def test_a_module_by_its_import_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given_package").mkdir()
    (tmp_path / "given_package" / "port.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = run("given_package.port:linear")
    assert code == 0
    assert "from given_package.port import linear" in Path("test_linear.py").read_text("utf-8")
    assert ended_as(*printed(out, "reference"))["linear"] == "PASSED"
    code, _, err = run("given_package.port:absent")
    assert code == 2
    assert "no function 'absent'" in err


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        ("given_modules.py:untold", "return them beside the module: return module, {"),
        ("given_modules.py:nothing", "returns no module"),
        ("given_modules.py:needs", "give a function that takes no arguments"),
        ("absent", "this is no folder of a pipeline"),
        (".", "Error"),
        ("absent.py:load", "cannot be read"),
        ("no_such_package:load", "cannot be imported"),
    ],
)
def test_what_cannot_be_tested_is_refused(run: Run, subject: str, told: str) -> None:
    Path("given_modules.py").write_text(MODULES)
    code, _, err = run(subject, "--output", "test_new.py")
    assert code == 2
    assert told in err
    assert not Path("test_new.py").exists()


def test_a_test_that_exists_is_not_replaced(run: Run) -> None:
    Path("given_modules.py").write_text(MODULES)
    Path("test_linear.py").write_text("mine")
    code, _, err = run("given_modules.py:linear")
    assert code == 2
    assert "hint: truestep new test given_modules.py:linear --output test_linear_2.py" in err
    assert Path("test_linear.py").read_text() == "mine"


def test_pictures_are_drawn_and_said_to_be(tmp_path: Path) -> None:
    tiny.save("FluxImg2ImgPipeline", tmp_path / 'it\'s "flux"')
    made = new_test(str(tmp_path / 'it\'s "flux"'), tmp_path / "deep" / "test_it.py")
    assert 'EXAMPLE = example_call("FluxImg2ImgPipeline")' in made.text
    assert '"image": EXAMPLE["image"],  # edit: ' in made.text
    names: dict[str, object] = {"__file__": str(made.path), "__name__": "test_it"}
    exec(compile(made.text, "test_it.py", "exec"), names)
    assert isinstance(names["MODEL"], Path)
    assert names["MODEL"].resolve() == (tmp_path / 'it\'s "flux"').resolve()
    assert torch.is_grad_enabled()
