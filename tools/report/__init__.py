"""One self-contained HTML page about a dataset, a run, or both."""
