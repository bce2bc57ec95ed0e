"""Models treated alike, timed in turns, and what came of it: `bench`."""
