"""Copies between engine pages and host memory: see `kvstore.kernels.contract`."""
