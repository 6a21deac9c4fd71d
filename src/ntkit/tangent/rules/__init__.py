"""Rules: how the per-example gradient of a parameter follows from one use of it, per family of operation."""
