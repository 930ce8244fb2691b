from tests.methods.esft import test_adapter_run as lender

test_fault_10_the_adapter_of_a_run = lender.test_the_adapter_of_a_run
