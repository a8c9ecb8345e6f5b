"""At which axis `nnx.vmap` stacked a layer that is tapped afterwards, from the shapes of its parameters."""

import itertools

from eva_optax._probes.probe import Shape


def stacked_axes(layer: str, own: Shape, full: Shape, beside: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a kernel of shape `full` that were stacked upon its `own` shape, and those of what stands beside it.

    Leading ones where the kernel's own shape is open, or may be: `nnx.vmap` stacks there unless it is told otherwise.

    Args:
      layer: the name of the layer's class.
      own: the shape of the kernel of one layer.
      full: the shape of the stacked kernel.
      beside: the shape of the stacked bias; the kernel's without one.

    Raises:
      ValueError: if it may be one of several axes, none of them the first.
    """
    count = len(full) - len(own)
    leading = tuple(range(count))
    found = []
    for axes in itertools.combinations(range(len(full)), count):
        if tuple(size for axis, size in enumerate(full) if axis not in axes) != tuple(own):
            continue
        for shift in dict.fromkeys((0, len(beside) - len(full))):  # the same axis, counted from the front or the end
            places = tuple(axis + shift for axis in axes)
            in_range = all(0 <= place < len(beside) for place in places)
            if in_range and [beside[place] for place in places] == [full[axis] for axis in axes]:
                found.append((axes, places))
    if not found or (leading, leading) in found:
        return leading, leading
    if len(found) > 1:
        raise ValueError(
            f"eva_optax.tap: the shapes of a stacked {layer} do not tell its layers from its features: the kernel has "
            f"shape {full}, one layer's is {tuple(own)}. Tap it inside nnx.vmap, where it is made: "
            "nnx.vmap(lambda rngs: eva_optax.tap(Model(rngs)), ...)."
        )
    return found[0]
