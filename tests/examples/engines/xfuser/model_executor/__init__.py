"""Stand-in for xDiT."""
