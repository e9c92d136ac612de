"""Who watches a study from outside: a database, trackers of experiments, the user's own command."""
