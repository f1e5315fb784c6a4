"""What runs inside an engine's own processes: torch and safetensors are all that it needs there."""
