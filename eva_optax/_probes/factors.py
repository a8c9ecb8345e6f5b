"""Kronecker factors in the gradients of probes, as a user sees them."""

from typing import Any, NamedTuple

from jax import Array

from eva_optax._probes.layers import take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import Shape, is_probe
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.statistics import DIAGONAL, INPUTS, OUTPUTS
from eva_optax._probes.vectors import Numbers, read_counters, read_layer


class Factors(NamedTuple):
    """The Kronecker factors of one layer's curvature.

    Attributes:
      A: the second moment of the inputs, (*batch, n, n); for an embedding its diagonal, (n,). None where the tap does
        not collect it: more inputs than `max_dim`.
      B: that of the cotangents of its outputs, (*batch, m, m); None where the tap does not collect it.
    """

    A: Array | None
    B: Array | None


Factors.__module__ = "eva_optax"


def factors(grads: Any) -> dict[str, Factors]:
    r"""The Kronecker factors in a tree of gradients, by layer path.

    .. math::
      A = \frac{1}{NP} \sum_{n,p} x_{np} x_{np}^\top, \qquad
      B = N \sum_{n,p} \frac{\partial L}{\partial y_{np}} \frac{\partial L}{\partial y_{np}}^\top

    and with `sharing="reduce"` the same of each sample's mean input and summed cotangent.

    Args:
      grads: gradients of the parameters of a model tapped with `tap(model, factors="both")`, at any nesting depth.

    Returns:
      A dict from layer path to `Factors`, float32 (float64 beside float64 parameters). The kernel's batch axes
      (experts, heads, groups) come first, inputs and outputs are flat in the kernel's order, a bias's input 1 is not
      among them.
      N is the number of samples, the first axis of the layer's input, P that of positions; for a convolution rows are
      patches. Where L is a mean over samples, B is the second moment of their cotangents, each of its own loss. Of
      gradients that are c times those of L, B is c² times that, however they came by c. A step that formed no
      factors (`tapping(factors=False)`) has zeros, as a layer that the loss did not use.

    Raises:
      ValueError: if `grads` holds no factors, or what they hold is no longer a gradient (known only outside of `jit`).

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015;
    convolutions: Grosse and Martens, ICML 2016; expand and reduce: Eschenhagen et al., NeurIPS 2023.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="both"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum(-1).mean())(params)
      >>> found = eva_optax.factors(grads)[""]
      >>> found.A.shape, found.B
      ((3, 3), Array([[1., 1.],
             [1., 1.]], dtype=float32))
    """
    tree = take_apart(grads)
    found = {
        layer.name: read_layer(_of_layer, layer, tree.leaves)
        for layer in tree.layers
        if any(name in layer.shapes for name in (INPUTS, OUTPUTS, DIAGONAL))
    }
    if not found:
        raise ValueError(
            "eva_optax.factors: no factors in the tree. Give it the gradients of the parameters of a model that is "
            'tapped for them: model = eva_optax.tap(model, factors="both"), then model.init or eva_optax.attach.'
        )
    return found


def _of_layer(layout: Layout, leaves: dict[str, Array], numbers: Numbers) -> Factors:
    scales = read_counters(numbers, {}, ())
    a = b = None
    if DIAGONAL in leaves:
        a = (leaves[DIAGONAL] * scales.moment).ravel()
    if INPUTS in leaves:
        a = _matrices(SketchAxes.of(layout), leaves[INPUTS], layout, layout.a, scales.moment)
    if OUTPUTS in leaves:
        b = _matrices(SketchAxes.of_outputs(layout), leaves[OUTPUTS], layout, layout.b, scales.square)
    return Factors(a, b)


def _matrices(axes: SketchAxes, leaf: Array, layout: Layout, vector: Shape, scale: Array) -> Array:
    split = leaf.reshape(1, *layout.split_shape(leaf.shape[1:])) * scale
    matrices = axes.to_matrices(axes.unfold(split, layout.split_shape(vector)))
    return matrices.reshape(*axes.sizes(axes.batch), *matrices.shape[1:])


def merge_factors(grads: Any, sampled: Any) -> Any:
    r"""The gradients of a loss with the probes of another gradient of the same parameters.

    .. math::  B = \mathbb{E}_{\hat y \sim p(y | x)} \bigl[ N \sum_{n,p} g_{np} g_{np}^\top \bigr]

    K-FAC's own Fisher matrix is that of labels sampled from the model's predictions; the labels of the data give the
    empirical one. So differentiate the loss of sampled labels too, and give the update kernels of the one and probes of
    the other.

    Args:
      grads: gradients of the parameters of a tapped model.
      sampled: gradients of the same parameters, of the loss at sampled labels.

    Returns:
      `grads`, with the probes of `sampled`.

    Raises:
      ValueError: if the two are not gradients of the same parameters, or there are no probes.

    Source: Martens and Grosse, ICML 2015, section 5 (targets from the model's distribution).

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x, y = eva_optax.tap(nn.Dense(3), factors="both"), jnp.ones((4, 2)), jnp.array([0, 1, 2, 0])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def loss(params, y):
      ...   logits = model.apply({"params": params}, x)
      ...   return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits
      >>> grads, logits = jax.grad(loss, has_aux=True)(params, y)
      >>> sampled, _ = jax.grad(loss, has_aux=True)(params, jax.random.categorical(jax.random.key(1), logits))
      >>> grads = eva_optax.merge_factors(grads, sampled)
    """
    own, theirs = take_apart(grads), take_apart(sampled)
    if own.structure != theirs.structure or not any(map(is_probe, own.paths)):
        raise ValueError(
            "eva_optax.merge_factors: grads and sampled must be gradients of the same parameters of a tapped model, "
            f"got {own.structure} and {theirs.structure}."
        )
    pairs = zip(own.items(), theirs.leaves, strict=True)
    return own.rebuild(other if is_probe(path) else leaf for (path, leaf), other in pairs)
