"""One way to measure a model: an engine that lives, and replies that are kept."""
