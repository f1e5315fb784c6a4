"""Encoders and decoder."""
