"""Codecs behind one contract: see `kvstore.codecs.contract` and `kvstore.codecs.registry`."""
