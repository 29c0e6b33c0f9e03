"""Where files lie: a local folder or any fsspec URL, read, listed and published whole."""
