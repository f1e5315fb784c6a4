"""A function that is called when a module has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from truestep.replay.site.waiting import when_loaded


def test_it_waits_for_the_import_and_not_for_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "awaited_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls: list[int] = []
    finders = list(sys.meta_path)
    when_loaded("awaited_module", lambda: calls.append(sys.modules["awaited_module"].value))
    when_loaded("awaited_module", lambda: calls.append(2))
    assert importlib.util.find_spec("awaited_module") is not None  # a look
    assert calls == []
    try:
        importlib.import_module("awaited_module")
        assert sorted(calls) == [1, 2]
        assert list(sys.meta_path) == finders
        when_loaded("awaited_module", lambda: calls.append(3))
        assert calls[-1] == 3
    finally:
        sys.modules.pop("awaited_module", None)
