"""Whether what lies in a bucket, and on a node's disk, is whole and of use; and setting aside what is not."""
