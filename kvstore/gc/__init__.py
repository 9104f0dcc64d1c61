"""Garbage collection of a bucket: what may go, in which order, and taking it away among live engines."""
