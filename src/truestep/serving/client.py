"""Ask an OpenAI-style server for pictures and videos, as SGLang-Diffusion and vLLM-Omni have it.

What it answers is read as hostile: its size and the time it takes are bounded, it is never followed
to another address, and the key is in no text of ours.

Source:
    sglang 0.5.23, entrypoints/openai: protocol.py, image_api.py, video_api.py;
    vllm-omni 0.30.0, entrypoints/openai/protocol/images.py, api_server.py.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from truestep.errors import EndpointError, MissingExtraError, UsageError
from truestep.reading import parse_json
from truestep.serving.decoding import picture, video
from truestep.serving.plan import GUIDANCE, IMAGE, NEGATIVE, STEPS, Ask

if TYPE_CHECKING:
    import httpx2
    import torch

MOST_BYTES = 256 * 2**20
"""Largest answer that is read."""

EVERY_S = 1.0
"""How often a video that is being made is asked after."""

FIELDS: Mapping[str, str] = {
    STEPS: "num_inference_steps",
    GUIDANCE: "guidance_scale",
    NEGATIVE: "negative_prompt",
    "frames": "num_frames",
    "seed": "seed",
}
"""What a parameter is called in a request; a server may have another name for one."""


@dataclass(frozen=True)
class Endpoint:
    """A server.

    Attributes:
        url: Its address, before `/v1`.
        kind: `image` or `video`.
        model: What is asked for as `model`; nothing if empty.
        key: Sent as a bearer token; in no text and no file.
        timeout_s: Longest that one request may take, answer and all.
        fields: Other names of parameters; see `FIELDS`.
        more: Further fields of every request.
    """

    url: str
    kind: str = IMAGE
    model: str = ""
    key: str = field(default="", repr=False)
    timeout_s: float = 600.0
    fields: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is asked."""
        return f"{self.url}/v1/{'images/generations' if self.kind == IMAGE else 'videos'}"

    @property
    def private(self) -> bool:
        """Whether nobody between can read what is sent."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")

    def body(self, ask: Ask) -> dict[str, Any]:
        """A request as its fields."""
        names = {**FIELDS, **self.fields}
        values: dict[str, Any] = {
            "prompt": ask.prompt,
            "size": f"{ask.width}x{ask.height}",
            names["seed"]: ask.seed,
            names[STEPS]: ask.steps,
            names[GUIDANCE]: ask.guidance,
        }
        values |= {names[NEGATIVE]: ask.negative} if ask.negative else {}
        values |= {"model": self.model} if self.model else {}
        if self.kind == IMAGE:
            values |= {"n": 1, "response_format": "b64_json", "output_format": "png"}
        else:
            values[names["frames"]] = ask.frames
        return {**values, **self.more}


def address(text: str) -> str:
    """A server's address as it is used: without `/v1` and a slash at its end.

    Raises:
        UsageError: It is none, or has a password or a query in it.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "an address with a name or password in it is not used: it would stand in every result",
            hint="give the key as a variable of the environment: --key-env NAME",
        )
    clean = not (parts.query or parts.fragment or re.search(r"[\s\x00-\x1f]", text))
    if parts.scheme not in ("http", "https") or not parts.hostname or not clean or port == 0:
        raise UsageError(
            f"{text!r} is not the address of a server", hint="such as http://127.0.0.1:30000"
        )
    return text.rstrip("/").removesuffix("/v1")


_KEY_PART = 6
"""Characters of a key in a row that are taken for it: a server may answer with part of it."""


def _without(key: str, text: str) -> str:
    """A text, unless the key or a part of it stands there."""
    pieces = {key[i : i + _KEY_PART] for i in range(max(len(key) - _KEY_PART, 0) + 1)} - {""}
    return "it repeats the key, and is not shown" if any(p in text for p in pieces) else text


class Asker:
    """Asks one server, one request after the other."""

    def __init__(self, endpoint: Endpoint, client: httpx2.Client) -> None:
        self._endpoint, self._client = endpoint, client

    def ask(self, ask: Ask) -> torch.Tensor:
        """What the server makes of a request: `f h w c`, uint8.

        Raises:
            EndpointError: It cannot be reached, refuses, is too slow, or answers something else.
        """
        until = time.monotonic() + self._endpoint.timeout_s
        body = self._endpoint.body(ask)
        if self._endpoint.kind == IMAGE:
            return self._of_image(self._json("POST", self._endpoint.place, until, json=body))
        form = {
            key: (None, value if isinstance(value, str) else json.dumps(value))
            for key, value in body.items()
        }
        return self._of_video(self._json("POST", self._endpoint.place, until, files=form), until)

    def _of_image(self, answer: Mapping[str, Any]) -> torch.Tensor:
        data = answer.get("data")
        first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
        text = first.get("b64_json")
        if not isinstance(text, str):
            held = ", ".join(map(str, [*answer][:5])) or "nothing"
            self._refuse(
                "the answer holds no picture", f"data[0].b64_json is missing; it has {held}"
            )
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            self._refuse("the answer's picture is no base64")
        return self._decoded(picture, content)

    def _of_video(self, answer: Mapping[str, Any], until: float) -> torch.Tensor:
        name = answer.get("id")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name):
            self._refuse("the answer names no video", f"id is {str(name)[:80]!r}")
        place = f"{self._endpoint.place}/{name}"
        while answer.get("status") != "completed":
            if answer.get("status") not in ("queued", "in_progress", "processing"):
                said = (
                    f"status {str(answer.get('status'))[:40]!r}: {str(answer.get('error'))[:160]}"
                )
                self._refuse("the server did not make the video", said)
            if time.monotonic() + EVERY_S > until:
                self._too_slow()
            time.sleep(EVERY_S)
            answer = self._json("GET", place, until)
        content, _ = self._read("GET", f"{place}/content", until)
        return self._decoded(video, content)

    def _decoded(self, decode: Any, content: bytes) -> torch.Tensor:
        try:
            decoded: torch.Tensor = decode(content)
        except ValueError as error:
            self._refuse("what the server answers cannot be decoded", str(error))
        return decoded

    def _json(self, method: str, place: str, until: float, **more: Any) -> Mapping[str, Any]:
        content, kind = self._read(method, place, until, **more)
        try:
            answer = parse_json(content)
        except ValueError:
            likely = "this is the address of a page, not of the API" if "html" in kind else ""
            self._refuse(f"the server answers {kind or 'something'}, not JSON", likely=likely)
        if not isinstance(answer, dict):
            self._refuse("the server's answer is no JSON object")
        return answer

    def _read(self, method: str, place: str, until: float, **more: Any) -> tuple[bytes, str]:
        """An answer's content and its kind."""
        import httpx2

        parts: list[bytes] = []
        size = 0
        try:
            with self._client.stream(method, place, **more) as answer:
                for part in answer.iter_bytes():
                    size += len(part)
                    parts.append(part)
                    if size > MOST_BYTES:
                        self._refuse(f"the answer is larger than {MOST_BYTES:,} bytes")
                    if time.monotonic() > until:
                        self._too_slow()
        except httpx2.TimeoutException:
            self._too_slow()
        except httpx2.RequestError as error:
            self._refuse("the server cannot be reached", f"{type(error).__name__}: {error}")
        content = b"".join(parts)
        if not answer.is_success:
            self._refused(answer, content)
        return content, answer.headers.get("content-type", "").partition(";")[0]

    def _refused(self, answer: httpx2.Response, content: bytes) -> NoReturn:
        code, text = answer.status_code, content[:400].decode("utf-8", "replace")
        said = f"{code} {answer.reason_phrase}: {' '.join(text.split())[:200]}"
        if code in (401, 403):
            self._refuse(
                "the server needs a key, or another one",
                f"{code} {answer.reason_phrase}",
                hint="give the key as a variable of the environment: --key-env NAME",
            )
        if answer.is_redirect:
            self._refuse("the server sends elsewhere, which is not followed", f"{code}")
        likely = ""
        if code == 404:
            other = "videos" if self._endpoint.kind == IMAGE else "images"
            likely = f"it serves no such API; of {other}, say so with --kind"
        self._refuse("the server refuses the request", said, likely=likely)

    def _too_slow(self) -> NoReturn:
        seconds = f"{self._endpoint.timeout_s:g}"
        self._refuse(
            f"the server did not answer within {seconds} s",
            hint="give it longer: --timeout SECONDS",
        )

    def _refuse(
        self, what: str, measured: str = "", *, likely: str = "", hint: str = ""
    ) -> NoReturn:
        key = self._endpoint.key
        parts = [_without(key, part) for part in (what, measured, likely)]
        raise EndpointError(
            parts[0], where=self._endpoint.place, measured=parts[1], likely=parts[2], hint=hint
        ) from None


@contextmanager
def connected(endpoint: Endpoint) -> Iterator[Asker]:
    """Ask a server.

    Raises:
        MissingExtraError: The HTTP client is not installed.
        UsageError: The key cannot be sent.
    """
    try:
        import httpx2
    except ImportError:
        raise MissingExtraError("httpx2", "serve", "asking a server") from None
    if endpoint.key and not (endpoint.key.isascii() and endpoint.key.isprintable()):
        raise UsageError("the key holds characters that no header can have")
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    with httpx2.Client(headers=headers, timeout=endpoint.timeout_s) as client:
        yield Asker(endpoint, client)
