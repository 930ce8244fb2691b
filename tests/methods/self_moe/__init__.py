"""Self-MoE: generation, filters, evaluation."""
