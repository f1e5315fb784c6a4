"""Tiny random pipelines in diffusers layout, shared by the tests. No network; one thread, or
TRUESTEP_TEST_THREADS."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("TRUESTEP_TEST_THREADS", "1"))
# A floor runs under two threads: on busy cores, each would wait in a loop for the other's turn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import settings

from tests.bars import WHOLE
from tests.warm import warm

settings.register_profile("any machine", deadline=None)  # no test fails by a clock
settings.load_profile("any machine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not WHOLE and item.get_closest_marker("bar"):
            item.add_marker(pytest.mark.skip(reason="a bar in full: make bars"))


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Restore torch's thread count, which tests of the noise floor change."""
    yield
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(int(os.environ.get("TRUESTEP_TEST_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def _no_store_and_a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of this machine's is fetched, and nothing is kept there."""
    os.environ.pop("TRUESTEP_STORE", None)
    os.environ["TRUESTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random Wan pipelines by kind."""
    from bench.faults.tiny import WAN_KINDS, build_tiny_wan

    root = tmp_path_factory.mktemp("wan")
    return {kind: build_tiny_wan(root / kind, kind) for kind in WAN_KINDS}


@pytest.fixture(scope="session")
def tiny_case(tiny_wan: dict[str, Path]) -> dict[str, object]:
    """Keyword arguments of a `Case` that suits the tiny pipelines, without the model."""
    return {
        "prompt": "a red three moving left",
        "steps": 4,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 8,
        "settings": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def tiny_cosmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Cosmos text-to-world pipeline."""
    from bench.faults.tiny import build_tiny_cosmos

    return build_tiny_cosmos(tmp_path_factory.mktemp("cosmos") / "cosmos")


@pytest.fixture(scope="session")
def cosmos_case() -> dict[str, object]:
    """Keyword arguments of a `Case` that suits it, without the model."""
    return {
        "prompt": "a red three moving left",
        "steps": 4,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 32,
        "num_frames": 9,
        "max_sequence_length": 8,
        "settings": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def tiny_ltx2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random LTX-2 pipelines by model version."""
    from bench.faults.tiny import build_tiny_ltx2

    root = tmp_path_factory.mktemp("ltx2")
    return {version: build_tiny_ltx2(root / version, version) for version in ("2.0", "2.3")}


@pytest.fixture(scope="session")
def ltx2_case() -> dict[str, object]:
    """Keyword arguments of a `Case` that suits them, without the model."""
    return {
        "prompt": "a red three moving left",
        "negative_prompt": "a blue one",
        "steps": 4,
        "height": 64,
        "width": 96,
        "num_frames": 17,
        "max_sequence_length": 16,
        "seed": 7,
        "settings": {
            "profile": "diffusers-0.42.1",
            "stg_blocks": [1],
            "audio_stg_blocks": [1],
            "device": "cpu",
        },
    }


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    """Processes of this interpreter begin with their imports made; see `tests.warm`."""
    with warm():
        yield
