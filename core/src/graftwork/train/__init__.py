"""Training: the composed trainer class, adapters, task streams, checkpoints and resume."""
