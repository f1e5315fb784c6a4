"""Adapters against the engines' own source, where it is; and how they are started."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from truestep.engines.engine import ADAPTERS, Boundary, engine, running
from truestep.engines.watch.request import VARIABLE, Request, parse

PLACES = {
    "comfyui": "TRUESTEP_COMFYUI",
    "cosmos_predict2": "TRUESTEP_COSMOS_PREDICT2",
    "diffsynth": "TRUESTEP_DIFFSYNTH",
    "fastvideo": "TRUESTEP_FASTVIDEO",
    "flux": "TRUESTEP_FLUX",
    "hunyuan": "TRUESTEP_HUNYUAN",
    "ltx2": "TRUESTEP_LTX2",
    "sglang": "TRUESTEP_SGLANG",
    "vllm_omni": "TRUESTEP_VLLM_OMNI",
    "wan": "TRUESTEP_WAN",
    "xdit": "TRUESTEP_XDIT",
}
"""Variables that name a folder with the engine's source."""

SOURCES = {
    "flux": ("src",),
    "ltx2": ("packages/ltx-core/src", "packages/ltx-pipelines/src"),
}
"""Folders of the source in a repository, where it is not its root."""

OTHER_VERSIONS = {"wan.modules.vae2_1", "wan.modules.vae2_2", "wan.textimage2video"}
"""Of Wan 2.2, where 2.1 is looked at."""


def defined(file: Path) -> set[str]:
    """Functions of a file and methods of its classes."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = (part for part in node.body if isinstance(part, ast.FunctionDef))
            found |= {f"{node.name}.{part.name}" for part in inner}
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_an_adapter_names_is_in_the_engine(name: str) -> None:
    place = os.environ.get(PLACES[name])
    if not place:
        pytest.skip(f"{PLACES[name]} is not set")
    for boundary in engine(name).boundaries:
        path = f"{boundary.module.replace('.', '/')}.py"
        files = [Path(place) / source / path for source in SOURCES.get(name, ("",))]
        file = next((each for each in files if each.exists()), files[0])
        if boundary.module not in OTHER_VERSIONS or file.exists():
            own = ".".join(boundary.path)
            inherited = own.removesuffix("__call__") + "forward"  # a torch module's call
            assert {own, inherited} & defined(file), boundary


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_told_by_what_is_imported(name: str) -> None:
    own = engine(name)
    every = [engine(each) for each in ADAPTERS]
    assert running(own.packages, every) == [own]
    assert running(["torch"], every) == []
    assert all(isinstance(boundary, Boundary) for boundary in own.boundaries)


@pytest.mark.parametrize("group", ["sglang.multimodal_gen.plugins", "vllm_omni.general_plugins"])
def test_workers_that_load_plugins_start_the_recorder(group: str, tmp_path: Path) -> None:
    (entry,) = (each for each in entry_points(group=group) if each.name == "truestep")
    assert entry.value == "truestep.engines.watch.program:start_from_environment"
    entry.load()()  # nothing is asked for: nothing happens
    code = (
        "import torch\n"
        "from truestep.engines.watch.program import start_from_environment as start\n"
        "start()\n"
        "start()\n"  # by sitecustomize, and by the plugin
        "torch.nn.Linear(2, 2)(torch.ones(1, 2))\n"
    )
    request = Request(str(tmp_path / "run.safetensors"))
    environment = {**os.environ, VARIABLE: request.text()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "recorded" not in done.stderr
    (folder,) = tmp_path.glob("*.calls")
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_a_request_is_read_as_it_was_written() -> None:
    request = Request("a b/run.safetensors", engine="wan", largest=5, inject="folder")
    assert parse(request.text()) == request
    for text in ("", "[]", '{"output": 1, "more": 2}', "{"):
        with pytest.raises(ValueError):  # noqa: PT011 (json's own, or ours)
            parse(text)


def test_what_runs_in_an_engine_needs_torch_and_safetensors_alone() -> None:
    code = (
        "import sys, truestep.engines.watch.program, truestep.engines.watch.watcher\n"
        "import truestep.replay.contexts, safetensors.torch\n"
        "from truestep.engines.engine import engines\n"
        "engines()\n"
        "print(*(name for name in sys.modules if '.' not in name))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pydantic", "xxhash", "click", "rich", "scipy", "jinja2"} & {*done.stdout.split()}
