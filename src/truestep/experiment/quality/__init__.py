"""Is a meant change still good enough: two arms on the same noise, judged prompt by prompt."""
