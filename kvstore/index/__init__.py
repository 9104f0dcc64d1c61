"""What a bucket holds, written down: a log of what is stored and used, and sorted snapshots of it all."""
