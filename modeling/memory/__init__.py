"""The peak memory of a training step, predicted."""
