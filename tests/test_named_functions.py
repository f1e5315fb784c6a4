"""Functions of the user, named as FILE.py:FUNCTION."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from truestep.errors import ProcessEndedError, UsageError
from truestep.functions import function_of, parts_of

SOURCE = """
from beside import VALUE

def fuse(pipe):
    return VALUE
"""


def test_a_function_may_import_what_is_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 3")
    (tmp_path / "port.py").write_text(SOURCE)
    before = list(sys.path)
    assert function_of(tmp_path / "port.py", "fuse", "--apply")(None) == 3
    assert sys.path == before
    sys.modules.pop("beside")


@pytest.mark.parametrize("spec", ["port.py", "port.py:", ":fuse", ""])
def test_what_names_no_function_is_refused(spec: str) -> None:
    assert parts_of("C:/a/port.py:fuse", "--apply") == ("C:/a/port.py", "fuse")
    with pytest.raises(UsageError, match=r"--apply needs FILE.py:FUNCTION, got"):
        parts_of(spec, "--apply")


def test_files_that_cannot_be_run_are_named(tmp_path: Path) -> None:
    path = tmp_path / "port.py"
    with pytest.raises(UsageError, match="the file of prepare cannot be read"):
        function_of(path, "fuse", "prepare")
    path.write_text("def fuse(pipe): pass")
    with pytest.raises(UsageError, match="no function 'fused'") as caught:
        function_of(path, "fused", "prepare")
    assert caught.value.likely == "did you mean 'fuse'?"
    path.write_text("1 / 0")
    with pytest.raises(UsageError, match="the file of prepare raised ZeroDivisionError"):
        function_of(path, "fuse", "prepare")
    path.write_text("raise SystemExit(3)")
    with pytest.raises(ProcessEndedError, match=r"ended the process \(SystemExit: 3\)"):
        function_of(path, "fuse", "prepare")
