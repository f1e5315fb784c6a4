"""A warm process is the process that it stands for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import command
from tests.warm import COLD

linux = pytest.mark.skipif(
    sys.platform != "linux" or COLD in os.environ, reason="processes are warm on Linux alone"
)
Done = subprocess.CompletedProcess[str]

PROGRAM = """
import os, sys
sys.path_importer_cache.clear()
print(sys.argv, os.getcwd(), __name__, __file__, os.path.basename(sys.executable))
print(os.environ.get("MARK"), sys.path[0], sys.stdin.read(), sys.stdout.isatty(), sys.orig_argv)
print("to stderr", file=sys.stderr)
"""

ENDS = {
    "falls through": "",
    "a number": "sys.exit(7)",
    "a number that is too large": "sys.exit(263)",
    "a text": "sys.exit('no such file')",
    "nothing": "sys.exit()",
    "without a word": "os._exit(3)",
    "an error": "def f():\n    raise ValueError('no')\nf()",
    "a hook for errors": "sys.excepthook = lambda *_: print('told')\n1 / 0",
    "a stop": "raise KeyboardInterrupt",
    "a signal": "os.kill(os.getpid(), 15)",
    "at the end": "import atexit\natexit.register(print, 'ended')",
    "threads": "import threading\n"
    "threading.Timer(0.2, print, ('late',)).start()\nprint('first', flush=True)",
    "a closed stream": "sys.stdout.close()",
    "what is in it": "class A: pass\nimport pickle\n"
    "print(pickle.loads(pickle.dumps(A())).__class__, sys.modules['__main__'].A is A)",
    "processes of it": "import multiprocessing as m\n"
    "p = m.get_context('spawn').Process(target=print, args=('far',))\n"
    "if __name__ == '__main__':\n    p.start(); p.join(); print(p.exitcode)",
}


def both(*words: str, cwd: Path, given: str = "", **env: str) -> tuple[Done, Done]:
    """How a process ends as it ever did, and warm."""
    one, other = (
        subprocess.run(
            [sys.executable, *words], cwd=cwd, input=given, capture_output=True, text=True,
            env={**os.environ, **env, **cold},
        )
        for cold in ({COLD: "1"}, {})
    )  # fmt: skip
    return one, other


@linux
@pytest.mark.parametrize("name", ENDS)
def test_a_program_runs_and_ends_as_ever(name: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM + ENDS[name] + "\n")
    cold, warm = both("program.py", "a", "-b", cwd=tmp_path, given="typed", MARK="one")
    assert warm.stdout == cold.stdout
    assert warm.stderr == cold.stderr
    assert warm.returncode == cold.returncode


@linux
@pytest.mark.parametrize(
    "words", [("--version",), ("check", "nothing"), ("chek",), ("doctor", "--recipe")]
)
def test_a_module_runs_as_ever(words: tuple[str, ...], tmp_path: Path) -> None:
    cold, warm = both("-m", "truestep", *words, cwd=tmp_path)
    assert (warm.returncode, warm.stdout, warm.stderr) == (
        cold.returncode, cold.stdout, cold.stderr,
    )  # fmt: skip
    assert warm.stdout + warm.stderr


@linux
def test_a_script_installed_beside_the_interpreter_runs_as_ever(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "torchrun"
    told = [
        subprocess.run(
            [script, "no.py"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **cold},
        )
        for cold in ({COLD: "1"}, {})
    ]  # fmt: skip
    assert told[0].returncode == told[1].returncode != 0
    assert "no.py" in told[1].stderr


@linux
@pytest.mark.parametrize("end", ["sys.exit(3)", "def f():\n    raise ValueError('no')\nf()"])
def test_code_of_a_word_runs_as_ever(end: str, tmp_path: Path) -> None:
    code = "import sys, torch\nprint(sys.argv, sys.path[0], __name__, globals().get('__file__'))\n"
    cold, warm = both("-c", code + end, "a", "-c", cwd=tmp_path)
    assert (warm.returncode, warm.stdout, warm.stderr) == (
        cold.returncode, cold.stdout, cold.stderr,
    )  # fmt: skip


IMPORTED = "import sys\nprint('torch' in sys.modules)\n"


SEEN = "print(type(vars(s)['modules'].get('scipy')).__name__ != 'NoneType')"
"""Whether more is imported than torch, in other words than those that make a program cold."""


def is_warm(folder: Path, *words: str, **env: str) -> bool:
    """Whether a program had its imports before it began."""
    (folder / "program.py").write_text(IMPORTED)
    done = subprocess.run(
        [sys.executable, *(words or ("program.py",))], cwd=folder, capture_output=True, text=True,
        env={**os.environ, **env}, check=True,
    )  # fmt: skip
    return done.stdout.strip() == "True"


@linux
def test_what_is_imported_otherwise_is_cold(tmp_path: Path) -> None:
    assert is_warm(tmp_path)
    assert is_warm(tmp_path, MARK="1")
    assert not is_warm(tmp_path, OMP_NUM_THREADS="3")
    assert not is_warm(tmp_path, TORCH_LOGS="")
    assert not is_warm(tmp_path, **{COLD: "1"})
    assert not is_warm(tmp_path, "-c", IMPORTED)
    assert is_warm(tmp_path, "-c", "import torch; s = __import__('sys'); " + SEEN)
    assert not is_warm(tmp_path, "-I", "program.py")
    other = tmp_path / "other"
    (other / "diffusers").mkdir(parents=True)
    assert not is_warm(tmp_path, PYTHONPATH=str(other))
    (tmp_path / "safetensors.py").write_text("")
    assert not is_warm(tmp_path)


@linux
def test_what_is_installed_is_found_whatever_is_on_the_path(tmp_path: Path) -> None:
    cold, warm = both("-m", "truestep", "--version", cwd=tmp_path, PYTHONPATH="")
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.returncode == 0


@linux
def test_start_up_files_run(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nos.environ['MARK'] = 'site'\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    cold, warm = both("program.py", cwd=tmp_path, PYTHONPATH=path)
    assert (warm.stdout, warm.stderr) == (cold.stdout, cold.stderr)
    assert "site" in warm.stdout.splitlines()[1].split()[0]


NESTED = """
import os, subprocess, sys
words = [sys.executable, "inner.py", str(os.getpid())]
if sys.argv[1] == "forked":
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    words[2] = str(os.getpid())
os._exit(subprocess.run(words).returncode)
"""

INNER = """
import os, sys
assert os.getppid() == int(sys.argv[1]), "another parent"
assert "torch" in sys.modules
sys.exit(5)
"""


@linux
@pytest.mark.parametrize("how", ["started", "forked"])
def test_what_it_starts_is_its_own_child_and_warm(how: str, tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(NESTED)
    (tmp_path / "inner.py").write_text(INNER)
    done = subprocess.run(
        [sys.executable, "outer.py", how], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (5, "")


@linux
def test_it_is_a_child_that_can_be_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    for stop, session in ((signal.SIGINT, True), (signal.SIGKILL, False), (signal.SIGTERM, False)):
        process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=tmp_path, text=True, start_new_session=session,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert os.getsid(process.pid) == (process.pid if session else os.getsid(0))
        process.send_signal(stop)
        _, said = process.communicate()
        assert process.returncode == -stop
        assert ("KeyboardInterrupt" in said) is (stop is signal.SIGINT)
        assert "warm.py" not in said


@linux
def test_it_can_be_stopped_from_its_first_moment(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\ntime.sleep(60)\n")
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        for _ in range(5):
            process = subprocess.Popen(
                [sys.executable, "program.py"], cwd=tmp_path, start_new_session=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            os.killpg(process.pid, stop)
            assert process.wait() == -stop


@linux
def test_files_are_passed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, sys\nos.write(int(sys.argv[1]), b'here')\n"
        "print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:5])\n"
    )
    read, write = os.pipe()
    os.set_inheritable(read, True)
    for env in ({COLD: "1"}, {}):
        done = subprocess.run(
            [sys.executable, "program.py", str(write)], cwd=tmp_path, pass_fds=[write],
            stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        assert os.read(read, 10) == b"here"
        assert str(read) not in done.stdout.strip("[]\n").split(", ")[3:]
    os.close(read)
    os.close(write)


@linux
def test_streams_end_when_it_ends(tmp_path: Path) -> None:
    """No process that was forked beside it holds them."""
    (tmp_path / "program.py").write_text(
        "import os\nprint('x', flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert (done.stdout, done.returncode) == ("x\n", -9)


CASE = ("record", "builtin:digits", "--prompt", "a", "--apply", "change.py:f")


@pytest.mark.parametrize(
    ("end", "said"),
    [("kill(os.getpid(), 9)", "SIGKILL ended the process"), ("_exit(0)", "exit status 0")],
)
def test_the_guard_is_there(end: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "change.py").write_text(f"import os\nos.{end}\n")
    done = command(*CASE, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
