"""Statistics of scores by item: intervals, tests, looks at a running comparison, fronts."""
