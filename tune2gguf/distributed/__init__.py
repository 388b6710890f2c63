"""Processes of one run: world, parallel modes, signals, failures."""
