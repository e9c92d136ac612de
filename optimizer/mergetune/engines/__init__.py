"""Engines: living inference processes whose weights are swapped."""
