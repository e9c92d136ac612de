"""From checkpoints on disk to merged weights."""
