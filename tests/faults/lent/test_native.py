from tests.ops import test_native as lender

test_fault_28_offsets_beyond_32_bits = lender.test_offsets_beyond_32_bits
