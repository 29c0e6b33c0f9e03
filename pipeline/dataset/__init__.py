"""A finished shard dataset: verify it, repair it, say what is in it."""
