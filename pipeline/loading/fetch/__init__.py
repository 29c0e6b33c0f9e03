"""The bytes of clips: ranged reads, the shard cache, read-ahead."""
