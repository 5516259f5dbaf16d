"""lm-eval tasks on a network: suites, loading, requests in batches, the adapter, results. `harness` is the way in."""
