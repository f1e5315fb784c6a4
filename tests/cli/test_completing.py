"""Completion of verbs, cases and settings, by click's own completion; nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from tests.commands import write_cases
from truestep.cli.app import app


@pytest.fixture
def folder(tiny_wan: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A case file, a stored reference, and a model folder."""
    write_cases(tmp_path, tiny_wan["wan21"], "cat", "dog")
    place = tmp_path / "truestep-references" / "default" / "cpu" / "math"
    place.mkdir(parents=True)
    (place / "flux-a-cat-0123.safetensors").touch()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(*words: str) -> list[str]:
    """What the shell is offered for the last word."""
    complete = ShellComplete(app, {}, "truestep", "_TRUESTEP_COMPLETE")
    return [item.value for item in complete.get_completions(list(words[:-1]), words[-1])]


def test_verbs_are_completed() -> None:
    assert completed("che") == ["check"]
    assert completed("engine", "re") == ["recover"]
    assert completed("zzz") == []


@pytest.mark.parametrize("verb", ["check", "record", "run"])
def test_cases_are_completed(folder: Path, verb: str) -> None:
    assert completed(verb, "ca") == ["cat"]
    assert completed(verb, "") == ["cat", "dog", "flux-a-cat-0123", "flux"]
    assert completed(verb, "none") == []


def test_settings_are_completed(folder: Path) -> None:
    assert completed("check", "cat", "--set", "guidance_r") == ["guidance_rescale="]
    assert completed("check", "cat", "--set", "text_c") == ["text_cache="]
    assert "compile=max-autotune" in completed("ab", "run", "cat", "--set", "compile=")
    assert completed("check", "cat", "--set", "true_cfg") == []


def test_arguments_of_a_pipelines_call_are_completed(folder: Path) -> None:
    assert completed("check", "flux", "--set", "true_cfg") == ["true_cfg_scale="]
    assert completed("check", "flux", "--set", "lora") == ["lora="]


def test_a_damaged_case_file_completes_nothing(folder: Path) -> None:
    Path("truestep.toml").write_text("[case")
    assert completed("check", "ca") == []


def test_nothing_heavy_is_imported(folder: Path) -> None:
    script = (
        "import sys; from click.shell_completion import ShellComplete; "
        "from truestep.cli.app import app; "
        "c = ShellComplete(app, {}, 'truestep', 'X'); "
        "assert c.get_completions(['check', 'flux', '--set'], 'true_cfg'); "
        "assert c.get_completions(['check'], 'c'); "
        "assert not {'torch', 'diffusers', 'numpy'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
