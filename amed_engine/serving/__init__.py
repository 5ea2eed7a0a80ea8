"""Many requests at once: rows of any programs, one evaluation a tick."""
