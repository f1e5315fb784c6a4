"""Runs at Python's start-up where this folder is on PYTHONPATH: traces if TRUESTEP_TRACE is set.

Any `sitecustomize` that this one hides runs first, as if this one were not there.
"""

from __future__ import annotations

import os
import sys
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


def _trace() -> None:
    if "TRUESTEP_TRACE" not in os.environ:
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
            import truestep.replay.program as program
        except ImportError:
            sys.path.append(root)
            try:
                import truestep.replay.program as program
            except ImportError as error:
                print(f"truestep: nothing is traced: {error}", file=sys.stderr)
                return
        program.start_from_environment()

    waiting.when_loaded("torch", start)


try:
    _run_hidden()
finally:
    _trace()
