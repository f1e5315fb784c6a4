"""Run a subject on recorded inputs and keep what it does: stages, functions, modules."""
