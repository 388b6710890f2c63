"""A run: steps, validation, schedules, seeds, progress, record and resume."""
