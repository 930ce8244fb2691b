"""Measured claims: `python -m benchmarks.NAME --json FILE`."""
