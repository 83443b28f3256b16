e2e_test(e2e_gpu gpu_test.py)
set_tests_properties(e2e_gpu PROPERTIES LABELS gpu)
