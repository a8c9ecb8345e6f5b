"""What Eva costs, and what it gains: `python -m benchmarks.cost` and `python -m benchmarks.convergence`."""

import os

# LAPACK's threads spin while they wait, on the cores that the step's other threads need: they take longer for a small
# matrix than one thread alone. It reads this when it is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
