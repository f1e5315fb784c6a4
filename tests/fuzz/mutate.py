"""Damage files: bytes, the numbers and texts in them, JSON and TOML by structure, zip entries.

Everything is drawn from the generator that is given, so a mutant can be made again from its number.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from typing import Any

INTEGERS: tuple[int, ...] = (0, 1, -1, 2, 7, 63, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32)
INTEGERS += (2**53, 2**62, 2**63, 2**64 - 1, -(2**63), 10**12, 10**20, 10**400)
FLOATS = (0.0, -0.0, 1e-308, 1e308, float("nan"), float("inf"), float("-inf"), 0.5, 1e-30)
TEXTS = (
    "",
    "nan",
    "inf",
    "\ud800",
    "\udfff\ud800",
    "\0",
    "a\nb",
    "\x1b[31m",
    "\u202e",
    "../../x",
    "/etc/passwd",
    "x" * 300,
    "x" * 5000,
    "audio/",
    "audio/audio/",
    "stats/",
    "sketch/x",
    "__metadata__",
    "step/0000/guided",
    "step/" + "9" * 900 + "/latent",
    "step/\u0663/latent",
    "module/",
    "module/a",
    "module/a/9/b/out.0",
    "module//0//",
    "latent/final",
    "signature",
    "schedule/sigmas",
    "float32/",
    "samples/",
    "full",
    "sketch",
    "stats",
    "F64",
    "F8_E4M3",
    "BOOL",
    "bfloat16",
    "9" * 400,
    "1e999",
    "{}",
    "%s",
    "1970-01-01",
)


def deep(generator: random.Random) -> Any:
    """A nest of lists or tables, deeper than code that recurses can go."""
    value: Any = 1
    for _ in range(generator.choice((20, 90, 101, 500))):
        value = [value] if generator.random() < 0.5 else {"a": value}
    return value


def value(generator: random.Random) -> Any:
    """A value that nobody expects."""
    kind = generator.randrange(12)
    if kind < 3:
        return generator.choice(INTEGERS)
    if kind < 5:
        return generator.choice(FLOATS)
    if kind < 8:
        return generator.choice(TEXTS)
    return (
        generator.choice((None, True, False, [], {}, [[]], [1, [2]], {"": {}}))
        if (kind < 11)
        else deep(generator)
    )


def plain(data: Any, generator: random.Random) -> Any:
    """JSON-like data, changed in place in one to three places."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return value(generator)
        holder, key = generator.choice(places)
        _change(holder, key, generator)
    return data


def _places(data: Any) -> Any:
    stack = [data]
    while stack:
        holder = stack.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, item in list(items):
            yield holder, key
            if isinstance(item, dict | list) and len(item) < 1000:
                stack.append(item)


def _change(holder: Any, key: Any, generator: random.Random) -> None:
    kind = generator.randrange(10)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[generator.choice(TEXTS)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[generator.choice(TEXTS)] = value(generator)
    elif kind == 2:
        holder.insert(key, old)
    elif kind == 3 and isinstance(old, list) and old:
        generator.shuffle(old)
    elif kind == 4 and isinstance(old, int | float):
        holder[key] = old + generator.choice((1, -1, 8, 0.5)) if abs(old) < 1e300 else 0
    elif kind == 5 and isinstance(old, str) and old:
        place = generator.randrange(len(old))
        holder[key] = old[:place] + generator.choice(TEXTS)[:5] + old[place + 1 :]
    elif kind == 6:
        other = generator.choice(list(holder.values() if isinstance(holder, dict) else holder))
        holder[key] = other
    else:
        holder[key] = value(generator)


def json_text(data: Any) -> bytes:
    """JSON, with what Python makes of numbers and half characters that JSON has no place for."""
    return json.dumps(data).encode()


def raw(data: bytes, generator: random.Random) -> bytes:
    """One to four changes to bytes."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4))):
        generator.choice(_BYTES)(changed, generator)
    return bytes(changed)


def _place(data: bytearray, generator: random.Random) -> int:
    """Anywhere, or near the start, where headers are."""
    limit = len(data) if generator.random() < 0.5 else min(len(data), 128)
    return generator.randrange(limit) if limit else 0


def _flip(data: bytearray, generator: random.Random) -> None:
    if data:
        data[_place(data, generator)] ^= 1 << generator.randrange(8)


def _set(data: bytearray, generator: random.Random) -> None:
    if data:
        data[_place(data, generator)] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x22, 0x7B))


def _number(data: bytearray, generator: random.Random) -> None:
    form = generator.choice(("<B", "<H", "<I", "<Q", ">H", ">I", ">Q"))
    size = struct.calcsize(form)
    number = abs(generator.choice(INTEGERS)) % 256**size
    place = _place(data, generator)
    data[place : place + size] = struct.pack(form, number)


def _cut(data: bytearray, generator: random.Random) -> None:
    del data[_place(data, generator) :]


def _remove(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    del data[place : place + generator.choice((1, 2, 8, 64))]


def _insert(data: bytearray, generator: random.Random) -> None:
    extra = generator.choice(
        (b"\0", b"[" * 3000, b"{", b'"', b"\xff\xfe", b"9" * 400, b"\n", b"A" * 9)
    )
    place = _place(data, generator)
    data[place:place] = extra


def _repeat(data: bytearray, generator: random.Random) -> None:
    place = _place(data, generator)
    part = data[place : place + generator.choice((1, 4, 16, 256))]
    other = _place(data, generator)
    data[other:other] = part


def _append(data: bytearray, generator: random.Random) -> None:
    data += generator.randbytes(generator.choice((1, 8, 100)))


_BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _set,
    _set,
    _number,
    _number,
    _cut,
    _remove,
    _insert,
    _repeat,
    _append,
)

_TOKEN = re.compile(rb'"[^"\n]*"|[A-Za-z_][\w.-]*|-?\d[\d.eE+-]*|[\[\]{}=,:]')


def tokens(data: bytes, generator: random.Random) -> bytes:
    """Text with one to three of its words, numbers or brackets replaced."""
    for _ in range(generator.choice((1, 1, 2, 3))):
        found = list(_TOKEN.finditer(data))
        if not found:
            return data
        match = generator.choice(found)
        new = generator.choice(
            (
                b"",
                match.group() * 2,
                generator.choice(found).group(),
                json.dumps(value(generator)).encode(),
                str(generator.choice(FLOATS)).encode(),
                b"[" * 3000,
                b"a." * 3000 + b"a",
                b"{a=" * 900 + b"1" + b"}" * 900,
                b"9" * 400,
                b"0x" + b"f" * 5000,
                b"1979-05-27",
                b'"\\ud800"',
                b'"\\u0000"',
                b"\xff",
            )
        )
        data = data[: match.start()] + new + data[match.end() :]
    return data


def archive(
    data: bytes, generator: random.Random, inner: Callable[[bytes, random.Random], bytes]
) -> bytes:
    """A zip archive written anew with an entry changed, or with a header field changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        entries = [(info.filename, source.read(info)) for info in source.infolist()]
    kind = generator.randrange(6)
    at = generator.randrange(len(entries))
    name, content = entries[at]
    if kind < 3:
        entries[at] = name, inner(content, generator)
    elif kind == 3:
        entries[at] = generator.choice(TEXTS).encode("utf-8", "replace").decode() or "x", content
    elif kind == 4:
        del entries[at]
    method = generator.choice((0, 0, 0, 8, 12, 14))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, content in entries:
            entry = zipfile.ZipInfo(name.replace("\0", "") or "x")  # of no time: always the same
            target.writestr(entry, content, method)
    made = bytearray(buffer.getvalue())
    if kind == 5:
        _header_field(made, generator)
    return bytes(made)


def _header_field(data: bytearray, generator: random.Random) -> None:
    """Change a field of a local or central header, or of the end record, in place."""
    sign, fields = generator.choice(
        (
            (b"PK\1\2", ((8, "<H"), (10, "<H"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I"))),
            (b"PK\3\4", ((6, "<H"), (8, "<H"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"))),
            (b"PK\5\6", ((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H"))),
        )
    )
    found = [m.start() for m in re.finditer(re.escape(sign), bytes(data))]
    if not found:
        return
    offset, form = generator.choice(fields)
    small = (0, 1, 8, 9, 12, 14, 0x41, 0xFFFF, 10**6, 2**31, 2**32 - 1, generator.randrange(5000))
    number = generator.choice(small) % 256 ** struct.calcsize(form)
    struct.pack_into(form, data, generator.choice(found) + offset, number)


def safetensors(
    data: bytes, generator: random.Random, *, digest: Callable[[str], str] | None = None
) -> bytes:
    """A safetensors file with its header, its manifest or its bytes changed.

    Args:
        data: The file.
        generator: Decides.
        digest: Of a manifest, to make its change look honest.
    """
    kind = generator.randrange(10)
    if kind < 3:
        return raw(data, generator)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    manifest = json.loads(header.get("__metadata__", {}).get("truestep", "null"))
    if kind < 8 and manifest and digest:
        text = json.dumps(plain(manifest, generator), ensure_ascii=generator.random() < 0.9)
        header["__metadata__"]["truestep"] = text
        with contextlib.suppress(UnicodeEncodeError):  # half a character
            header["__metadata__"]["truestep_digest"] = digest(text)
    elif kind < 9:
        header = plain(header, generator)
    else:
        body = raw(body, generator)
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + body


def columns(
    data: bytes,
    generator: random.Random,
    *,
    digest: Callable[[bytes], str],
    manifest_digest: Callable[[str], str],
) -> bytes:
    """A packed recording with one column of its table changed, and all digests honest.

    Args:
        data: The file.
        generator: Decides.
        digest, manifest_digest: Of a column, and of the manifest.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    manifest = json.loads(metadata["truestep"])
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    parts = {name: body[slice(*header[name]["data_offsets"])] for name in order}
    chosen = generator.choice([name for name in order if name.startswith("table.")])
    words = chosen == "table.words" and generator.random() < 0.7
    content = parts[chosen]
    changed = json_text(plain(json.loads(content), generator)) if words else raw(content, generator)
    size = len(content) // max(header[chosen]["shape"][0], 1) or 1
    parts[chosen] = changed[: len(changed) // size * size]
    position = 0
    for name in order:
        end = position + len(parts[name])
        header[name] |= {"data_offsets": [position, end]}
        position = end
    header[chosen]["shape"] = [len(parts[chosen]) // size]
    manifest["columns"][chosen.removeprefix("table.")] = digest(parts[chosen])
    metadata["truestep"] = json.dumps(manifest)
    metadata["truestep_digest"] = manifest_digest(metadata["truestep"])
    made = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(made)) + made + b"".join(parts.values())


_SCHEMA = (
    "CREATE VIEW v AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i FROM n",
    "CREATE TRIGGER t AFTER INSERT ON run BEGIN DELETE FROM run; END",
    "DROP TABLE run",
    "ALTER TABLE batch RENAME TO old",
    "CREATE TABLE more (x)",
    "PRAGMA user_version = 2147483647",
    "PRAGMA application_id = 1",
)


def sqlite(data: bytes, generator: random.Random) -> bytes:
    """A SQLite file with one to three of its values, or now and then its tables, changed."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(data)
        db.execute("PRAGMA writable_schema = ON")
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        for _ in range(generator.choice((1, 1, 2, 3))):
            if generator.random() < 0.1:
                db.execute(generator.choice(_SCHEMA))
                break
            table = generator.choice(tables)
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            with contextlib.suppress(sqlite3.Error):  # a key twice
                db.execute(
                    f"UPDATE {table} SET {generator.choice(columns)} = ? WHERE rowid % 2 = ?",
                    (_cell(generator), generator.randrange(2)),
                )
        db.commit()
        return db.serialize()


def _cell(generator: random.Random) -> Any:
    found = value(generator)
    if generator.random() < 0.5:
        text = json.dumps({"device.name": found, "0": found} if generator.random() < 0.5 else found)
        return generator.choice((text, text.encode(), "[" * 3000, b"\xff\xfe", '{"a":' * 3000))
    if isinstance(found, int) and found.bit_length() > 63:
        return float(2**70)
    return (
        found if isinstance(found, int | float | None) else generator.choice((b"\xff", "9" * 400))
    )
