"""Stubs: installed for an import, recorded, and refused where the real module is there."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from truestep.errors import UsageError
from truestep.parity import stub
from truestep.parity.stubs import take_used


def test_a_stub_lets_an_import_through_and_is_recorded() -> None:
    take_used()
    with stub("zz_flash", "attention", version="2.0") as module:
        assert importlib.import_module("zz_flash") is module
        assert module.version == "2.0"
        with pytest.raises(RuntimeError, match=r"zz_flash\.attention is a stub"):
            module.attention()
    assert "zz_flash" not in sys.modules
    assert take_used() == ("zz_flash",)
    assert take_used() == ()


def test_submodules_and_their_parents() -> None:
    with stub("zz_flash.interface.cuda", "run"):
        from zz_flash.interface.cuda import run  # type: ignore[import-not-found]

        assert callable(run)
    assert not [name for name in sys.modules if name.startswith("zz_flash")]


def test_the_real_module_must_not_be_stubbed() -> None:
    with pytest.raises(UsageError, match="json is installed, so it must not be stubbed"):
        stub("json", "loads").install()
    with pytest.raises(UsageError, match=r"delete stub\('torch\.nn'"):
        stub("torch.nn").install()


def test_operators_stay_registered() -> None:
    for _ in range(2):
        with stub("zz_kernels", ops={"zz_kernels::twice(Tensor x) -> Tensor": lambda x: x * 2}):
            pass
    assert torch.ops.zz_kernels.twice(torch.ones(2)).tolist() == [2.0, 2.0]
    with pytest.raises(UsageError, match="is no operator schema"):
        stub("zz_other", ops={"twice": lambda x: x}).install()
    take_used()


def test_what_is_left_installed_is_removed_with_the_record() -> None:
    stub("zz_left", "f").install()
    assert "zz_left" in sys.modules
    assert "zz_left" in take_used()
    assert "zz_left" not in sys.modules
