"""mergetune: evaluation-driven tuning of merge coefficients for language models."""

__version__ = "0.1.0"
