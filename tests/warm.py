"""Processes that begin with the heavy imports already made.

A Python that imports torch, diffusers and transformers takes 4 to 8 s of a core before it does
anything, and the tests start hundreds. Under `warm()` each `subprocess.Popen` of this interpreter
with a script or `-m` is a fork of one process that has imported the libraries and nothing else. It
is a process like any other: a child of who started it, with its own number, streams, environment,
folder, search path, signals and end. It runs `sitecustomize` again; what it starts is warm, too.

Cold as ever: other interpreters and options of the interpreter, `-c` without a word of torch,
`preexec_fn`, an environment that libraries read when they are imported (`_READ_AT_IMPORT`), a
search path that holds another copy of a library, `TRUESTEP_TEST_COLD=1`, and everything where this
is not Linux. What measures memory, or what is imported at start-up, belongs there. tests/test_warm
holds the two to each other.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import importlib
import inspect
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

COLD = "TRUESTEP_TEST_COLD"
ROOT = Path(__file__).parents[1]

HEAVY = (
    *("diffusers", "hypothesis", "numpy", "peft", "PIL.Image", "pydantic", "rich.console"),
    *("safetensors.torch", "scipy.optimize", "scipy.stats", "torch._dynamo", "torch.export"),
    *("torch.distributed.run", "transformers"),
)
"""Modules of libraries that most processes import."""

CLASSES = {
    "diffusers": (
        *("AutoencoderKL", "AutoencoderKLWan", "FlowMatchEulerDiscreteScheduler", "FluxPipeline"),
        *("StableDiffusionXLPipeline", "WanImageToVideoPipeline", "WanPipeline"),
    ),
    "transformers": (
        *("AutoTokenizer", "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"),
        "UMT5EncoderModel",
    ),
}
"""Classes of libraries that import what they need when they are first named."""

_OURS = ("truestep", "tests", "bench", "sitecustomize")
_READ_AT_IMPORT = (
    *("ATEN", "CUDA", "DIFFUSERS", "GOMP", "HF_", "HOME", "HUGGINGFACE", "KMP_", "LANG", "LC_"),
    *("LD_", "MKL", "NUMPY", "OMP_", "OPENBLAS", "PYTHON", "PYTORCH", "TORCH", "TRANSFORMERS"),
    *("TRITON", "USE_", "XDG_"),
)
_READ_LATER = (
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
    "TORCHELASTIC",
    "TORCH_NCCL",
    "XDG_CACHE_HOME",  # by truestep; of libraries by those that fetch, and none does
)
_FAR = 200
"""Numbers of files from here on are in no one's way."""

_MEASURED = ("sys.modules", "setrlimit", "getrusage", "Vm")
"""In a program of `-c`: it looks at what is imported, or at memory."""

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


@dataclass
class Nest:
    """The process that forks the warm ones, from the side of the process that it forks for."""

    socket: socket.socket | None = None
    begun: subprocess.Popen[bytes] | None = None
    process: int = 0
    """Whose children they are: this process, not one that was forked from it."""
    environment: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    """What was imported, and the folder that it came from."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    forks: bool = False
    """Whether this process forks for another, and is no program."""
    alone: bool = False
    """Whether the program had one thread when it forked last."""

    def begin(self) -> None:
        """Start it, and wait until it has imported."""
        ours, theirs = socket.socketpair()
        self.begun = subprocess.Popen(
            [sys.executable, "-c", f"from tests.warm import serve; serve({theirs.fileno()})"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {COLD: "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        text, _ = _received(ours)
        assert text, "nothing forks: python -c 'from tests.warm import serve; serve(1)' says why"
        self.environment = dict(os.environ)
        self.holds(ours, json.loads(text))

    def end(self) -> None:
        """End it, if this process began it."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        if self.begun is not None:
            self.begun.wait()
            self.begun = None

    def holds(self, ours: socket.socket, packages: dict[str, str]) -> None:
        """The other end of its socket, as this process has it."""
        far = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, _FAR)
        ours.close()
        self.socket, self.process = socket.socket(fileno=far), os.getpid()
        self.packages = packages

    def child(self, told: dict[str, Any], files: Sequence[int]) -> int:
        """The number of a process that is a child of this one."""
        with self.lock:
            assert self.socket is not None, "whoever asks whether it can has begun it"
            _adopt(True)
            try:
                _send(self.socket, json.dumps(told).encode(), files)
                return int(_received(self.socket)[0])
            finally:
                _adopt(False)

    def can(self, asked: dict[str, Any], words: Sequence[str], env: dict[str, str]) -> bool:
        """Whether a process may be warm; see the module."""
        if COLD in env or asked["shell"] or asked["preexec_fn"] or not asked["close_fds"]:
            return False
        if asked["executable"] is not None or not _is_ours(words[0], env):
            return False
        given = ("gid", "gids", "uid", "process_group")
        if any(asked.get(name) not in (None, -1) for name in given):
            return False
        if asked.get("umask", -1) != -1 or not _is_program(words[1:], asked["cwd"]):
            return False
        with self.lock:
            if self.socket is None:
                self.begin()
        if self.process != os.getpid():
            return False
        before, now = _at_import(self.environment), _at_import(env)
        return before == now and not any(
            self._is_other(place) for place in _first(words, asked["cwd"], env)
        )

    def _is_other(self, place: str) -> bool:
        """Whether a folder of the search path holds another copy of what was imported."""
        with suppress(OSError):
            for name in os.listdir(place or "."):
                package = self.packages.get(name.removesuffix(".py"))
                if package is not None and os.path.realpath(place) != package:
                    return True
        return False


_nest = Nest()
_run_cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_words = inspect.signature(_run_cold)


@contextmanager
def warm() -> Iterator[None]:
    """Within the block, processes of this interpreter are warm where they can be."""
    if sys.platform != "linux" or COLD in os.environ:
        yield
        return
    patch()
    try:
        yield
    finally:
        subprocess.Popen._execute_child = _run_cold  # type: ignore[attr-defined]
        _nest.end()


def patch() -> None:
    """Let processes that this one starts be warm."""
    subprocess.Popen._execute_child = _execute  # type: ignore[attr-defined]


def _execute(self: Any, *given: Any, **named: Any) -> None:
    """Stands for `Popen._execute_child`."""
    asked = _words.bind(self, *given, **named).arguments
    words = asked["args"]
    words = [words] if isinstance(words, str | bytes | os.PathLike) else list(words)
    words = _as_python([os.fsdecode(word) for word in words])
    env = os.environ if asked["env"] is None else asked["env"]
    env = {os.fsdecode(key): os.fsdecode(value) for key, value in env.items()}
    if not words or not _nest.can(asked, words, env):
        _run_cold(self, *given, **named)
        return
    streams = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
    streams = [own if own != -1 else number for number, own in enumerate(streams)]
    passed = sorted(map(int, asked["pass_fds"]))
    told = {
        "words": words,
        "env": env,
        "cwd": os.path.abspath(os.fsdecode(asked["cwd"] or ".")),
        "session": bool(asked["start_new_session"]),
        "files": [0, 1, 2, *passed],
    }
    self.pid = _nest.child(told, [*streams, *passed])
    self._child_created = True
    ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    self._close_pipe_fds(*(asked[name] for name in ends))


def _as_python(words: list[str]) -> list[str]:
    """A script that was installed beside this interpreter as the interpreter's own argument."""
    script = shutil.which(words[0]) if words else None
    if script and os.path.dirname(script) == os.path.dirname(sys.executable):
        with open(script, "rb") as file:
            if file.readline().strip() == b"#!" + os.fsencode(sys.executable):
                return [sys.executable, script, *words[1:]]
    return words


def _is_ours(word: str, env: dict[str, str]) -> bool:
    """Whether a word starts this interpreter."""
    where = shutil.which(word, path=env.get("PATH")) or word
    same = os.path.dirname(where) == os.path.dirname(sys.executable)
    return same and os.path.realpath(where) == os.path.realpath(sys.executable)


def _is_program(words: Sequence[str], cwd: Any) -> bool:
    words = words[1:] if words[:1] == ["-u"] else words
    if not words or (cwd is not None and not os.path.isdir(cwd)):
        return False
    if words[0] == "-c":
        code = words[1] if len(words) > 1 else ""
        measured = any(word in code for word in _MEASURED)
        return ("torch" in code and not measured) or "runpy.run_module" in code
    if words[0].startswith("-m"):
        name = words[0].removeprefix("-m") or (words[1] if len(words) > 1 else "")
        return (
            name.split(".")[0] in ("truestep", "pytest", "tests") or name == "torch.distributed.run"
        )
    installed = os.path.dirname(words[0]) == os.path.dirname(sys.executable)
    program = words[0].endswith(".py") or installed
    return program and os.path.isfile(os.path.join(cwd or ".", words[0]))


def _at_import(env: dict[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in env.items()
        if key.startswith(_READ_AT_IMPORT) and not key.startswith(_READ_LATER)
    }


def _first(words: Sequence[str], cwd: Any, env: dict[str, str]) -> list[str]:
    """Folders that are searched before the interpreter's own."""
    here = os.path.abspath(os.fsdecode(cwd or "."))
    script = next(word for word in words[1:] if word != "-u")
    own = here if script.startswith("-") else os.path.dirname(os.path.join(here, script))
    path = env.get("PYTHONPATH")
    return [own, *(os.path.join(here, place) for place in (path.split(os.pathsep) if path else []))]


def _adopt(whether: bool) -> None:
    """Let processes be this one's children whose parent ends, or init's as ever."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, int(whether), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _send(to: socket.socket, text: bytes, files: Sequence[int] = ()) -> None:
    socket.send_fds(to, [len(text).to_bytes(8, "big")], list(files))
    to.sendall(text)


def _received(of: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its files; nothing where the other side has ended."""
    head, files, *_ = socket.recv_fds(of, 8, 64)
    if not head:
        return b"", []
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        part = of.recv(1 << 20)
        if not part:
            raise EOFError("the other side ended within a message")
        text += part
    return text, files


# --- the process that forks ---------------------------------------------------------------------


def serve(number: int) -> NoReturn:
    """Import, then fork for each message; the fork returns as the program that was asked for."""
    _nest.environment = dict(os.environ)  # before libraries set in it what they think of
    path = sys.path[:]
    for name in HEAVY:
        importlib.import_module(name)
    for module, names in CLASSES.items():
        for name in names:
            getattr(importlib.import_module(module), name)
    sys.path[:] = _interpreter_s(path)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        if name not in (__name__, "tests"):
            del sys.modules[name]
    for stop in _STOPS:
        _before[stop] = signal.getsignal(stop)
    os.set_inheritable(number, False)
    server = socket.socket(fileno=number)
    _send(server, json.dumps(_packages()).encode())
    _fork_for(server)


def _fork_for(server: socket.socket) -> NoReturn:
    """Answer one process's messages; each fork becomes its program, and ends as that does."""
    _nest.forks = True
    while True:
        for stop in _STOPS:
            signal.signal(stop, signal.SIG_IGN)
        told, files = _next(server)
        ours, theirs = socket.socketpair()
        server.close()
        if os.fork():
            break
        ours.close()  # who forks for the program is there before the program begins
        _hear_nothing(theirs)
        server = theirs
    theirs.close()
    _become(told, files, ours)


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_before: dict[int, Any] = {}
"""What each did where the libraries were imported."""


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _before_fork() -> None:
    _nest.alone = not _nest.forks and _threads() == 1


def _after_fork() -> None:
    """A program has forked, as truestep's guard does: what the fork starts are its own children."""
    if _nest.socket is None or not _nest.alone or _nest.forks:
        return
    ours, theirs = socket.socketpair()
    _nest.socket.close()
    _nest.forks = True
    if os.fork() == 0:
        ours.close()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # the program's to tidy
        _hear_nothing(theirs)
        _fork_for(theirs)
    _nest.forks = False
    theirs.close()
    _nest.holds(ours, _nest.packages)


def _hear_nothing(but: socket.socket) -> None:
    """Hold no stream of another process, nor any file but one."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in range(3):
        os.dup2(nothing, file)
    _close_all((but.fileno(),))


def _close_all(but: Sequence[int]) -> None:
    for file in map(int, os.listdir("/proc/self/fd")):
        if file > 2 and file not in but:
            with suppress(OSError):  # the listing's own
                os.close(file)


def _next(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a fork is to be; returns in the fork only."""
    while True:
        text, files = _received(server)
        if not text:
            os._exit(0)
        told = json.loads(text)
        born, birth = os.pipe()
        begun, begin = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                if told["session"]:
                    os.setsid()
                for stop, handler in _before.items():  # it may be stopped as soon as it is known
                    ignored = handler is signal.SIG_IGN
                    signal.signal(stop, signal.SIG_IGN if ignored else signal.SIG_DFL)
                os.write(birth, str(os.getpid()).encode())
                for file in (born, birth, begin):
                    os.close(file)
                os.read(begun, 1)  # ends when the process in the middle has: then it is adopted
                os.close(begun)
                return told, files
            os._exit(0)
        for file in (birth, begun, *files):
            os.close(file)
        os.waitpid(middle, 0)
        _send(server, os.read(born, 32))
        for file in (born, begin):
            os.close(file)


def _interpreter_s(path: list[str]) -> list[str]:
    """The search path without what the program put there; of the environment there is nothing."""
    return [place for place in path if place and os.path.abspath(place) != str(ROOT)]


def _packages() -> dict[str, str]:
    standard = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in name or file is None or name in _OURS:
            continue
        folder = Path(os.path.realpath(file)).parent
        folder = folder.parent if hasattr(module, "__path__") else folder
        if str(folder) not in standard and "lib-dynload" not in str(folder):
            found[name] = str(folder)
    return found


# --- the fork -----------------------------------------------------------------------------------


def _become(told: dict[str, Any], files: list[int], ours: socket.socket) -> NoReturn:
    """Be the process that was asked for, in all that a program may look at; run it."""
    assert _threads() == 1, "a fork has the thread alone that forked"
    first = not _nest.packages
    _nest.holds(ours, _nest.packages or _packages())
    assert _nest.socket is not None
    far = [fcntl.fcntl(file, fcntl.F_DUPFD, _FAR) for file in files]
    _close_all((*far, _nest.socket.fileno()))
    for file, number in zip(far, told["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    for stop, handler in _before.items():
        signal.signal(stop, handler)
    _nest.forks = False
    if first:
        patch()
        os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    _streams()
    _search(told)
    _run(told["words"])


def _streams() -> None:
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.reconfigure(
            line_buffering=number == 2 or os.isatty(number), write_through=unbuffered
        )  # type: ignore[union-attr]


def _search(told: dict[str, Any]) -> None:
    """The search path, and what runs at start-up."""
    own, *given = _first(told["words"], told["cwd"], told["env"])
    sys.path[:0] = given
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    with suppress(ImportError):
        importlib.import_module("sitecustomize")
    sys.path.insert(0, "" if "-c" in told["words"][1:3] else own)


def _run(words: list[str]) -> NoReturn:
    words = [word for number, word in enumerate(words) if (number, word) != (1, "-u")]
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.orig_argv[:] = words
    run: Callable[[], object]
    if words[1].startswith("-m"):
        name, *rest = words[2:] if words[1] == "-m" else [words[1][2:], *words[2:]]
        sys.argv[:] = ["-m", *rest]
        run = lambda: runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # noqa: E731
    elif words[1] == "-c":
        sys.argv[:] = ["-c", *words[3:]]
        program = compile(words[2], "<string>", "exec")
        main.__dict__.update(__builtins__=__builtins__)
        run = lambda: exec(program, main.__dict__)  # noqa: E731
    else:
        sys.argv[:] = words[1:]
        place = os.path.abspath(words[1])
        loader = SourceFileLoader("__main__", place)
        main.__dict__.update(__file__=place, __builtins__=__builtins__, __cached__=None)
        main.__loader__ = loader
        program = compile(loader.get_data(place), place, "exec")
        run = lambda: exec(program, main.__dict__)  # noqa: E731
    code = 0
    try:
        run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        _told(error)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    _end(code)


def _end(code: int) -> NoReturn:
    """As the interpreter ends, but for what it takes down in memory."""
    with suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _told(error: BaseException) -> None:
    """As the interpreter tells of it, without the frames of this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith("<frozen"):
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)
