"""Configurations of what denoises, and of what else diffusers' own pipelines are made of.

Each entry is a function of the facts: sizes that must agree with other components are taken from
them, so that one table serves every pipeline that a class appears in.
"""

from __future__ import annotations

from truestep.testing.tiny.facts import Table
from truestep.testing.tiny.pictures import PICTURES
from truestep.testing.tiny.sounds import SOUNDS
from truestep.testing.tiny.unets import UNETS
from truestep.testing.tiny.videos import VIDEOS

DENOISERS: Table = {**UNETS, **PICTURES, **VIDEOS, **SOUNDS}
"""Arguments of each class, by its name."""
