"""The command line and what it runs: the only package that knows argv."""
