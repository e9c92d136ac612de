"""The machine: its memory, its clock, its signals, and processes that cannot be left behind."""
