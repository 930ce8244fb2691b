"""Tables, plots and pages. Knows nothing of models."""
