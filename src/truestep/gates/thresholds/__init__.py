"""SGLang-Diffusion's threshold files: read, run as a named rule, lint, and write from a floor."""
