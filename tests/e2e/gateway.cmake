e2e_test(e2e_openai_client openai_client_test.py)
e2e_test(e2e_grpc_client grpc_client_test.py)
e2e_test(e2e_malformed malformed_test.py)
e2e_test(e2e_metrics metrics_test.py)
