"""Pretraining loops, schedules, checkpoints and metrics over `reelmae.pipeline.loading` and `reelmae.model`."""
