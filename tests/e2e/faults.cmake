e2e_test(e2e_faults faults_test.py)
