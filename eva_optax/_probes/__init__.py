"""The contract: Flax code writes probes, Optax code reads their gradients, and both know only what stands here.

A probe is a small dict of zeros at `<layer>/kronecker/<kernel>[,<bias>]` among the parameters. JAX alone is needed.
"""
