"""A reference of 2 GB pushed and pulled, beside what its server does without us, in turns.

`plain` is the same bytes by the server's own means: a copy that is synced to the disk, a PUT and a
GET by an HTTP client, `put_file` and `get_file` of fsspec. Servers are processes of their own.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.common import emit, rounded
from tests.recording.test_store import recording
from tests.stores import Dav, served
from truestep.recording.format import Recording
from truestep.recording.remote.address import address
from truestep.recording.remote.objects import Remote
from truestep.recording.remote.opening import open_store
from truestep.recording.store import Store, place_of
from truestep.recording.table import tensor_table
from truestep.recording.team import pull, push

BAR = 0.7
BLOCK = 4 << 20

Move = Callable[[], object]
Opened = tuple[Remote, Callable[[Path], Move], Callable[[Path], Move]]
"""A store, and what sends a file there and fetches it by the server's own means."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="folder, webdav or bucket")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    met = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "references"
        os.environ["TRUESTEP_CACHE"] = str(Path(folder) / "cache")
        name = _reference(root, options.gb)
        for kind, opened in (("folder", _folder), ("webdav", _webdav), ("bucket", _bucket)):
            if options.only in kind:
                met &= _one(kind, opened, Path(folder), name, options.rounds)
    return 0 if met else 1


def _reference(root: Path, size_gb: float) -> str:
    """A reference of this size; its name."""
    small = recording(1.0)
    tensors = {"x": torch.arange(int(size_gb * 1e9 / 4), dtype=torch.float32)}
    manifest = small.manifest.model_copy(update={"tensors": tensor_table(tensors)})
    own = Recording.in_memory(tensors, manifest)
    Store(root).save(own, place_of(own))
    return place_of(own).name


@contextmanager
def _folder(
    folder: Path,
) -> Iterator[Opened]:
    target = folder / "plain copy"

    def sent(path: Path) -> None:
        _copied(path, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())

    yield (
        open_store(address(str(folder / "store"))),
        lambda path: lambda: sent(path),
        lambda path: lambda: _copied(target, path),
    )


def _copied(source: Path, target: Path) -> None:
    """By read and write, as over a network: within one file system, a kernel may copy nothing."""
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        shutil.copyfileobj(file, copy, BLOCK)


@contextmanager
def _process(serve: Callable[..., None], *given: Any) -> Iterator[str]:
    """A server in a process of its own; gives its address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *given), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve_dav(pipe: Any, folder: Path) -> None:
    with served(Dav, folder) as url:
        pipe.send(url)
        time.sleep(1e6)


def _serve_bucket(pipe: Any) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    pipe.send(f"http://{host}:{port}")
    time.sleep(1e6)


@contextmanager
def _webdav(
    folder: Path,
) -> Iterator[Opened]:
    with _process(_serve_dav, folder / "web") as url:

        def sent(path: Path) -> None:
            size = str(path.stat().st_size)
            with path.open("rb", buffering=0) as file:
                request = urllib.request.Request(
                    f"{url}/plain", method="PUT", data=iter(lambda: file.read(BLOCK), b"")
                )
                request.add_header("Content-Length", size)
                urllib.request.urlopen(request).close()

        def received(path: Path) -> None:
            with urllib.request.urlopen(f"{url}/plain") as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file, BLOCK)

        yield (
            open_store(address(url)),
            lambda path: lambda: sent(path),
            lambda path: lambda: received(path),
        )


@contextmanager
def _bucket(
    folder: Path,
) -> Iterator[Opened]:
    import boto3
    import fsspec

    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    with _process(_serve_bucket) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        boto3.client("s3").create_bucket(Bucket="team")
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        yield (
            open_store(address("s3://team/kept")),
            lambda path: lambda: files.put_file(str(path), "team/plain"),
            lambda path: lambda: files.get_file("team/plain", str(path)),
        )


def _one(kind: str, opened: Any, folder: Path, name: str, rounds: int) -> bool:
    root, theirs = folder / "references", folder / "theirs"
    samples: dict[str, list[float]] = {k: [] for k in ("put", "get", "push", "pull")}
    size = (root / name).stat().st_size
    with opened(folder) as (remote, sent, received):
        place = remote.address
        for number in range(-1, rounds):  # the first is not counted, and warms up what is cached
            for sha256 in [stored.sha256 for stored in remote.listed()]:
                remote.remove(f"objects/{sha256[:2]}/{sha256}", 0)
            for path in (theirs, folder / "cache", folder / "received"):
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
            theirs.mkdir()
            shutil.copy(root / "truestep.lock", theirs / "truestep.lock")
            pairs = [
                ("put", sent(root / name), "push", lambda: push(root, [name], remote)),
                ("get", received(folder / "received"), "pull", lambda: pull(theirs, [name], place)),
            ]
            for plain, own, word, ours in pairs:
                steps = [(plain, own), (word, ours)]
                for what, step in steps if number % 2 else reversed(steps):
                    began = time.perf_counter()
                    step()
                    if number >= 0:
                        samples[what].append(time.perf_counter() - began)
    met = [_told(kind, size, samples, *pair) for pair in (("push", "put"), ("pull", "get"))]
    return all(met)


def _told(kind: str, size: int, samples: dict[str, list[float]], ours: str, plain: str) -> bool:
    ratios = [b / a for a, b in zip(samples[ours], samples[plain], strict=True)]
    share = statistics.median(ratios)
    emit(
        "store",
        store=kind,
        what=ours,
        gb=round(size / 1e9, 2),
        median_s=round(statistics.median(samples[ours]), 2),
        plain_median_s=round(statistics.median(samples[plain]), 2),
        samples_s=rounded(samples[ours]),
        plain_samples_s=rounded(samples[plain]),
        share_of_plain_speed=round(share, 2),
        bar=BAR,
        met=share >= BAR,
    )
    return share >= BAR


if __name__ == "__main__":
    sys.exit(main())
