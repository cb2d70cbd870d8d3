"""What a run will need, before it is run: memory, traffic and time."""
