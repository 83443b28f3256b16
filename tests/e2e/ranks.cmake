e2e_test(e2e_ranks ranks_test.py)
