"""Whole training runs, from a configuration to checkpoints, metrics and exports."""
