"""The guard: whatever ends the child, no 0 that was not judged is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truestep.guard import fork

START = """
import os, signal, sys, threading, time
from truestep import guard
"""
WATCHED = START + 'watched = guard.fork("truestep check")\nwatched.at("case three, step 4")\n'


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("os._exit(0)", "ended with exit code 0 before it had judged"),
        ("sys.exit(0)", "ended with exit code 0 before it had judged"),
        ("os._exit(3)", "ended with exit code 3 before it had judged"),
        ("pass", "ended with exit code 0 before it had judged"),
        ("os.kill(os.getpid(), 11)", "was ended by SIGSEGV before it had judged"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL before it had judged"),
        ("os.abort()", "was ended by SIGABRT before it had judged"),
        (
            "if os.fork() == 0: watched.judged(0)\nelse: os.wait(); os._exit(0)",
            "exit code 0 before",
        ),
    ],
)
def test_a_child_that_ends_before_it_judged_is_told_and_fails(body: str, how: str) -> None:
    found = run(WATCHED + body)
    assert found.returncode == 1
    assert how in found.stderr
    assert "  where    case three, step 4\n  measured peak memory " in found.stderr


def test_the_likely_cause_is_named() -> None:
    assert "likely   the out-of-memory killer" in run(WATCHED + "os.kill(os.getpid(), 9)").stderr
    assert "likely   something called os._exit or sys.exit" in run(WATCHED + "os._exit(0)").stderr
    assert "likely   a fault in compiled code" in run(WATCHED + "os.kill(os.getpid(), 11)").stderr


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130])
def test_what_was_judged_is_passed_on(code: int) -> None:
    found = run(WATCHED + f"print('done'); watched.judged({code}); sys.exit({code})")
    assert (found.returncode, found.stdout, found.stderr) == (code, "done\n", "")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("watched.judged(1); os._exit(0)", 1),
        ("watched.judged(3); sys.exit(0)", 3),
        ("watched.judged(0); sys.exit(5)", 5),
        ("watched.judged(0); os.kill(os.getpid(), 11)", 139),
        ("watched.judged(4); os.kill(os.getpid(), 11)", 4),
    ],
)
def test_no_end_after_the_judgement_makes_it_pass(body: str, code: int) -> None:
    assert run(WATCHED + body).returncode == code


def test_the_interpreter_is_left_in_order() -> None:
    found = run(WATCHED + "import atexit; atexit.register(print, 'last')\nwatched.judged(0)")
    assert (found.returncode, found.stdout) == (0, "last\n")


def test_a_process_with_threads_is_not_forked() -> None:
    body = "e = threading.Event(); threading.Thread(target=e.wait).start()\n"
    found = run(START + body + "print(guard.fork('x')); e.set()")
    assert (found.returncode, found.stdout) == (0, "None\n")
    import torch

    torch.ones(1)
    if len(os.listdir("/proc/self/task")) > 1:
        assert fork("x") is None


def started(body: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED + "print(os.getpid(), flush=True)\n" + body],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_parent_reaches_the_child(number: signal.Signals) -> None:
    body = (
        "def stop(number, frame):\n    watched.judged(130)\n    sys.exit(130)\n"
        f"signal.signal({int(number)}, stop)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    with started(body) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == 130


def test_a_second_interrupt_at_once_is_the_same_one() -> None:
    """Ctrl-C goes to parent and child, and the parent's may be passed on."""
    body = (
        "times = []\nwhile len(times) < 2:\n    try:\n        print('ready', flush=True)\n"
        "        time.sleep(1 if times else 30)\n        break\n"
        "    except KeyboardInterrupt:\n        times.append(1)\n"
        "watched.judged(len(times))"
    )
    code = WATCHED.replace("watched = guard", "guard._AGAIN_S = 60.0\nwatched = guard") + body
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 1


def test_what_is_ignored_is_ignored_in_the_child_too() -> None:
    code = (
        START
        + "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        + "def wait():\n    print('ready', flush=True)\n    time.sleep(1)\n    return 0\n"
        + "guard.run(wait, lambda ended: 1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(30) == 0


def test_an_exit_code_that_is_none_never_passes() -> None:
    assert run(WATCHED + "watched.judged(256)").returncode == 255


def test_a_page_that_is_written_over_is_no_judgement() -> None:
    for byte in (0, 1, 255):
        body = f"watched._page[:18] = bytes([{byte}]) * 18; os._exit(0)"
        found = run(WATCHED + body)
        assert found.returncode == 1
        assert "before it had judged" in found.stderr


def test_a_killed_parent_takes_the_child_along() -> None:
    with started("time.sleep(60)") as process:
        assert process.stdout is not None
        child = Path("/proc") / process.stdout.readline().strip()
        process.kill()
        process.wait(30)
        end = time.monotonic() + 30
        while child.exists() and " Z " not in (child / "stat").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
