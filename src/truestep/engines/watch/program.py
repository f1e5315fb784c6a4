"""Start to watch in a process of an engine: told by the environment, before the engine is loaded.

`truestep engine run` sets `TRUESTEP_ENGINE` to JSON (see `watch.request`) and puts truestep's own
start-up folder on PYTHONPATH; processes that the program starts inherit both.
"""

from __future__ import annotations

import os

from truestep.engines.watch.request import VARIABLE, parse, say


def start_from_environment() -> None:
    """Watch as TRUESTEP_ENGINE says; torch has been loaded."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    try:
        request = parse(text)
    except ValueError as error:
        say(f"nothing is recorded: {VARIABLE}: {error}")
        return
    from truestep.engines.watch.watcher import Watcher

    Watcher(request).start()
