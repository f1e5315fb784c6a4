"""Real engines on one set of tiny random Wan weights; see `bench.bench_engines`."""
