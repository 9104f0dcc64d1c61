"""The `kvstore` command: what an operator looks with. Imports no tensor library."""
