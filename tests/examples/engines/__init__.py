"""Stand-ins with the module paths and signatures of real engines, around tiny trusted models."""
