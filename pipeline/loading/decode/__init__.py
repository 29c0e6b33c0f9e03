"""Bytes and draws → pixels, by PyAV or DALI."""
