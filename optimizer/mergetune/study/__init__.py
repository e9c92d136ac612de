"""The study: its plan, its baselines, its search, and what it writes."""
