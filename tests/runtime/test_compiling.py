"""`compile` as a setting: parsed, outside the case's id, handed to torch, and judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import Captured, runner, write_cases
from truestep.call_case import CallCase
from truestep.case import Case
from truestep.errors import CaseError, UsageError
from truestep.pairing.naming import runs_compiled
from truestep.runtime import compiling
from truestep.runtime.loading import load


class Block(torch.nn.Module):
    """A module that keeps what it is compiled with."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, str]] = []

    def compile(self, **options: str) -> None:  # type: ignore[override]
        self.given.append(options)


class Pipe:
    def __init__(self, **parts: object) -> None:
        vars(self).update(parts)


def test_it_is_no_part_of_the_id_and_its_modes_are_checked() -> None:
    for case in (Case(model="m", prompt="p"), CallCase(model="m", call={"prompt": "p"})):
        changed = case.replace(compile="max-autotune")
        assert changed.id == case.id
        assert case.replace(compile="true") == case.replace(compile="on")
        with pytest.raises(CaseError, match="compile"):
            case.replace(compile="fast")


def test_the_denoisers_are_compiled_in_the_mode_that_is_asked_for() -> None:
    pipe = Pipe(transformer=Block(), unet=Block(), vae=Block())
    compiling.compile_pipeline(pipe, "off")
    assert pipe.transformer.given == []  # type: ignore[attr-defined]
    compiling.compile_pipeline(pipe, "on")
    compiling.compile_pipeline(pipe, "reduce-overhead")
    assert pipe.transformer.given == [{}, {"mode": "reduce-overhead"}]  # type: ignore[attr-defined]
    assert pipe.vae.given == []  # type: ignore[attr-defined]


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(UsageError, match="no denoiser"):
        compiling.compile_pipeline(Pipe(vae=Block()), "on")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler") as caught:
        compiling.compile_pipeline(Pipe(transformer=Block()), "on")
    assert "g++" in str(caught.value)


@pytest.mark.slow
def test_a_compiled_candidate_is_judged_and_a_fault_in_it_is_seen(
    tiny_wan: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    write_cases(tmp_path, tiny_wan["wan21"], "a")
    (tmp_path / "change.py").write_text(
        "def dropped(pipe):\n    pipe.transformer.proj_out.bias.data += 0.1\n"
    )
    monkeypatch.chdir(tmp_path)
    run = runner(monkeypatch, capsys)
    assert run("record", "a")[0] == 0
    code, out, err = run("check", "a", "--set", "compile=on")
    assert code == 0, out + err
    assert run("check", "a", "--set", "compile=on", "--apply", "change.py:dropped")[0] == 1
    pipe = load(Case(model=str(tiny_wan["wan21"]), prompt="p").replace(compile="on"))
    assert runs_compiled(pipe.transformer)
