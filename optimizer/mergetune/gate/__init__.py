"""A regression gate: a candidate against a baseline, item by item."""
