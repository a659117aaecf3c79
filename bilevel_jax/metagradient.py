"""Exact metagradients: the derivative of the trusted loss after training in the weight of every training row.

Training with fixed weights w is θ^{k+1}, s^{k+1} = U(θ^k, s^k, g^k), with s the state of the optimizer and

    g^k = ∇_θ [ a L0(θ^k) + γ · mean_b w_{i_b} ℓ_b(θ^k) ]                                                       (7), (10a)

With the adjoints θ̄ = dL0(θ^T)/dθ^{k+1} and s̄, reverse-mode differentiation of one step is

    (θ̄', s̄', c) = (θ̄, s̄) ∂U/∂(θ, s, g),    θ̄' += H c,    dL0/dw_i += γ · mean_b [i_b = i] ⟨∇ℓ_b(θ^k), c⟩          (M1)

H, the Hessian of the step's loss, and all the products ⟨∇ℓ_b, c⟩ come from one forward-mode derivative of the gradient along c
(Pearlmutter 1994), so no gradient of a single row is formed. The states of all steps are kept on the host: 12 bytes a parameter of
the adapter and step with Adam.

Source: Engstrom et al., "Optimizing ML training with metagradient descent", 2025, and Maclaurin et al. 2015.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax import forward, progress, scoring
from bilevel_jax.data import packing
from bilevel_jax.models import model_config
from bilevel_jax.objective import Objective, entry_losses, lower_losses
from bilevel_jax.shares import level_shares
from bilevel_jax.train_state import Learner, Scales


def _floats(tree) -> tuple[list, Callable]:
    """The float leaves of a tree, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    indices = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]

    def put(floats):
        new = list(leaves)
        for i, leaf in zip(indices, floats):
            new[i] = leaf
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in indices], put


def make_replay(model: model_config.ModelConfig, objective: Objective, optimizer: optax.GradientTransformation) -> Callable:
    """Builds `replay(base, learner, weight_N, batch, scales, adjoint) -> (adjoint, gradient_N)`, equation (M1), for one step.

    `learner` is that before the step. `adjoint` lists the derivatives of L0(θ^T) in the float leaves of the learner after it, the
    result those before it. `gradient_N` is the step's part of dL0/dw.
    """
    twice = dataclasses.replace(model, second_order=True)

    def step_gradient(base, adapter, weight_N, batch: packing.Batch, scales: Scales, tangent=None):
        """The gradient of the step's loss; with a `tangent` c, H c and ⟨∇ℓ_e, c⟩ [E]."""
        E = batch.share.shape[0]
        upper_E, lower_E = level_shares(batch, weight_N.shape[0])
        weight_E = weight_N.at[batch.row_index].get(mode="fill", fill_value=0.0)

        def loss(adapter, m):
            nll_E = forward.micro_nll(model if tangent is None else twice, base, adapter, batch.packed, m)
            upper = jnp.sum(upper_E * entry_losses(objective.upper, objective, batch, nll_E, m))
            loss_E = lower_losses(objective, batch, nll_E, m)  # 0 for entries of other micro-batches
            return scales.upper * upper + scales.lower * jnp.sum(lower_E * weight_E * loss_E), loss_E

        def body(m, carry):
            def gradient(adapter):
                return jax.grad(loss, has_aux=True)(adapter, m)

            part = gradient(adapter) if tangent is None else jax.jvp(gradient, (adapter,), (tangent,))[1]
            return jax.tree.map(jnp.add, carry, part)

        start = jax.tree.map(jnp.zeros_like, adapter), jnp.zeros(E, jnp.float32)
        total, loss_E = jax.lax.fori_loop(0, batch.packed.num_micro, body, start)
        return total, lower_E * scales.lower * loss_E

    def replay(base, learner: Learner, weight_N, batch: packing.Batch, scales: Scales, adjoint):
        gradient, _ = step_gradient(base, learner.adapter, weight_N, batch, scales)
        before, put = _floats(learner)

        def update(before, gradient):
            adapter, state = put(before)
            updates, state = optimizer.update(gradient, state, adapter)
            return _floats(Learner(optax.apply_updates(adapter, updates), state))[0]

        _, pull_back = jax.vjp(update, before, gradient)
        adjoint, c = pull_back(adjoint)
        hessian_c, change_E = step_gradient(base, learner.adapter, weight_N, batch, scales, tangent=c)
        earlier = put(adjoint)
        earlier = earlier._replace(adapter=jax.tree.map(jnp.add, earlier.adapter, hessian_c))
        gradient_N = jnp.zeros_like(weight_N).at[batch.row_index].add(change_E, mode="drop")
        return _floats(earlier)[0], gradient_N

    return replay


def make_upper_gradient(model: model_config.ModelConfig) -> Callable:
    """Builds `(base, adapter, packed, number) -> gradient` of Σ ℓ / `number` over the entries of a packed batch."""

    def loss(adapter, base, packed: packing.Packed, m, number):
        return jnp.sum(forward.micro_nll(model, base, adapter, packed, m) / jnp.maximum(packed.length, 1)) / number

    def gradient(base, adapter, packed: packing.Packed, number):
        def body(m, total):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(adapter, base, packed, m, number))

        return jax.lax.fori_loop(0, packed.num_micro, body, jax.tree.map(jnp.zeros_like, adapter))

    return gradient


def mean_gradient(upper_gradient: Callable, base, adapter, segments, micro_size: int, max_length: int, mesh):
    """∇ of the mean ℓ of any number of segments.

    Args:
      upper_gradient: compiled, from `make_upper_gradient`.
      micro_size, max_length: shape of a micro-batch.
    """
    total = jax.tree.map(jnp.zeros_like, adapter)
    for _, packed in scoring.batches(segments, micro_size, max_length, mesh, "∇L0"):
        with jax.set_mesh(mesh):
            total = jax.tree.map(jnp.add, total, upper_gradient(base, adapter, packed, jnp.float32(len(segments))))
    return total


def metagradient(
    replay: Callable, past: Sequence[tuple[Learner, packing.Batch, Scales]], weight_N, final, description: str
) -> np.ndarray:
    """dL0(θ^T)/dw [N], float64, by (M1) from the last step to the first.

    Args:
      replay: compiled, from `make_replay`, with the base as its first argument already given.
      past: of each step, the learner before it, its batch and its scales; what is not on the devices is sent when it is used.
      weight_N: w.
      final: ∇L0(θ^T).
      description: of the progress bar.
    """
    zeros = jax.tree.map(jnp.zeros_like, past[-1][0])
    adjoint = _floats(zeros._replace(adapter=final))[0]
    total = np.zeros(len(weight_N))
    for learner, batch, scales in progress.bar(past[::-1], desc=description, unit="step"):
        adjoint, part_N = replay(learner, weight_N, batch, scales, adjoint)
        total += np.asarray(part_N, np.float64)
    return total
