"""Stand-in for the official Cosmos-Predict2."""
