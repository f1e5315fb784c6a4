"""Diffusion runtime: diffusers' models behind truestep's own stages."""
