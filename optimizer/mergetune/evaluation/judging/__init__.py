"""Judging: a served model's verdicts on replies, asked for with care and kept."""
