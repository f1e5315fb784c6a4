"""Distances, matching and verdicts of tensors. Import the modules directly."""
