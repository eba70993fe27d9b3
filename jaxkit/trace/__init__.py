"""What any apply function does with its leaves, read off its jaxpr."""
