"""Runs at Python's start-up where this folder is on PYTHONPATH: traces if TRUESTEP_TRACE is set,
records an engine if TRUESTEP_ENGINE is.

Any `sitecustomize` that this one hides runs first, as if this one were not there.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_hidden() -> None:
    rest = [place for place in sys.path if os.path.abspath(place or ".") != _HERE]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _begin(variable: str, module: str) -> None:
    if variable not in os.environ:
        return
    # Behind everything else: the program's own environment comes first.
    root = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
    spec = spec_from_file_location("truestep_waiting", os.path.join(_HERE, "waiting.py"))
    assert spec is not None
    assert spec.loader is not None
    waiting = module_from_spec(spec)
    spec.loader.exec_module(waiting)

    def start() -> None:
        try:
            program = import_module(module)
        except ImportError:
            sys.path.append(root)
            try:
                program = import_module(module)
            except ImportError as error:
                print(f"truestep: nothing is recorded: {error}", file=sys.stderr)
                return
        program.start_from_environment()

    waiting.when_loaded("torch", start)


try:
    _run_hidden()
finally:
    _begin("TRUESTEP_TRACE", "truestep.replay.program")
    _begin("TRUESTEP_ENGINE", "truestep.engines.watch.program")
