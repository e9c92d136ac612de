"""Merge or retrain: what the task vectors say before any evaluation."""
