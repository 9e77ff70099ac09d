"""What `selortho` does, one file a command."""
