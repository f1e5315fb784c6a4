"""What every module of a model gives, recorded while it runs: hooks, operators, whole programs."""
