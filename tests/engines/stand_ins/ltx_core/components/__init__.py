"""Of the official LTX-2."""
