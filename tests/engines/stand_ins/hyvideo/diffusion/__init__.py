"""Stand-in for the official HunyuanVideo."""
