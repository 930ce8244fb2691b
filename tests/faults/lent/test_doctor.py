from tests.cli import test_doctor as lender

test_fault_43_works_without_deepspeed = lender.test_works_without_deepspeed
