"""From a base and its experts to one model, and back to one expert."""
