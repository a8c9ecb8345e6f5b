"""Data as it lies on disk. Nothing is downloaded; what is missing or broken is named in one line."""
