"""What a run will need in memory, whether this machine has it, and what to change where it has not."""
