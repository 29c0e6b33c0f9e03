"""Raw bucket → WebDataset shards. Never imports torch; every touch of foreign video is in a child process."""
