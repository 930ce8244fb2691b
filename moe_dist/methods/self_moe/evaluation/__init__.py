"""How well a model answers held-out items."""
