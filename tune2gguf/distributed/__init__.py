"""The processes of a run: world, parallel modes, signals, failures."""
