"""What survives a crash: the store and the lineage of checkpoints; imports the foundation and torch, no other room."""
