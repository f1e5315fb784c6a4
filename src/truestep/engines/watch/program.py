"""Start to watch in a process of an engine: told by the environment, before the engine is loaded.

`truestep engine run` sets `TRUESTEP_ENGINE` to JSON (see `watch.request`) and puts truestep's own
start-up folder on PYTHONPATH; processes that the program starts inherit both.
"""

from __future__ import annotations

import os

from truestep.engines.watch.request import VARIABLE, parse
from truestep.replay.program import say

_started: list[int] = []
"""Processes that are watched: this one, and that it was forked from."""


def start_from_environment() -> None:
    """Watch as TRUESTEP_ENGINE says, once a process; torch has been loaded.

    Also the entry point of engines that load plugins in their workers.
    """
    text = os.environ.get(VARIABLE)
    if text is None or os.getpid() in _started:
        return
    _started.append(os.getpid())
    try:
        request = parse(text)
    except ValueError as error:
        say(f"nothing is recorded: {VARIABLE}: {error}")
        return
    from truestep.engines.watch.watcher import Watcher

    Watcher(request).start()
