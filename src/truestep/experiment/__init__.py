"""A/B experiments: two arms and a control interleaved, judged for speed and for sameness."""
