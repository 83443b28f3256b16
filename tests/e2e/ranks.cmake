e2e_test(e2e_ranks ranks_test.py)
e2e_test(e2e_shared_image shared_image_test.py)
