"""Parts of the benchmark of federated training."""
