"""Speed and memory of truestep beside its peers, as JSON lines. Run with `make bench`."""
