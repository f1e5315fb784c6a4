"""Models behind an address: what is asked of them, what they answer, and what that shows."""
