"""What is asked of a model and how replies become scores, item by item."""
