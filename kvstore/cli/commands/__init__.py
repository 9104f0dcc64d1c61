"""What commands take, by what they are about. What they do is imported when they run."""
