"""Servers on loopback that tests of stores talk to: WebDAV, plain files, a bucket, a fake Hub."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import pytest


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *given: Any) -> None:
        """Nothing."""

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        """Answer, head and body."""
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        """What was sent."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


class Dav(Quiet):
    """WebDAV, as much of it as servers have in common.

    `fault` is what goes wrong: `cut` ends an answer in the middle, `half` a request; `full` has no
    room; `refuse` says 403; `password` wants one.
    """

    fault: ClassVar[str] = ""

    def _file(self, path: str | None = None) -> Path:
        parts = unquote(urlsplit(path or self.path).path).strip("/").split("/")
        assert ".." not in parts
        return Path(self.directory, *parts)

    def _refused(self) -> bool:
        if self.fault == "refuse":
            self.answer(403)
        elif self.fault == "password" and self.headers.get("Authorization") != "Basic " + (
            base64.b64encode(b"me:pa/ss").decode()
        ):
            self.answer(401)
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self._refused():
            return
        file = self._file()
        if self.fault == "cut" and file.is_file():
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        if not self._refused():
            super().do_HEAD()

    def do_PUT(self) -> None:
        if self._refused():
            return
        if self.fault == "half":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return
        length = int(self.headers["Content-Length"])
        file = self._file()
        with file.open("wb") as target:
            while length:
                block = self.rfile.read(min(length, 1 << 20))
                if not block:
                    self.close_connection = True
                    return
                target.write(block)
                length -= len(block)
        if self.fault == "full":
            file.unlink()
            self.answer(507)
        else:
            self.answer(201)

    def do_MKCOL(self) -> None:
        if self._refused():
            return
        folder = self._file()
        if folder.is_dir():
            self.answer(405)
        elif not folder.parent.is_dir():
            self.answer(409)
        else:
            folder.mkdir(exist_ok=True)
            self.answer(201)

    def do_MOVE(self) -> None:
        if not self._refused():
            os.replace(self._file(), self._file(self.headers["Destination"]))
            self.answer(201)

    def do_DELETE(self) -> None:
        if not self._refused():
            there = self._file().exists()
            self._file().unlink(missing_ok=True)
            self.answer(204 if there else 404)

    def do_PROPFIND(self) -> None:
        self.body()
        folder = self._file()
        if self._refused():
            return
        if not folder.is_dir():
            self.answer(404)
            return
        rows = [self._row(path) for path in (folder, *sorted(folder.iterdir()))]
        text = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{"".join(rows)}</D:multistatus>'
        self.answer(207, text.encode())

    def _row(self, path: Path) -> str:
        status, name = path.stat(), path.relative_to(self.directory).as_posix()
        href = f"/{name}{'/' if path.is_dir() else ''}"
        return (
            f"<D:response><D:href>{href}</D:href><D:propstat><D:prop>"
            f"<D:getcontentlength>{status.st_size}</D:getcontentlength>"
            f"<D:getlastmodified>{formatdate(status.st_mtime, usegmt=True)}</D:getlastmodified>"
            "</D:prop></D:propstat></D:response>"
        )


@contextmanager
def served(handler: Callable[..., Any], folder: Path) -> Iterator[str]:
    """A server of a folder on loopback; gives its address."""
    folder.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Hub(Quiet):
    """The Hub's interface as far as one repository of large files needs it."""

    def _repo(self) -> Path:
        return Path(self.directory)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "lfs", "shouldIgnore": False} for f in files]
            self._json({"files": told})
        elif path.endswith("/objects/batch"):
            host = self.headers["Host"]
            objects = [
                {**o, "actions": {"upload": {"href": f"http://{host}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(body)
        elif "/paths-info/" in path:
            asked = json.loads(body) if body.startswith(b"{") else {}
            paths = asked.get("paths") or [unquote(p) for p in re.findall(rb"paths=([^&]+)", body)]
            self._json([self._told(p) for p in paths if (self._repo() / "main" / p).is_file()])
        else:
            self.answer(404)

    def _commit(self, body: bytes) -> None:
        main = self._repo() / "main"
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "lfsFile":
                target = main / value["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                stored = self._repo() / "lfs" / value["oid"]
                if not stored.is_file() or stored.stat().st_size != value["size"]:
                    self.answer(400)
                    return
                shutil.copyfile(stored, target)
            elif item["key"] == "deletedFile":
                (main / value["path"]).unlink()
        host = self.headers["Host"]
        url = f"http://{host}/datasets/team/refs/commit/{'0' * 40}"
        self._json({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(422)
            return
        (self._repo() / "lfs").mkdir(parents=True, exist_ok=True)
        (self._repo() / "lfs" / oid).write_bytes(content)
        self.answer(200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            file = self._repo() / "main" / path.split("/resolve/")[1].partition("/")[2]
            if file.is_file():
                etag = f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'
                self.answer(200, file.read_bytes(), ETag=etag, X_Repo_Commit="0" * 40)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        elif "/tree/" in path:
            folder = path.split("/tree/")[1].partition("/")[2]
            files = sorted((self._repo() / "main" / folder).rglob("*"))
            main = self._repo() / "main"
            told = [self._told(f.relative_to(main).as_posix()) for f in files if f.is_file()]
            if told:
                self._json(told)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self._json({"sha": "0" * 40, "id": "team/refs", "siblings": []})

    do_HEAD = do_GET  # noqa: N815

    def _told(self, path: str | bytes) -> dict[str, Any]:
        name = path.decode() if isinstance(path, bytes) else path
        status = (self._repo() / "main" / name).stat()
        commit = {"id": "0" * 40, "title": "t", "date": _iso(status.st_mtime)}
        return {"type": "file", "path": name, "size": status.st_size, "oid": "0" * 40,
                "lastCommit": commit}  # fmt: skip

    def _json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")


def _iso(at: float) -> str:
    from datetime import datetime, timezone

    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@contextmanager
def hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fake Hub with one repository; gives the address of a store in it."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    with served(Hub, folder) as url:
        patch.setenv("HF_ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield "hf://datasets/team/refs/kept"


@contextmanager
def bucket(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of moto's server; gives the address of a store in it."""
    for name in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install 'moto[server]' s3fs")
    import boto3
    from moto.server import ThreadedMotoServer

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(key, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        boto3.client("s3").create_bucket(Bucket="team")
        yield "s3://team/kept"
    finally:
        server.stop()
