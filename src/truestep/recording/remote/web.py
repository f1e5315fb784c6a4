"""A store behind http(s): read from any server, written to one that speaks WebDAV (RFC 4918).

An object is sent under another name and moved when it is whole. No answer is followed to another
address, and a name and password of the URL go to its own server alone.
"""

from __future__ import annotations

import base64
import http.client
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from truestep.errors import EndpointError
from truestep.progress import Progress
from truestep.recording.remote.address import Address
from truestep.recording.remote.objects import (
    Remote,
    Stored,
    blocks,
    sha256_in,
    write_hashed,
)

TIMEOUT_S = 60.0
"""Longest silence of a server that is waited for."""

MOST_BYTES = 256 * 2**20
"""Largest list of objects that is read."""

_TEMPORARY = "incoming"
_ABSENT = (404, 410)
_HINT = "curl -I {}  # asks the server without truestep"


@dataclass(frozen=True)
class _Server:
    place: Address

    def url(self, name: str) -> str:
        """Address of an object, without who asks for it."""
        parts = urlsplit(self.place.url)
        path = f"{parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, parts.query, ""))

    def headers(self) -> dict[str, str]:
        """Who asks."""
        user = urlsplit(self.place.url).netloc.rpartition("@")[0]
        if not user:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()}

    @contextmanager
    def asked(
        self,
        method: str,
        name: str,
        *,
        data: Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
    ) -> Iterator[Any]:
        """An answer of the server, as it comes; those of `accept` are given beside those of 2xx."""
        request = urllib.request.Request(
            self.url(name),
            method=method,
            data=data,
            headers={**self.headers(), **(headers or {})},
        )
        try:
            with closing(_opener().open(request, timeout=TIMEOUT_S)) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with closing(error):
                if error.code not in accept:
                    raise self.refused(name, method, error.code, error.reason) from None
                yield error
        except (OSError, http.client.HTTPException) as error:
            raise self.silent(name, error) from None

    def refused(self, name: str, method: str, code: int, reason: object) -> EndpointError:
        """The error for an answer that says no."""
        likely = {
            401: "the address needs a name and a password, or a token",
            403: "who is named in the address may not do that",
            405: "it is a plain server of files: objects are read from it and sent elsewhere",
            501: "it is a plain server of files: objects are read from it and sent elsewhere",
            507: "its disk is full",
        }
        moved = "it sends to another address, which is not followed" if 300 <= code < 400 else ""
        return EndpointError(
            f"the store refuses {method}",
            where=f"{self.place.shown}: {name}",
            measured=self.place.clean(f"HTTP {code} {reason}"),
            likely=moved or likely.get(code, ""),
            hint=_HINT.format(quote(self.place.shown, safe=":/")),
        )

    def silent(self, name: str, error: Exception) -> EndpointError:
        """The error for a server that does not answer."""
        reason = getattr(error, "reason", None) or error
        return EndpointError(
            "the store does not answer",
            where=f"{self.place.shown}: {name}",
            measured=self.place.clean(f"{type(error).__name__}: {reason}")[:200],
            likely="the network is down, or the address is wrong",
            hint=_HINT.format(quote(self.place.shown, safe=":/")),
        )

    def ask(self, method: str, name: str, **given: Any) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content of a short answer."""
        with self.asked(method, name, **given) as answer:
            return answer.status, answer.headers, answer.read(MOST_BYTES)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        """Follow nothing."""


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Stay)


def web_store(place: Address) -> Remote:
    """The store behind an address of the web."""
    server = _Server(place)
    return Remote(
        address=place,
        size=lambda name: _size(server, name),
        send=lambda path, name, good, note: _send(server, path, name, good, note),
        receive=lambda name, path, note: _receive(server, name, path, note),
        listed=lambda: _listed(server),
        remove=lambda name, age_s: _remove(server, name, age_s),
        renew=lambda name: None,
    )


def _size(server: _Server, name: str) -> int | None:
    code, headers, _ = server.ask("HEAD", name, accept=_ABSENT)
    if code in _ABSENT:
        return None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else -1


def _send(
    server: _Server, path: Path, name: str, good: Callable[[], None], progress: Progress
) -> None:
    temporary = f"{_TEMPORARY}/{path.name[:40]}.{secrets.token_hex(8)}"
    size = path.stat().st_size
    for folder in (_TEMPORARY, "objects", name.rpartition("/")[0]):
        server.ask("MKCOL", f"{folder}/", accept=(301, 405, 409))  # there already; or see below
    headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    try:
        with path.open("rb") as file:
            data = blocks(file, size, progress, "sent")
            server.ask("PUT", temporary, data=data, headers=headers)
        good()
        moved = {"Destination": server.url(name), "Overwrite": "T"}
        server.ask("MOVE", temporary, headers=moved)
    except BaseException:
        with suppress(EndpointError):
            server.ask("DELETE", temporary, accept=_ABSENT)
        raise


def _receive(server: _Server, name: str, path: Path, progress: Progress) -> str:
    with server.asked("GET", name) as answer:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else 0
        digest = write_hashed(_read(server, name, answer, total, progress), path)
    received = path.stat().st_size
    if total and received != total:
        raise EndpointError(
            "the store stopped in the middle of an object",
            where=f"{server.place.shown}: {name}",
            measured=f"{received:,} of {total:,} bytes came",
            likely="the network went down",
            hint="truestep references pull  # begins it again",
        )
    return digest


def _read(
    server: _Server, name: str, answer: IO[bytes], total: int, progress: Progress
) -> Iterator[bytes]:
    """An answer block by block; what the network raises is told as such, and not as the disk's."""
    try:
        yield from blocks(answer, total, progress, "received")  # type: ignore[arg-type]
    except (OSError, http.client.HTTPException) as error:
        raise server.silent(name, error) from None


def _listed(server: _Server) -> Iterator[Stored]:
    for folder in sorted(_members(server, "objects/")):
        if re.fullmatch(r"[0-9a-f]{2}", folder):
            yield from _objects(server, f"objects/{folder}/")


def _members(server: _Server, name: str) -> dict[str, str]:
    """What WebDAV lists in a folder: last part of each name to its XML."""
    code, _, text = server.ask("PROPFIND", name, headers={"Depth": "1"}, accept=_ABSENT)
    if code in _ABSENT:
        return {}
    # Taken apart by hand: nothing in it is expanded, whatever a server sends.
    found = {}
    for part in re.split(r"<(?:\w+:)?response\b", text.decode("utf-8", "replace"))[1:]:
        href = re.search(r"<(?:\w+:)?href[^>]*>\s*([^<]+?)\s*<", part)
        if href:
            found[unquote(urlsplit(href[1]).path).rstrip("/").rpartition("/")[2]] = part
    return found


def _objects(server: _Server, folder: str) -> Iterator[Stored]:
    for name, part in sorted(_members(server, folder).items()):
        sha256 = sha256_in(folder + name)
        if sha256 is not None:
            size = re.search(r"getcontentlength[^>]*>\s*(\d+)", part)
            date = re.search(r"getlastmodified[^>]*>\s*([^<]+?)\s*<", part)
            yield Stored(sha256, int(size[1]) if size else -1, _time(date[1] if date else None))


def _time(text: str | None) -> float | None:
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(text or "").timestamp()
    return None


def _remove(server: _Server, name: str, age_s: float) -> bool:
    code, headers, _ = server.ask("HEAD", name, accept=_ABSENT)
    modified = _time(headers.get("Last-Modified"))
    if code in _ABSENT or (age_s and (modified is None or time.time() - modified < age_s)):
        return False
    server.ask("DELETE", name, accept=_ABSENT)
    return True
