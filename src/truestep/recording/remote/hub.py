"""A store in a repository of the Hugging Face Hub: `hf://datasets/OWNER/NAME[/PREFIX]`.

The Hub shows an object when it is committed. What is removed stays in the repository's history.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from truestep.errors import MissingExtraError, UsageError
from truestep.files import sha256_of
from truestep.progress import Progress
from truestep.recording.remote.address import Address
from truestep.recording.remote.objects import Remote, Stored, sha256_in, telling

KINDS = {"datasets": "dataset", "models": "model", "spaces": "space"}


def hub_store(place: Address) -> Remote:
    """The store in a repository of the Hub.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        UsageError: The URL names no repository.
    """
    parts = urlsplit(place.url)
    kind = parts.netloc.rpartition("@")[2]
    owner, name, *rest = [*unquote(parts.path).strip("/").split("/"), ""]
    if kind not in KINDS or not owner or not name:
        raise UsageError(
            "the address names no repository of the Hub",
            where=place.shown,
            hint="write it as hf://datasets/OWNER/NAME",
        )
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", "a store at hf://") from None
    prefix = "/".join(rest).strip("/")
    token = unquote(parts.netloc.rpartition("@")[0].rpartition(":")[2])
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token or None)
    repo = _Repo(place, api, {"repo_id": f"{owner}/{name}", "repo_type": KINDS[kind]}, prefix)
    return Remote(
        address=place,
        size=repo.size,
        send=repo.send,
        receive=repo.receive,
        listed=repo.listed,
        remove=repo.remove,
        renew=lambda name: None,
    )


@dataclass(frozen=True)
class _Repo:
    """A repository: its place, the Hub's interface, how it is called there, and what is before
    every name."""

    place: Address
    api: Any
    of: dict[str, str]
    prefix: str

    def size(self, name: str) -> int | None:
        """Bytes of an object."""
        with self._telling(name):
            found = self.api.get_paths_info(paths=[self._path(name)], **self.of)
        return next((int(each.size) for each in found if hasattr(each, "size")), None)

    def send(self, path: Path, name: str, good: Callable[[], None], progress: Progress) -> None:
        """Commit a file; it is hashed before."""
        good()
        size = path.stat().st_size
        with self._telling(name):
            self.api.upload_file(
                path_or_fileobj=str(path),
                path_in_repo=self._path(name),
                commit_message=f"truestep: {name[-64:][:12]}",
                **self.of,
            )
        progress("sent", size, size)

    def receive(self, name: str, path: Path, progress: Progress) -> str:
        """Write an object to a path; what the Hub's client writes beside it goes with its folder,
        which is a temporary one."""
        folder = path.parent / "hub"
        with self._telling(name, path):
            came = self.api.hf_hub_download(
                filename=self._path(name), local_dir=str(folder), force_download=True, **self.of
            )
            os.replace(came, path)
        size = path.stat().st_size
        progress("received", size, size)
        return sha256_of(path)

    def listed(self) -> Iterator[Stored]:
        """All objects, each with the date of its last commit."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._telling("objects"):
            try:
                found = list(
                    self.api.list_repo_tree(
                        path_in_repo=self._path("objects"), recursive=True, expand=True, **self.of
                    )
                )
            except EntryNotFoundError:
                found = []
        for each in found:
            sha256 = sha256_in(each.path)
            if sha256 is not None and hasattr(each, "size"):
                yield Stored(sha256, int(each.size), _committed(each))

    def remove(self, name: str, age_s: float) -> bool:
        """Take an object out of the newest commit, if it is old."""
        with self._telling(name):
            found = self.api.get_paths_info(paths=[self._path(name)], expand=True, **self.of)
            if not found:
                return False
            at = _committed(found[0])
            if age_s and (at is None or time.time() - at < age_s):
                return False
            self.api.delete_file(path_in_repo=self._path(name), **self.of)
        return True

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}".lstrip("/")

    @contextmanager
    def _telling(self, name: str, path: Path | None = None) -> Iterator[None]:
        """Make what the Hub's client raises an error of ours."""
        with telling(self.place, name, path):
            yield


def _committed(each: Any) -> float | None:
    commit = getattr(each, "last_commit", None)
    return commit.date.timestamp() if commit is not None else None
