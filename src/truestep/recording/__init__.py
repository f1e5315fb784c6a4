"""Recordings: format, capture, replay, noise floor. Import the modules directly."""
