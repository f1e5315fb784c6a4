"""What is asked of an audio-video model by who need not know which family it is."""

from truestep.runtime.ltx2.plan import perturbed_blocks, wanted_passes
from truestep.runtime.ltx2.settings import FPS
from truestep.runtime.ltx2.two_stage import second_stage

__all__ = ["FPS", "perturbed_blocks", "second_stage", "wanted_passes"]
