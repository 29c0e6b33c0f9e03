"""The commands of `reelmae`, each a dataclass of its flags with a `run`."""
