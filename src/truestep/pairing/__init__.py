"""Pair the parameters and modules of two implementations of one model, with evidence."""

from truestep.pairing.activations import pair_activations
from truestep.pairing.records import Ambiguous, Evidence, Pair, Pairing
from truestep.pairing.solve import pair_modules

__all__ = ["Ambiguous", "Evidence", "Pair", "Pairing", "pair_activations", "pair_modules"]
