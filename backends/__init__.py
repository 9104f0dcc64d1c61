"""Object stores behind one contract: see `kvstore.backends.contract`."""
