"""Tars as webdataset reads and writes them."""
