"""Models that ship with truestep."""
