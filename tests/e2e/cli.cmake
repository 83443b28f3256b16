e2e_test(e2e_cli cli_test.py)
