"""The mathematics of one layer: arrays in, arrays out. A new curvature is a new file here (see `curvature.py`)."""
