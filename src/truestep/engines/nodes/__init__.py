"""Files that are copied into an engine's own folder, and need nothing of truestep there."""
