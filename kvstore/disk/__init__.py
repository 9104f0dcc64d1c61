"""The disk tier: chunks in stored form as files on a local disk."""
