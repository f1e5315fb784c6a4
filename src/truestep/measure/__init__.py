"""Tensors in, numbers out: distances, structure, sketches, moments, frames, sound."""
