"""The base model writes its own training data."""
