from tests.config import test_plain_yaml as lender

test_fault_35_hostile_text_is_refused = lender.test_hostile_text_is_refused
