"""A server of pictures and videos with a tiny real pipeline behind it, and faults by the address.

python server.py     prints its port; an address is http://127.0.0.1:PORT/NAME=VALUE,NAME=VALUE

`class` is the pipeline, `model` the seed of its weights, `dtype` theirs, `ignore` a parameter,
`jitter` what is added to the noise of each request, `threads` and `slices` change the order of
sums, `broken` how it answers.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from truestep.testing import tiny

DEFAULTS = {
    "seed": 1234,
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "negative_prompt": None,
    "prompt": "a house",
    "size": "48x48",
}
"""What it makes of a request that says nothing, or that it does not hear."""

NAMES = {
    "seed": "seed",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "prompt": "prompt",
    "size": "size",
}


USUAL = "StableDiffusionPipeline"


@lru_cache(maxsize=64)
def pipeline(name: str, model: int, dtype: str, slices: bool) -> Any:
    pipe = tiny.pipeline(name, seed=model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if slices:
        pipe.unet.set_attn_processor(AttnProcessor())  # no fused kernel
    return pipe


def made(setup: dict[str, str], body: dict[str, Any], frames: int = 1) -> list[Any]:
    """Frames `h w 3`, uint8."""
    asked = {**DEFAULTS, **{key: value for key, value in body.items() if key in DEFAULTS}}
    for name in setup.get("ignore", "").split("+"):
        if name in NAMES:
            asked[NAMES[name]] = DEFAULTS[NAMES[name]]
    width, height = map(int, str(asked["size"]).split("x"))
    name, dtype = setup.get("class", USUAL), setup.get("dtype", "float32")
    pipe = pipeline(name, int(setup.get("model", "0")), dtype, "slices" in setup)
    torch.set_num_threads(int(setup.get("threads", "1")))
    seed = int(asked["seed"]) if setup.get("ignore") != "random" else int.from_bytes(os.urandom(3))
    more: dict[str, Any] = {"num_frames": frames} if "WanPipeline" in name else {}
    with jittered(pipe, float(setup.get("jitter", "0"))):
        result = pipe(
            [str(asked["prompt"])] * (1 if more else frames),
            negative_prompt=[str(asked["negative_prompt"] or "")] * (1 if more else frames),
            num_inference_steps=int(asked["num_inference_steps"]),
            guidance_scale=float(asked["guidance_scale"]),
            generator=torch.Generator().manual_seed(seed),
            height=height,
            width=width,
            output_type="np",
            **more,
        )
    images = result.frames[0] if more else result.images
    return [(np.asarray(image) * 255).round().astype(np.uint8) for image in images]


@contextmanager
def jittered(pipe: Any, size: float) -> Iterator[None]:
    """Other noise at every request, as much as kernels that sum in another order might grow to."""
    own = pipe.prepare_latents

    def prepare(*given: Any, **named: Any) -> Any:
        made = own(*given, **named)
        latents = made[0] if isinstance(made, tuple) else made
        random = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
        latents += (size * torch.randn(latents.shape, generator=random)).to(latents.dtype)
        return made

    if size:
        pipe.prepare_latents = prepare
    try:
        yield
    finally:
        if size:
            del pipe.prepare_latents


def png(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def mp4(frames: list[Any]) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


VIDEOS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *given: object) -> None:
        pass

    def answer(self, code: int, content: Any, kind: str = "application/json", **more: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def broken(self, setup: dict[str, str]) -> bool:
        """Whether it has answered in another way than it should."""
        how, given = setup.get("broken"), self.headers.get("Authorization", "")
        if how == "key" and given != "Bearer s3cret":
            self.answer(401, {"error": f"no such key: {given}"})
        elif how == "echo":
            self.answer(400, {"error": f"bad request with {given}"})
        elif how == "html":
            self.answer(200, b"<!DOCTYPE html><h1>Welcome</h1>", "text/html")
        elif how == "error":
            self.answer(500, {"error": "CUDA out of memory\x1b[31m"})
        elif how == "elsewhere":
            self.answer(307, b"", Location="http://127.0.0.1:9/v1/images/generations")
        elif how == "large":
            self.answer(200, {"data": [{"b64_json": "A" * 2_000_000}]})
        elif how == "pixels":
            image = io.BytesIO()
            Image.new("1", (20_000, 20_000)).save(image, "PNG")
            self.answer(200, picture(image.getvalue()))
        elif how in TEXTS:
            self.answer(200, TEXTS[how])
        elif how == "slow":
            time.sleep(5)
            self.answer(200, {})
        elif how == "trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif how == "hangs up":
            self.connection.close()
        else:
            return False
        return True

    def do_POST(self) -> None:
        setup, place = parts(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.broken(setup):
            return
        if place == "/v1/images/generations":
            body = json.loads(data)
            if setup.get("refuse") in body:
                self.answer(422, {"error": f"no field {setup['refuse']}"})
                return
            self.answer(200, picture(png(made(setup, body)[0])))
        elif place == "/v1/videos":
            name = f"video_{len(VIDEOS)}"
            VIDEOS[name] = (setup, form(data))
            self.answer(200, {"id": name, "status": setup.get("status", "queued")})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_GET(self) -> None:
        _, place = parts(self.path)
        name = place.removeprefix("/v1/videos/").removesuffix("/content")
        if name not in VIDEOS:
            self.answer(404, {"detail": "Not Found"})
        elif place.endswith("/content"):
            setup, body = VIDEOS[name]
            self.answer(200, mp4(made(setup, body, int(body["num_frames"]))), "video/mp4")
        else:
            self.answer(200, {"id": name, "status": "completed"})


def picture(data: bytes) -> dict[str, Any]:
    return {"created": 0, "data": [{"b64_json": base64.b64encode(data).decode()}]}


TEXTS: dict[str, Any] = {
    "empty": {"data": []},
    "url": {"data": [{"url": "http://127.0.0.1:9/a.png"}]},
    "list": [1, 2],
    "not base64": {"data": [{"b64_json": "***"}]},
    "no picture": {"data": [{"b64_json": base64.b64encode(b"GIF89a").decode()}]},
    "no json": b"{",
}


def form(data: bytes) -> dict[str, Any]:
    """Fields of a multipart form without files."""
    found = re.findall(rb'name="([^"]+)"\r\n(?:[^\r]+\r\n)*\r\n(.*?)\r\n--', data, re.DOTALL)
    return {name.decode(): value.decode() for name, value in found}


def parts(path: str) -> tuple[dict[str, str], str]:
    """The set-up that an address names, and what is asked for."""
    head, slash, rest = path[1:].partition("/")
    words = [word.partition("=") for word in unquote(head).split(",") if "=" in word]
    return {key: value for key, _, value in words}, slash + rest


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
