"""A store in a bucket (S3, Google, Azure), by fsspec.

A bucket shows an object when all of it is there: nothing is sent under another name first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from truestep.errors import MissingExtraError, TruestepError, UsageError
from truestep.files import sha256_of
from truestep.progress import Progress
from truestep.recording.remote.address import PACKAGES, Address, failed
from truestep.recording.remote.objects import Remote, Stored, sha256_in, telling

CONNECT_S, READ_S, ATTEMPTS = 10, 60, 3
"""Of a bucket of S3: how long it is waited for, and how often it is asked."""


def cloud_store(place: Address) -> Remote:
    """The store in a bucket.

    Raises:
        MissingExtraError: The package that speaks to it is not installed.
        EndpointError: Its library does not take the address, or who asks.
    """
    files, root = _opened(place)
    bucket = _Bucket(place, files, root)
    return Remote(
        address=place,
        size=bucket.size,
        send=bucket.send,
        receive=bucket.receive,
        listed=bucket.listed,
        remove=bucket.remove,
        renew=bucket.renew,
    )


def _opened(place: Address) -> tuple[Any, str]:
    """The file system of fsspec, and the path of the store in it."""
    scheme = "abfs" if place.scheme == "az" else place.scheme
    parts = urlsplit(place.url)
    host = unquote(parts.netloc.rpartition("@")[2])
    root = f"{host}{unquote(parts.path)}".rstrip("/")
    try:
        import fsspec

        return fsspec.filesystem(scheme, **_options(place, scheme)), root
    except ImportError as error:
        package = PACKAGES[place.scheme]
        if (error.name or "").partition(".")[0] == "fsspec":
            raise MissingExtraError("fsspec", "hub", f"a store at {place.scheme}://") from None
        raise UsageError(
            f"a store at {place.scheme}:// needs the package {package!r}, which is not installed",
            hint=f"pip install {package}",
        ) from None
    except TruestepError:
        raise
    except Exception as error:  # a library of theirs: credentials, settings
        raise failed(place, "", error) from None


def _options(place: Address, scheme: str) -> dict[str, Any]:
    """What a file system is made with; who asks is known to its library, from the environment."""
    user, _, password = urlsplit(place.url).netloc.rpartition("@")[0].partition(":")
    plain = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme != "s3":
        return plain
    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
    }
    named = {"key": unquote(user), "secret": unquote(password)} if user and password else {}
    return {**plain, "config_kwargs": config, **named}


class _Bucket:
    """The functions of a store on a file system of fsspec."""

    def __init__(self, place: Address, files: Any, root: str) -> None:
        self.place, self._files, self._root = place, files, root

    def size(self, name: str) -> int | None:
        """Bytes of an object."""
        with self._telling(name):
            try:
                self._forget(name)
                return int(self._files.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def send(self, path: Path, name: str, good: Callable[[], None], progress: Progress) -> None:
        """Send a file; what a bucket is sent is seen at once, so that it is hashed before."""
        good()
        with self._telling(name):
            self._files.put_file(str(path), self._path(name), callback=_callback("sent", progress))

    def receive(self, name: str, path: Path, progress: Progress) -> str:
        """Write an object to a path."""
        with self._telling(name, path):
            callback = _callback("received", progress)
            self._files.get_file(self._path(name), str(path), callback=callback)
            return sha256_of(path)

    def listed(self) -> Iterator[Stored]:
        """All objects."""
        folder = self._path("objects")
        with self._telling("objects"):
            self._files.invalidate_cache()
            try:
                found = self._files.find(folder, detail=True)
            except FileNotFoundError:
                found = {}
        for name, info in sorted(found.items()):
            sha256 = sha256_in(name)
            if sha256 is not None:
                yield Stored(sha256, int(info["size"]), _modified(info))

    def remove(self, name: str, age_s: float) -> bool:
        """Take an object away, if it is old."""
        with self._telling(name):
            try:
                self._forget(name)
                info = self._files.info(self._path(name))
                modified = _modified(info)
                if age_s and (modified is None or time.time() - modified < age_s):
                    return False
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return False
        return True

    def renew(self, name: str) -> None:
        """Give an object of S3 the present as its date: it is copied over itself there."""
        if self.place.scheme != "s3":
            return
        with self._telling(name):
            path = self._path(name)
            try:
                modified = _modified(self._files.info(path))
                if modified is None or time.time() - modified > RENEWED_S:
                    self._files.copy(path, path, MetadataDirective="REPLACE")
            except FileNotFoundError:
                return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _forget(self, name: str) -> None:
        self._files.invalidate_cache(self._path(name).rpartition("/")[0])

    @contextmanager
    def _telling(self, name: str, path: Path | None = None) -> Iterator[None]:
        """Make what a library raises an error of ours."""
        with telling(self.place, name, path, passed=(TruestepError, FileNotFoundError)):
            yield


RENEWED_S = 24 * 3600.0
"""An object that is younger is young enough."""


def _modified(info: dict[str, Any]) -> float | None:
    """When an object was written, as one or another file system says it."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "uploaded_at", "created"):
        value = info.get(key)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            at = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
            return at.timestamp()
    return None


def _callback(what: str, progress: Progress) -> Any:
    from fsspec.callbacks import Callback

    class Told(Callback):  # type: ignore[misc]
        def call(self, hook_name: str | None = None, **given: Any) -> None:
            progress(what, self.value, self.size or self.value)

    return Told()
