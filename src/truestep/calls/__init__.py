"""Everything is a call: cut whatever runs at its components, record the calls, check each alone."""
