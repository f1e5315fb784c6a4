"""Modules and signatures of the official flux, around diffusers' models; ours, for tests."""
