"""What a job will do: the sources of a bucket or manifest, dealt to tasks and frozen."""
