"""The error of everything that reads or matches checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The model is as it was."""
