"""Measures of diffusers' tests by one changed import, beside the original."""

from __future__ import annotations

import inspect
import logging
import math
import subprocess
import sys
from typing import Any

import diffusers.utils.testing_utils as original
import numpy as np
import pytest
import torch

from truestep.dropin import diffusers as ours

RANDOM = np.random.default_rng(0)
A = RANDOM.normal(size=9).astype(np.float32)
MANY = RANDOM.normal(size=(3, 3)).astype(np.float32)


@pytest.mark.parametrize("name", ["numpy_cosine_similarity_distance", "torch_all_close"])
def test_signatures_of_the_original(name: str) -> None:
    pair = [inspect.signature(getattr(module, name)) for module in (ours, original)]
    names = [[(p.name, p.kind, p.default) for p in own.parameters.values()] for own in pair]
    assert names[0] == names[1]


def test_importing_it_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import truestep.dropin.diffusers, sys; assert not {'torch', 'diffusers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (A, A),
        (2 * A, A),
        (-A, A),
        (A + 0.01, A),
        (A.astype(np.float64), A),
        (A.astype(np.float16), A.astype(np.float16)),
        (A * math.nan, A),
        (0 * A, A),
        (MANY, MANY + 0.1),
        (A.tolist(), A.tolist()),
        (A[:3], A),
        (MANY, A),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_distances_of_the_original(a: Any, b: Any) -> None:
    found: list[Any] = []
    for module in (original, ours):
        try:
            found.append(module.numpy_cosine_similarity_distance(a, b))
        except ValueError:
            found.append(ValueError)
    assert type(found[0]) is type(found[1])
    assert found[0] == found[1] or (math.isnan(found[0]) and math.isnan(found[1]))


@pytest.mark.parametrize(
    ("change", "more"),
    [(0, {}), (1e-3, {}), (1e-3, {"atol": 1e-2}), (math.nan, {}), (math.nan, {"equal_nan": True})],
)
def test_closeness_of_the_original(change: float, more: dict[str, Any]) -> None:
    x = torch.arange(6.0)
    found: list[Any] = []
    for module in (original, ours):
        try:
            found.append(module.torch_all_close(x + change, x, **more))
        except AssertionError:
            found.append(AssertionError)
    assert found[0] is found[1]


@pytest.mark.parametrize(
    ("actual", "warned"), [(A, False), (2 * A, True), (-A, False)], ids=["same", "scale", "negated"]
)
def test_a_verdict_that_the_measure_hides_is_warned_of(
    actual: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "truestep.dropin")
    ours.numpy_cosine_similarity_distance(actual, A)
    (record,) = caplog.records
    assert record.getMessage().startswith("truestep: ")
    assert (record.levelno == logging.WARNING) is warned


def test_a_tolerance_as_large_as_the_values_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.arange(1.0, 7.0)
    ours.torch_all_close(1e-3 * x, 2e-3 * x, atol=1e-2)
    assert "drifted" in caplog.text
    caplog.clear()
    ours.torch_all_close(x + 1e-3, x, atol=1e-2)
    assert not caplog.records


def test_an_expected_slice_of_four_digits_is_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours.numpy_cosine_similarity_distance(A, np.round(A, 4))
    assert not caplog.records


def test_what_our_verdict_does_not_know_is_still_measured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "truestep.dropin")
    assert ours.numpy_cosine_similarity_distance([1.0, 0.0], [1.0, 0.0]) == 0
    assert "not judged" in caplog.text


def test_other_names_are_handed_on() -> None:
    from truestep.dropin.diffusers import floats_tensor

    assert floats_tensor is original.floats_tensor
