"""The list of faults, each with a test that brings it about: `python -m tests.faults.report` shows what held.

A test is named `test_fault_NN_...` after its item in items.py; an item may have several. `make test` runs those that
are not marked `report_only`, which is for what takes long. `lent` holds tests of other folders under their number: they
run there in `make test`, and here for the report.
"""
