"""Matrix memories written by addition: linear attention and its relatives."""
