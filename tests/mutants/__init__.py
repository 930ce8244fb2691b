"""Faults that real projects have shipped, planted one at a time: the suite must notice each of them."""
