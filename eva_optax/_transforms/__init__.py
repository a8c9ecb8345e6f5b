"""Optax: gradient transformations that read the gradients of probes."""
