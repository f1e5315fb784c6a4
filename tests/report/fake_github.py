"""GitHub's API as far as a comment needs it, on loopback, and a `gh` that speaks to it."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

BOT = {"login": "github-actions[bot]", "type": "Bot"}

GH = """#!{python}
import sys, urllib.error, urllib.request
words = sys.argv[1:]
assert words[:2] == ["api", "--method"], words
method, path, rest = words[2], words[3], words[4:]
body = sys.stdin.buffer.read() if rest == ["--input", "-"] else None
request = urllib.request.Request("{address}/" + path, data=body, method=method)
try:
    sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=10).read())
except urllib.error.HTTPError as error:
    sys.exit("gh: %s (HTTP %d)" % (error.reason, error.code))
"""


@dataclass
class GitHub:
    """What the server holds and was asked.

    Attributes:
        comments: By pull request. heads: commit of each open pull request. login: the token's own.
        asked: Method and path of every request. refuse: methods that are answered by 403.
    """

    comments: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    heads: dict[int, str] = field(default_factory=dict)
    login: str = BOT["login"]
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuse: tuple[str, ...] = ()

    def add(self, number: int, body: str, user: dict[str, str]) -> dict[str, Any]:
        """A comment that somebody wrote."""
        count = sum(map(len, self.comments.values()))
        url = f"https://github.com/acme/video/pull/{number}#issuecomment-{count}"
        made = {"id": count, "body": body, "user": user, "html_url": url}
        self.comments.setdefault(number, []).append(made)
        return made

    def answer(self, method: str, path: str, body: Any) -> Any:
        """What GitHub's API answers; None for 404."""
        self.asked.append((method, path))
        address = urlsplit(path)
        parts, query = address.path.strip("/").split("/"), parse_qs(address.query)
        if parts == ["graphql"]:
            return {"data": {"viewer": {"login": self.login}}}
        if parts[:3] != ["repos", "acme", "video"]:
            return None
        if parts[3:] == ["pulls"]:
            assert query["state"] == ["open"]
            assert query["head"] == ["someone:faster&state=closed#1"]
            return [{"number": n, "head": {"sha": sha}} for n, sha in self.heads.items()]
        if parts[3:5] == ["issues", "comments"]:
            every = [c for found in self.comments.values() for c in found]
            comment = next(c for c in every if c["id"] == int(parts[5]))
            comment["body"] = body["body"]
            return comment
        number = int(parts[4])
        if method == "POST":
            return self.add(number, body["body"], BOT)
        size, page = int(query["per_page"][0]), int(query["page"][0])
        return self.comments.get(number, [])[size * (page - 1) : size * page]


@contextmanager
def served(github: GitHub, folder: Path) -> Iterator[Path]:
    """Serve it, and yield a folder with a `gh` for PATH."""

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            found = None
            if self.command not in github.refuse:
                found = github.answer(self.command, self.path.removeprefix("/"), body)
            refused = self.command in github.refuse
            self.send_response(403 if refused else 404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        do_GET = do_POST = do_PATCH = _any  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gh = folder / "gh"
        address = f"http://127.0.0.1:{server.server_port}"
        gh.write_text(GH.format(python=sys.executable, address=address))
        gh.chmod(0o755)
        yield folder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
