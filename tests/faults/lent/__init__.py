"""Tests of other folders that bring about a fault of the list: here they have its number, for the report."""
