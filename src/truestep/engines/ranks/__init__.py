"""Runs on several ranks: their recordings gathered into one run, and what ranks exchange judged."""
