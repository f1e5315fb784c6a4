"""What a file is, by its first bytes and not by its name. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

ARCHIVE, NUMPY, PICKLE = "a zip archive", "a numpy array (.npy)", "a pickle"
SAFETENSORS, JSON, TEXT = "a safetensors file", "a JSON file", "a text file"
OLD_PT, ONNX, HDF5 = "a .pt file of before torch 1.6", "an ONNX model", "an HDF5 file (Keras)"
ACTIVATIONS = "an activation trace of FastVideo (JSON lines)"
SQLITE, GGUF = "a SQLite database", "a GGUF model (llama.cpp)"
MODEL, REFERENCES = "a diffusers model folder", "a folder of references"
EXPERIMENT = "the folder of an experiment (truestep ab)"
SPOOL = "the spool of a trace that was not closed"

_STARTS = (
    (0, b"PK\x03\x04", ARCHIVE),
    (0, b"PK\x05\x06", ARCHIVE),
    (0, b"\x93NUMPY", NUMPY),
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", OLD_PT),
    (0, b"GGUF", GGUF),
    (0, b"GGML", "a GGML model (llama.cpp)"),
    (0, b"\x89HDF\r\n\x1a\n", HDF5),
    (0, b"SQLite format 3\0", SQLITE),
    (0, b'{"module": "', ACTIVATIONS),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"WAVE", "a WAV sound"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftyp", "an MP4 or MOV video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"OggS", "an Ogg sound or video"),
    (0, b"fLaC", "a FLAC sound"),
    (0, b"ID3", "an MP3 sound"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, b"(\xb5/\xfd", "a zstandard archive"),
    (0, b"7z\xbc\xaf'\x1c", "a 7z archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x7fELF", "a program or library (ELF)"),
    (0, b"PAR1", "a Parquet table"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: git lfs pull gets it"),
    (0, b"<!DOCTYPE html", "an HTML page: a download that failed, perhaps"),
    (0, b"<html", "an HTML page: a download that failed, perhaps"),
)
"""Offset, bytes, what begins so."""

_FOLDERS = (
    ("model_index.json", MODEL),
    ("modular_model_index.json", "a modular diffusers pipeline"),
    ("truestep.lock", REFERENCES),
    ("plan.json", EXPERIMENT),
    ("journal.jsonl", SPOOL),
    ("config.json", "the folder of one model"),
)
"""A file in a folder, and what such a folder is."""

_HEAD = 512

_ONNX_FIELDS = (b"\x12", b"\x1a", b"\x22", b"\x28", b"2", b":", b"B")

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")


def what_is(path: str | Path) -> str:
    """What a file or folder is: "a PNG picture"; empty where nothing tells."""
    path = Path(path)
    try:
        if path.is_dir():
            return next((kind for name, kind in _FOLDERS if (path / name).is_file()), "a folder")
        if not path.is_file():  # a pipe would wait for its writer
            return ""
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return ""
    return kind_of(head, size)


def kind_of(head: bytes, size: int) -> str:
    """What a file is by its first 512 bytes and its size; empty where nothing tells."""
    for offset, start, kind in _STARTS:
        if head.startswith(start, offset):
            return kind
    if len(head) > 10 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return PICKLE
    # A number, the IR's version, then another field of the message.
    if len(head) > 2 and head[:1] == b"\x08" and 0 < head[1] < 32 and head[2:3] in _ONNX_FIELDS:
        return ONNX
    try:
        text = head.decode("utf-8").lstrip()
    except UnicodeDecodeError as error:
        text = "" if error.start < len(head) - 3 else head[: error.start].decode().lstrip()
    if text[:1] in ("{", "["):
        return JSON
    return TEXT if text and not _CONTROL.search(text) else ""
