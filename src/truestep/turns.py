"""One thread at a time where the state of the whole process is changed.

Loading a model patches torch for a while (its default dtype, how modules are initialised), and a
noise floor is measured under other numbers of threads. A second thread that loads or runs a model
meanwhile would get wrong numbers, or leave the patches behind for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def taking_turns() -> Iterator[None]:
    """Have the process to oneself; torch's default dtype is afterwards what it was."""
    import torch

    with _LOCK:
        dtype = torch.get_default_dtype()
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
