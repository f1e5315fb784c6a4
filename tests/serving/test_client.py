"""Asking a real server on loopback, and servers that are broken."""

from __future__ import annotations

import ast
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.conftest import Address
from truestep.errors import EndpointError, UsageError
from truestep.serving import client as clients
from truestep.serving.client import Endpoint, address, connected
from truestep.serving.plan import Ask

ASK = Ask("a fox", steps=2, width=32, height=48)


def ask(url: str, **given: Any) -> torch.Tensor:
    with connected(Endpoint(url, **given)) as asker:
        return asker.ask(ASK)


def test_a_picture_has_the_size_that_was_asked_for(server: Address) -> None:
    first, second = ask(server()), ask(server())
    assert first.shape == (1, 48, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)


def test_a_video_is_asked_after_and_decoded(
    server: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "EVERY_S", 0.01)
    with connected(Endpoint(server(), "video")) as asker:
        frames = asker.ask(Ask("a fox", steps=2, width=32, height=48, frames=3))
    assert frames.shape == (3, 48, 32, 3)


def test_what_is_sent_is_what_the_servers_of_the_field_read() -> None:
    body = Endpoint("http://a", model="m").body(ASK)
    assert body == {
        "prompt": "a fox",
        "size": "32x48",
        "seed": 0,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "model": "m",
        "n": 1,
        "response_format": "b64_json",
        "output_format": "png",
    }
    other = Endpoint("http://a", "video", fields={"guidance": "true_cfg_scale"}, more={"fps": 8})
    body = other.body(Ask("a fox", negative="blue", frames=5))
    assert body["true_cfg_scale"] == 5.0
    assert body["negative_prompt"] == "blue"
    assert (body["num_frames"], body["fps"]) == (5, 8)
    assert "guidance_scale" not in body
    assert "response_format" not in body


BROKEN = {
    "html": "answers text/html, not JSON",
    "error": "the server refuses the request",
    "elsewhere": "sends elsewhere",
    "large": "cannot be decoded",
    "pixels": "cannot be decoded",
    "empty": "the answer holds no picture",
    "url": "the answer holds no picture",
    "list": "no JSON object",
    "not base64": "no base64",
    "no picture": "cannot be decoded",
    "no json": "not JSON",
    "hangs up": "cannot be reached",
    "key": "needs a key",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_server_is_told(how: str, server: Address) -> None:
    with pytest.raises(EndpointError, match=BROKEN[how]) as caught:
        ask(server(broken=how.replace(" ", "%20")))
    text = str(caught.value)
    assert "/v1/images/generations" in text
    assert "\x1b" not in text
    assert len(text.splitlines()) <= 25


def test_an_answer_that_is_too_large_is_not_read_to_its_end(
    server: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MOST_BYTES", 10_000)
    with pytest.raises(EndpointError, match="larger than 10,000 bytes"):
        ask(server(broken="large"))


@pytest.mark.parametrize("how", ["slow", "trickle"])
def test_a_slow_server_is_left_in_time(how: str, server: Address) -> None:
    begun = time.monotonic()
    with pytest.raises(EndpointError, match=r"did not answer within 0\.5 s"):
        ask(server(broken=how), timeout_s=0.5)
    assert time.monotonic() - begun < 3


def test_nothing_at_an_address_is_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match="cannot be reached"):
        ask(f"http://127.0.0.1:{port}")


def test_an_api_that_is_not_there_is_told(server: Address) -> None:
    with pytest.raises(EndpointError, match="of videos, say so with --kind"):
        ask(server() + "/nowhere")


def test_a_video_that_is_not_made_is_told(server: Address) -> None:
    with pytest.raises(EndpointError, match="did not make the video"):
        ask(server(status="failed"), kind="video")


@pytest.mark.parametrize("how", ["echo", "key"])
def test_a_key_is_in_no_text(how: str, server: Address) -> None:
    url = server(broken=how)
    with pytest.raises(EndpointError) as caught:
        ask(url, key="s3cr3t-key")
    assert "s3cr3t-key" not in str(caught.value) + repr(caught.value)
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t-key" not in repr(Endpoint(url, key="s3cr3t-key"))
    assert ask(server(broken="key"), key="s3cret").shape == (1, 48, 32, 3)
    with pytest.raises(UsageError, match="no header can have"):
        ask(url, key="a\nb")


@pytest.mark.parametrize(
    ("text", "used"),
    [
        ("http://127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("http://127.0.0.1:30000/", "http://127.0.0.1:30000"),
        ("https://a.example/b/v1/", "https://a.example/b"),
        ("http://[::1]:1/v1", "http://[::1]:1"),
    ],
)
def test_an_address_may_end_as_those_of_openai_do(text: str, used: str) -> None:
    assert address(text) == used


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:1",
        "ftp://a",
        "http://",
        "http://a?b=c",
        "http://a#b",
        "http://a:x",
        "http://a b",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        address(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="would stand in every result") as caught:
        address("http://me:pa55word@a")
    assert "pa55word" not in str(caught.value)


PLACES = {
    "SGLang pictures": (
        "TRUESTEP_SGLANG",
        "sglang/multimodal_gen/runtime/entrypoints/openai/protocol.py",
        "ImageGenerationsRequest",
    ),
    "SGLang videos": (
        "TRUESTEP_SGLANG",
        "sglang/multimodal_gen/runtime/entrypoints/openai/video_api.py",
        "create_video",
    ),
    "vLLM-Omni pictures": (
        "TRUESTEP_VLLM_OMNI",
        "vllm_omni/entrypoints/openai/protocol/images.py",
        "ImageGenerationRequest",
    ),
    "vLLM-Omni videos": (
        "TRUESTEP_VLLM_OMNI",
        "vllm_omni/entrypoints/openai/video/generation/helpers.py",
        "_parse_video_form",
    ),
}
"""Where a server says which fields it reads: a model's, or a function's of a form."""


@pytest.mark.parametrize("place", PLACES)
def test_every_field_is_one_that_the_original_reads(place: str) -> None:
    variable, inside, name = PLACES[place]
    path = Path(os.environ.get(variable, ""), inside)
    if not os.environ.get(variable) or not path.exists():
        pytest.skip(f"{variable} names no folder that holds {inside}")
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    (found,) = (node for node in nodes if getattr(node, "name", "") == name)
    if isinstance(found, ast.ClassDef):
        fields = {ast.unparse(n.target) for n in found.body if isinstance(n, ast.AnnAssign)}
    else:
        assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
        fields = {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}
    kind = "video" if "videos" in place else "image"
    body = Endpoint("http://a", kind, "m").body(Ask("a fox", negative="blue", frames=5))
    assert set(body) <= fields
