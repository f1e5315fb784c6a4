"""Stands-in for repositories that are not installed, and the originals where a variable says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Put = Callable[..., ModuleType]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Make a module importable for one test: name, and what it holds."""

    def make(name: str, *, path: str | None = None, **content: object) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(content)
        module.__path__ = [path] if path else []
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def unpacked(variable: str, inside: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of an unpacked wheel or a checkout; the test is skipped where none is named."""
    folder = os.environ.get(variable, "")
    if not folder or not (Path(folder) / inside).exists():
        pytest.skip(f"{variable} names no folder that holds {inside}")
    package = inside.partition("/")[0]
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    return Path(folder)


class Generator:
    """What FastVideo's VideoGenerator is to the gate: made, called once, and shut down."""

    latent: Any = torch.zeros(1)
    seen: list[Any] = []  # noqa: RUF012 -- reset for every test
    executor = None

    @classmethod
    def from_pretrained(cls, model_path: str, **given: object) -> Generator:
        cls.seen.append(("made", model_path, given, os.environ.get("FASTVIDEO_ATTENTION_BACKEND")))
        return cls()

    def generate_video(self, prompt: str, **given: object) -> object:
        self.seen.append(("called", prompt, given))
        return self.latent


@pytest.fixture
def generator() -> type[Generator]:
    Generator.seen, Generator.latent = [], torch.zeros(1)
    return Generator


@pytest.fixture
def fastvideo(put: Put, generator: type[Generator]) -> type[Generator]:
    """A stand-in for FastVideo's package, with the helpers that its gate calls."""

    @contextmanager
    def attention_backend(name: str) -> Iterator[None]:
        os.environ["FASTVIDEO_ATTENTION_BACKEND"] = name
        try:
            yield
        finally:
            del os.environ["FASTVIDEO_ATTENTION_BACKEND"]

    def reference_folder(script: str, device: str, model: str, backend: str) -> str:
        return os.path.join(script, "reference_videos", "default", device, model, backend)

    def output_folder(script: str, device: str, model: str, backend: str) -> str:
        return os.path.join(script, "generated_videos", "default", device, model, backend)

    put("fastvideo", VideoGenerator=generator)
    put("fastvideo.tests")
    put("fastvideo.tests.ssim")
    put(
        "fastvideo.tests.ssim.inference_similarity_utils",
        attention_backend=attention_backend,
        build_init_kwargs=lambda base: {"num_gpus": base["num_gpus"]},
        build_generation_kwargs=lambda base, steps, folder: {
            "num_inference_steps": steps,
            "output_path": folder,
            "seed": base["seed"],
        },
        shutdown_executor=lambda made: generator.seen.append(("shut", made is not None)),
    )
    put(
        "fastvideo.tests.ssim.reference_utils",
        build_generated_output_dir=output_folder,
        build_reference_folder_path=reference_folder,
        select_ssim_params=lambda default, full: default,
    )
    put(
        "fastvideo.tests.ssim.bootstrap_references",
        xfail_missing_reference_in_bootstrap_mode=lambda **given: generator.seen.append(given),
    )
    return generator


@pytest.fixture
def original_fastvideo(
    put: Put, generator: type[Generator], monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """FastVideo's own module, with all of it but its generator; TRUESTEP_FASTVIDEO=FOLDER."""
    inside = "fastvideo/tests/ssim/latent_similarity_utils.py"
    folder = unpacked("TRUESTEP_FASTVIDEO", inside, monkeypatch)
    put("fastvideo", path=str(folder / "fastvideo"), VideoGenerator=generator)
    put("fastvideo.tests", path=str(folder / "fastvideo" / "tests"))
    put("fastvideo.tests.utils", compute_video_ssim_torchvision=None, write_ssim_results=None)
    put("fastvideo.worker")
    put("fastvideo.worker.multiproc_executor", MultiprocExecutor=type("MultiprocExecutor", (), {}))
    names = ("inference_similarity_utils", "reference_utils", "bootstrap_references")
    for name in ("reference_videos_cli", *names, "latent_similarity_utils"):
        monkeypatch.delitem(sys.modules, f"fastvideo.tests.ssim.{name}", raising=False)
    module = import_module("fastvideo.tests.ssim.latent_similarity_utils")
    for name in [n for n in sys.modules if n.startswith("fastvideo")]:  # gone with the test
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module


@pytest.fixture
def sglang(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SGLang's package; the folder of its threshold files, which is empty."""
    folder = tmp_path / "site" / "sglang" / "multimodal_gen" / "test" / "server"
    thresholds = folder / "consistency_thresholds"
    thresholds.mkdir(parents=True)
    (tmp_path / "site" / "sglang" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("sglang.multimodal_gen", "sglang.multimodal_gen.test"):
        put(name)
    put("sglang.multimodal_gen.test.test_utils", compute_clip_embedding=embedding, other=embedding)
    monkeypatch.setenv("SGLANG_DIFFUSION_CONSISTENCY_PLATFORM", "h100")
    return thresholds


def embedding(image: Any) -> Any:
    """What stands for CLIP: the mean colour of four quarters, of length 1."""
    import numpy as np

    parts = [
        part.mean((0, 1)) for half in np.array_split(image, 2) for part in (half[:, ::2], half)
    ]
    joined = np.concatenate(parts) + 1.0
    return joined / np.linalg.norm(joined)


@pytest.fixture
def original_sglang(put: Put, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's own module, without its runtime and CLIP; TRUESTEP_SGLANG=FOLDER."""
    for package in ("skimage", "cv2"):
        pytest.importorskip(package)
    folder = unpacked("TRUESTEP_SGLANG", "sglang/multimodal_gen/test/test_utils.py", monkeypatch)
    root = "sglang.multimodal_gen"
    put("sglang", path=str(folder / "sglang"))
    put(root, path=str(folder / "sglang" / "multimodal_gen"))
    for name in ("runtime", "runtime.utils"):
        put(f"{root}.{name}")
    nothing = dict.fromkeys(("is_npu", "is_sm120", "is_blackwell", "is_xpu"), lambda self: False)
    put(f"{root}.runtime.platforms", current_platform=type("Platform", (), nothing)())
    put(f"{root}.runtime.utils.common", get_bool_env_var=None)
    put(f"{root}.runtime.utils.logging_utils", init_logger=lambda name: None)
    put(
        f"{root}.runtime.utils.perf_logger", RequestPerfRecord=dict, get_diffusion_perf_log_dir=None
    )
    if "httpx" not in sys.modules:
        put("httpx")
    put(f"{root}.test", path=str(folder / "sglang" / "multimodal_gen" / "test"))
    monkeypatch.delitem(sys.modules, f"{root}.test.test_utils", raising=False)
    module = import_module(f"{root}.test.test_utils")
    monkeypatch.setitem(sys.modules, f"{root}.test.test_utils", module)
    monkeypatch.setattr(module, "compute_clip_embedding", embedding)
    monkeypatch.setenv("SGLANG_DIFFUSION_CONSISTENCY_PLATFORM", "h100")
    return module
