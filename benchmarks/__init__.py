"""What Eva costs, and what it gains: `python -m benchmarks.cost` and `python -m benchmarks.convergence`."""
