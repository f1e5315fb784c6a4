"""`check --rename MAP.toml`: validated before any forward."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from truestep.cli.check import _rename, command
from truestep.errors import FileFormatError


def test_a_map_is_read_at_depth_modules(tmp_path: Path) -> None:
    path = tmp_path / "map.toml"
    path.write_text('[rename]\n"layers.*" = "blocks.*"\n')
    assert _rename(path, "modules") == {"layers.*": "blocks.*"}
    assert _rename(None, "steps") is None


def test_a_map_that_nothing_would_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--rename needs --depth modules"):
        _rename(tmp_path / "map.toml", "steps")


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="the rename map cannot be read"):
        _rename(tmp_path / "missing.toml", "modules")
    path = tmp_path / "map.toml"
    path.write_text("[other]\n")
    with pytest.raises(FileFormatError, match="holds no rename map"):
        _rename(path, "modules")


def test_help_says_what_the_map_is() -> None:
    found = CliRunner().invoke(command, ["--help"])
    assert "--rename MAP.toml" in found.output
