"""Programs to run, one by one, and what they train."""
