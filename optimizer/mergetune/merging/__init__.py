"""From models on disk to merged weights."""
