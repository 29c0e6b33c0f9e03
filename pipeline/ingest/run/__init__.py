"""Tasks and who runs them."""
