"""Models are loaded one at a time, and what cannot be imported is named."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from truestep import check, record
from truestep.case import Case
from truestep.errors import ModelLoadError
from truestep.runtime import loading
from truestep.turns import taking_turns
from truestep.verdict import Verdict


def test_two_threads_record_and_check_at_once(
    tiny_wan: dict[str, Path], tiny_case: dict[str, object], tmp_path: Path
) -> None:
    """It was "folder damaged" in both, and in every later load of the process."""
    cases = [
        Case.model_validate({**tiny_case, "model": str(tiny_wan["wan21"]), "steps": 2, **own})
        for own in ({"dtype": "bfloat16"}, {"dtype": "float32", "seed": 1})
    ]
    outcomes: dict[int, Verdict] = {}

    def both(number: int) -> None:
        path = tmp_path / f"{number}.safetensors"
        record(cases[number], path=path, floor="none")
        outcomes[number] = check(cases[number], path).verdict

    threads = [threading.Thread(target=both, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == dict.fromkeys(range(2), Verdict.IDENTICAL)
    assert torch.get_default_dtype() is torch.float32
    assert record(cases[0], floor="none").manifest.case_id == cases[0].id


def test_the_default_dtype_is_restored_whatever_happens() -> None:
    def stopped() -> None:
        torch.set_default_dtype(torch.bfloat16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taking_turns()(stopped)()
    assert torch.get_default_dtype() is torch.float32
    with taking_turns(), taking_turns():  # the same thread may go in again
        pass


def test_an_import_error_is_found_beneath_what_libraries_raise_over_it() -> None:
    absent = ModuleNotFoundError("No module named 'zzz'", name="zzz")
    over = RuntimeError("Failed to import transformers.models.umt5")
    over.__cause__ = absent
    assert loading.import_error(over) is absent
    assert loading.import_error(ValueError("damaged")) is None


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.models.umt5.modeling_umt5":
            raise ModuleNotFoundError("No module named 'zzz'", name="zzz")
sys.meta_path.insert(0, Blocked())
from truestep.cli import run_here
sys.argv = ["truestep", *sys.argv[1:]]
sys.exit(run_here())
"""


def blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, where a package that the text encoder needs is not installed."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True
    )


def test_a_part_that_cannot_be_imported_is_named(tiny_wan: dict[str, Path], tmp_path: Path) -> None:
    model = str(tiny_wan["wan21"])
    done = blocked("record", model, "--prompt", "p", "--output", str(tmp_path / "r.safetensors"))
    assert done.returncode == 2
    assert "a part of the model cannot be imported" in done.stderr
    assert "ModuleNotFoundError: No module named 'zzz'" in done.stderr
    assert "damaged" not in done.stderr
    assert f"hint: truestep doctor {model}" in done.stderr


def test_doctor_imports_what_a_model_needs(tiny_wan: dict[str, Path]) -> None:
    model = str(tiny_wan["wan21"])
    done = blocked("doctor", model)
    assert done.returncode == 2
    assert (
        "PROBLEM text_encoder: transformers.UMT5EncoderModel cannot be imported: "
        "ModuleNotFoundError: No module named 'zzz': pip install zzz"
        in " ".join(done.stdout.split())
    )
    whole = subprocess.run(
        [sys.executable, "-m", "truestep", "doctor", model], capture_output=True, text=True
    )
    assert whole.stdout.startswith("nothing is missing\n")


def test_a_damaged_part_is_still_called_damaged(tiny_wan: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_wan["wan21"], folder)
    for weights in (folder / "vae").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="could not be loaded") as failed:
        loading.load(Case(model=str(folder), prompt="p"))
    assert "damaged" in failed.value.likely
