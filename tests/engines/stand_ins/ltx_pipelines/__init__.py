"""Modules and signatures of the official LTX-2, around diffusers' model; ours, for tests."""
