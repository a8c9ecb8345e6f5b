"""What both benchmarks need: results on disk, their tables, and timing in turn."""
