"""Benchmarks: each prints text for people to standard error and one JSON object to standard output."""
