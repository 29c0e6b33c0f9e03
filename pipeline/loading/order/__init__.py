"""Pure: which clips make which global batch, and every random choice about them."""
