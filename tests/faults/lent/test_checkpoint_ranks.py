from tests.checkpoint import test_ranks as lender

test_fault_04_full_disk_of_one_rank = (
    lender.test_a_full_disk_under_one_rank_is_the_same_error_on_both_and_the_run_can_go_on
)
