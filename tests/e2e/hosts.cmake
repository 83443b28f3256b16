e2e_test(e2e_two_hosts two_hosts_test.py)
