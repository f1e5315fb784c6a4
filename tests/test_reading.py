"""Text, JSON and TOML of any content: parsed, or one of our errors."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.errors import CaseError, FileFormatError
from truestep.reading import parse_json, parse_toml, read


def test_what_is_there_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text('{"a": [1, 2.5, "ü", null, 18446744073709551615]}', "utf-8")
    data = read(path, "it cannot be read", parse_json)
    assert data == {"a": [1, 2.5, "ü", None, 2**64 - 1]}
    assert read(path, "it cannot be read", bytes.decode).startswith('{"a"')
    path.write_text('a.b = 1979-05-27\nc = "' + "." * 300 + '"', "utf-8")
    assert read(path, "it cannot be read", parse_toml)["c"] == "." * 300


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 3000, "nested more than 100 deep"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100 deep"),
        (b"9" * 400, "an integer of 1329 bits; 64 can be used"),
        (b"9" * 5000, "Exceeds the limit"),
        (b'"\\ud800"', "half a character"),
        (b'{"\\udfff": 1}', "half a character"),
        (b"\xff\xfe", "it is not UTF-8: byte 0"),
        (b"", "Expecting value"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
    ],
)
def test_json_that_cannot_be_used(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        read(path, "it cannot be read", partial(parse_json, unique=True), likely="l", hint="h")
    error = caught.value
    assert said in error.measured
    assert (error.what, error.where, error.likely, error.hint) == (
        "it cannot be read",
        str(path),
        "l",
        "h",
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a = " + b"[" * 3000, "nested more than 100 deep"),
        (b"a = " + b"{b = " * 900 + b"1" + b"}" * 900, "nested more than 100 deep"),
        (b"a." * 3000 + b"a = 1", "a key is nested more than 100 deep"),
        (b"[" + b"a . " * 3000 + b"a]", "a key is nested more than 100 deep"),
        (b"a = 0x" + b"f" * 5000, "an integer of 20000 bits"),
        (b"\xff", "it is not UTF-8"),
        (b"a = \n", "Invalid value"),
        (b"#" * (4 * 2**20 + 1), "at most 4,194,304 are read"),
    ],
)
def test_toml_that_cannot_be_used(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(data)
    with pytest.raises(CaseError) as caught:
        read(path, "it cannot be read", parse_toml, raises=CaseError)
    assert said in caught.value.measured


def test_a_key_of_many_parts_takes_no_memory_of_its_square() -> None:
    import tracemalloc

    data = b"a." * 3000 + b"a = 1"  # tomllib alone takes 36 MB for these 6 kB
    tracemalloc.start()
    with pytest.raises(ValueError, match="nested"):
        parse_toml(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize("name", ["none", "a" * 300, "a\0b", "."])
def test_paths_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="it cannot be read") as caught:
        read(str(tmp_path / name) if name != "." else tmp_path, "it cannot be read", parse_json)
    assert caught.value.measured


def test_sizes_are_looked_at_first(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="at most 67,108,864 are read"):
        read(path, "it cannot be read", parse_json)


def test_a_pipe_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def feed(data: bytes) -> None:
        thread = threading.Thread(target=lambda: path.write_bytes(data), daemon=True)
        thread.start()

    feed(b"[1]")
    assert read(path, "it cannot be read", parse_json) == [1]


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    for parse in (parse_json, parse_toml):
        try:
            parse(data)
        except ValueError:
            continue


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=20,
    )
)
def test_what_is_ordinary_is_not_refused(value: Any) -> None:
    import json

    assert repr(parse_json(json.dumps(value))) == repr(value)
