"""The list of faults, each with a test that brings it about: `python -m tests.faults.report` shows what held.

A test is named `test_fault_NN_...` after its item in items.py; an item may have several. `make test` runs those that
are not marked `report_only`: that mark is for what takes long, and for tests of another folder that a module here
lends a number (`from tests.x import test_y as test_fault_NN_y`), since they run there already.
"""
