"""What is not ours: how pipelines of other libraries are loaded, recorded and checked."""
