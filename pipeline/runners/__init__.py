"""Where the tasks of a job run: on threads of this machine, or on a Ray cluster."""
