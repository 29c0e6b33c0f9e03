"""The clips that are played: index columns, selections, mixtures."""
