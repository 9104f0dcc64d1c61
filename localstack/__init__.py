"""S3 servers on one machine, for the demo, the tests and the benchmarks."""
