"""Shards → clips and masks on the device, in an order that is a pure function of its arguments."""
