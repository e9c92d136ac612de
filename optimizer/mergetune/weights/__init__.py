"""Models on disk: checkpoints, adapters, tokenizers, read lazily and written whole."""
