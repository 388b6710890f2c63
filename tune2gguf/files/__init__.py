"""Files: written whole or not at all, their digests, the cache folder; what is printed."""
