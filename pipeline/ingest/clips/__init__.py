"""One source → its clips, or why there are none."""
