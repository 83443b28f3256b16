e2e_test(e2e_two_hosts two_hosts_test.py)
e2e_test(e2e_early_store early_store_test.py)
