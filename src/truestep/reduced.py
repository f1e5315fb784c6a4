"""What stands for a tensor that is not kept: its moments and its sketch. No torch."""

from __future__ import annotations

STATS = ("count", "nonfinite", "mean", "abs_mean", "std", "rms", "min", "max")
"""Order of the moments in a `stats/<name>` tensor (float64). `std` is the population's."""

SKETCH_SIZE = 1024
"""Floats in a `sketch/<name>` tensor (float32; see `truestep.measure.sketch`)."""
