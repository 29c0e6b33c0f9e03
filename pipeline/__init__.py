"""From raw buckets to batches on the device: `ingest` makes shards, `loading` plays them."""
