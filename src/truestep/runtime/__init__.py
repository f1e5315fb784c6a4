"""Diffusion runtime: diffusers' models behind truestep's own stages. Import the modules directly."""
