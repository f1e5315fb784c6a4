"""What pipelines return, as tensors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import torch
from PIL import Image

from truestep.testing.outputs import leaves


def test_tensors_arrays_and_pictures_come_in_order() -> None:
    tensor = torch.arange(3)
    array = numpy.arange(4)[::-1]
    picture = Image.new("RGB", (2, 3), (1, 2, 3))
    state = SimpleNamespace(values={"a": tensor})
    found = list(leaves({"x": [tensor, "words", None], "y": (array, picture), "z": [state, 1.5]}))
    assert torch.equal(found[0], tensor)
    assert found[1].tolist() == [3, 2, 1, 0]
    assert found[2].shape == (3, 2, 3)
    assert found[3] is tensor
    assert len(found) == 4
