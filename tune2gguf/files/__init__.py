"""Files: atomic writes, digests, JSON records, the cache folder; program output."""
