e2e_test(e2e_cli cli_test.py)
e2e_test(e2e_hf_folder hf_folder_test.py $<TARGET_FILE:antiphon_tokenize>)
