"""A generated bucket of raw video, broken files included."""
