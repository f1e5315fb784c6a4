"""A server process on loopback, shared by the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Address = Callable[..., str]


@pytest.fixture(scope="session")
def server() -> Iterator[Address]:
    """Addresses of a server by what is wrong with it: `server(ignore="seed")`."""
    for package in ("httpx2", "diffusers", "transformers"):
        pytest.importorskip(package)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "server.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        def address(**setup: object) -> str:
            words = ",".join(f"{key}={value}" for key, value in setup.items())
            return f"http://127.0.0.1:{port}/{words or 'model=0'}"

        yield address
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
