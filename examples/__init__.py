"""Programs that show kvstore at work."""
