"""The folder of a run: each of its files has its writer and its reader here."""
