"""What can be merged: methods, layer groups, recipes and search spaces."""
