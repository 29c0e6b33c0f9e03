"""Clips → tars, commit records and the tables over them all."""
