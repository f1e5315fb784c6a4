"""Other tools' gates beside our verdict: what each would have said, and their thresholds."""
