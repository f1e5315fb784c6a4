"""The measures of diffusers' own tests, and our verdict.

`from truestep.dropin.diffusers import numpy_cosine_similarity_distance` takes the place of the same
import from `diffusers.utils.testing_utils`; names that are not here are handed on from there.
Values and exceptions are those of diffusers. Truestep's verdict on what was given goes to the log
`truestep.dropin`, as a warning where the measure passes and is blind to what is wrong (a scale).

Source:
    diffusers 0.42.1, utils/testing_utils.py.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from truestep.dropin.elsewhere import handed_on, tell
from truestep.errors import TruestepError, one_line

ORIGINAL = "diffusers.utils.testing_utils"

USUAL = 1e-3
"""Below this a cosine distance passes in most of diffusers' tests (tests/pipelines)."""

_BLIND = math.sqrt(2 * USUAL)
"""rel_l2 of the largest error whose cosine distance is `USUAL`: what is further off and passes, was
not seen. Nearer, an expected slice may but have been written with four digits."""

_LOG = logging.getLogger("truestep.dropin")


def __getattr__(name: str) -> object:
    return handed_on(ORIGINAL, name)


def numpy_cosine_similarity_distance(a: Any, b: Any) -> Any:
    """1 - cosine similarity of two arrays of one dimension; of more, the mean of a product's.

    Returns:
        A number of the arrays' own precision. NaN gives NaN, and so do zeros; any scale gives 0.
    """
    import numpy as np

    similarity = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    distance = 1.0 - similarity.mean()
    _beside(a, b, passed=bool(distance < USUAL))
    return distance


def torch_all_close(a: Any, b: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether two tensors are close as `torch.allclose` has it.

    Args:
        args, kwargs: Of `torch.allclose`: rtol, atol, equal_nan.

    Raises:
        AssertionError: They are not.
    """
    import torch

    close = torch.allclose(a, b, *args, **kwargs)
    _beside(a, b, passed=close)
    if not close:
        raise AssertionError(f"the largest difference is {(a - b).abs().max()} of {(a - b).abs()}")
    return True


def _beside(actual: Any, reference: Any, *, passed: bool) -> None:
    from truestep.judge.compare import compare

    try:
        comparison = compare(actual, reference)
    except TruestepError as error:  # of what our verdict does not know the measure may still be one
        _LOG.info("truestep: not judged: %s", one_line(error))
        return
    errors = (row.metrics.rel_l2 for row in comparison.rows if row.metrics)
    tell(_LOG, comparison, passed=passed and not max(errors, default=0.0) <= _BLIND)
