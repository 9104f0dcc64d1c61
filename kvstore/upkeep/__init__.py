"""Looking after a bucket: what is damaged, what is where, what a retrained model leaves behind."""
