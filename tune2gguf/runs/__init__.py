"""The run folder: one writer and one reader for each of its files."""
