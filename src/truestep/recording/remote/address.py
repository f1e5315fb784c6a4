"""The address of a store: where it is said, of which kind it is, and how it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from truestep.errors import EndpointError, UsageError
from truestep.reading import parse_toml, read

VARIABLE = "TRUESTEP_STORE"
SETTINGS = "truestep.toml"

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
"""The scheme of a bucket's URL to the package that speaks to its servers, for fsspec."""

SCHEMES = ("file", "http", "https", "hf", *PACKAGES)


@dataclass(frozen=True)
class Address:
    """A store's URL, taken apart.

    Attributes:
        url: As it was given; it may hold a password, and is in no text of ours.
        scheme: One of `SCHEMES`.
        folder: Of a folder, where it is.
    """

    url: str
    scheme: str
    folder: Path | None = None

    @property
    def shown(self) -> str:
        """What it is called in texts: without passwords and what a query says."""
        if self.folder is not None:
            return str(self.folder)
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))

    @property
    def secrets(self) -> tuple[str, ...]:
        """What in the URL nobody may read, as it stands there and as it is meant."""
        if self.folder is not None:
            return ()
        parts = urlsplit(self.url)
        user = parts.netloc.rpartition("@")[0]
        values = [pair.partition("=")[2] or pair for pair in parts.query.split("&")]
        words = [user, *user.split(":"), parts.query, *values, parts.fragment]
        both = {form for word in words for form in (word, unquote(word)) if form}
        return tuple(sorted(both, key=len, reverse=True))

    def clean(self, text: str) -> str:
        """A text of a library's, without what nobody may read."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def address(text: str, *, base: Path | None = None) -> Address:
    """Take a store's URL apart, before anything is sent to it.

    Args:
        text: A folder, or a URL of one of `SCHEMES`.
        base: What a relative folder counts from; default the current folder.

    Raises:
        UsageError: It is none, or of a scheme that is not known.
    """
    if not text.strip() or re.search(r"[\x00-\x1f\x7f]", text):
        raise UsageError("the address of a store is empty or holds control characters", hint=_FORMS)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if found is None:
        folder = Path(text).expanduser()
        return Address(text, "file", ((base or Path()) / folder).resolve())
    scheme = found[1].lower()
    if scheme not in SCHEMES:
        raise UsageError(
            f"no store is reached by {scheme}://",
            measured=f"known: a folder, {', '.join(f'{name}://' for name in SCHEMES)}",
            hint=_FORMS,
        )
    try:
        parts = urlsplit(text)
        empty = not (parts.netloc.rpartition("@")[2] or (scheme == "file" and parts.path))
        _ = parts.port if scheme in ("http", "https") else None
    except ValueError:
        empty = True
    if empty:
        raise UsageError("the address of the store names no server or bucket", hint=_FORMS)
    if scheme == "file":
        return Address(text, scheme, Path(unquote(parts.path)))
    return Address(text, scheme)


_FORMS = "give --store DIR, s3://BUCKET/PREFIX, gs://, az://, hf://datasets/OWNER/NAME or https://"


def configured(root: Path) -> Address | None:
    """The store of a reference folder, as the environment or a case file says; None without one.

    `TRUESTEP_STORE` is taken before `[references] store` of `truestep.toml` here, and that before
    the one beside the folder. A relative folder counts from the file that names it.

    Raises:
        UsageError: What is said is no address.
    """
    said = os.environ.get(VARIABLE)
    if said:
        return address(said)
    for path in _unique((Path(SETTINGS), root.absolute().parent / SETTINGS)):
        if path.is_file() and (text := _of_file(path)) is not None:
            return address(text, base=path.absolute().parent)
    return None


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list({path.absolute(): path for path in paths}.values())


def _of_file(path: Path) -> str | None:
    table = read(path, "the case file cannot be read", parse_toml, raises=UsageError).get(
        "references"
    )
    return None if table is None else store_of(table, path)


def store_of(table: object, path: Path) -> str | None:
    """What the table `[references]` of a case file says.

    Raises:
        UsageError: It holds something else.
    """
    known = isinstance(table, dict) and set(table) <= {"store"}
    store = table.get("store") if isinstance(table, dict) else None
    if not known or not (store is None or isinstance(store, str)):
        raise UsageError(
            "the table [references] of the case file is not understood",
            where=str(path),
            measured="it may hold one line: store",
            hint='write it as store = "s3://bucket/prefix"',
        )
    return store


def failed(place: Address, name: str, error: Exception) -> EndpointError:
    """The error for a store whose library refuses, or has no answer."""
    inner = error.__cause__ or error
    text = place.clean(f"{type(inner).__name__}: {inner}".splitlines()[0])[:200]
    words = ("Permission", "Forbidden", "Unauthorized", "403", "401", "redential", "AccessDenied")
    refused = any(word in text for word in words)
    return EndpointError(
        "the store refuses" if refused else "the store does not answer as it should",
        where=f"{place.shown}: {name}".rstrip(": "),
        measured=text,
        likely="who asks is not known there, or may not do that"
        if refused
        else "the network is down, or the address is wrong",
        hint="name the server and who asks in the variables of its library, such as "
        "AWS_ENDPOINT_URL, AWS_PROFILE, HF_TOKEN",
    )
