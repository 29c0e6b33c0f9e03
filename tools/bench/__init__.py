"""Benchmarks: each prints what it measured, with the machine and the versions beside it."""
