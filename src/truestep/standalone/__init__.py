"""Files that are copied into environments without truestep: torch and the standard library only."""
