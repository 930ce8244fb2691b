"""Tests of ESFT."""
