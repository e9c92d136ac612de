"""mergetune: evaluation-driven tuning of merge coefficients for language models."""

import logging

__version__ = "0.1.0"

logging.getLogger("mergetune").addHandler(logging.NullHandler())  # as libraries do
