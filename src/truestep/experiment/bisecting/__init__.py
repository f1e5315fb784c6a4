"""Which commit, version, flag or weight made the difference: the search, and the probes it asks."""
