"""What an accelerator makes of truestep: floors, faults, plans, overhead and memory, in minutes."""
