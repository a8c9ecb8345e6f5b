"""Whether taps form second moments: a flag that `tapping(factors=flag)` sets for what is traced inside."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax.numpy as jnp
import numpy as np
from jax import Array

Flag = bool | Array

_FORMED: ContextVar[Flag] = ContextVar("formed", default=True)


def forms_factors() -> Flag:
    """The flag; True outside of any context."""
    return _FORMED.get()


@contextmanager
def forming_factors(flag: Flag) -> Iterator[None]:
    """Sets the flag for what is traced inside."""
    token = _FORMED.set(flag)
    try:
        yield
    finally:
        _FORMED.reset(token)


def check_flag(flag: Flag) -> Flag:
    """A bool where the value is known as one, else a scalar array of one.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(flag, bool | np.bool_):
        return bool(flag)
    if jnp.shape(flag) != () or not jnp.issubdtype(jnp.result_type(flag), jnp.bool_):
        raise ValueError(
            'eva_optax.tapping: factors must be "input", "both", a bool, or a scalar array of one such as '
            f"step % 10 == 0, got {flag!r}."
        )
    return flag
