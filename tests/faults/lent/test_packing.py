from tests.data import test_packing as lender

test_fault_33_row_layout = lender.test_row_layout
