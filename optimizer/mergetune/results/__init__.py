"""What a study learned: the study file, the run directory, and which candidate is chosen."""
