"""Weights of the tokens within a response, a softmax of a score whose two parameters are shared (`selection.unit=token`).

Row i has the weight w_i = N·σ_i(ω), and each of the T_i tokens of its response (of a conversation: all answers) has a weight with
mean 1:

    v_t = T_i · softmax_t(ψ·z_t)                                                            (T1)
    ℓ_i = mean_t [ v_t ℓ_t ]                                                                (T2)
    z_t = (ℓ_t, max_{s<t} ℓ_s)                                                              (T3)

so that σ_i(ω) · v_t/T_i is a distribution over all tokens of the lower level. A separate logit per token would be updated once per
epoch; ψ has two entries and learns from every token. The scores (T3) use the losses of θ, in nats. The softmax only compares tokens
of one response. The first score compares a token's loss with theirs. The second detects an error before t: the tokens after it
continue a wrong prefix, so they may have a small loss but are not good.

θ has no gradient through v. ψ descends the same penalty as ω in (10b):

    dψ = γ · mean_b [ w_b · dℓ_b/dψ ]                                                       (T4)
    dℓ_b/dψ = mean_t [ v_t (z_t - mean_s [v_s z_s]) ℓ_t ]    at θ^{k+1}                     (T5)

Axes: P targets of a micro-batch, E entries (responses).
"""

import jax
import jax.numpy as jnp

SCORES = ("own", "before")  # the two entries of z_t


def largest_before(nll_P, entry_P) -> jax.Array:
    """The largest loss among the earlier tokens of the same response, [P]; 0 for its first token."""
    first_P = jnp.concatenate([jnp.array([True]), entry_P[1:] != entry_P[:-1]])
    previous_P = jnp.where(first_P, 0.0, jnp.roll(nll_P, 1))

    def join(left, right):
        (a, _), (b, starts) = left, right
        return jnp.where(starts, b, jnp.maximum(a, b)), left[1] | starts

    return jax.lax.associative_scan(join, (previous_P, first_P))[0]


def weights(psi_2, nll_P, entry_P, weighed_E) -> jax.Array:
    """v of each token (T1), [P]. No gradient flows into `nll_P`.

    Args:
      psi_2: ψ, per nat; 0 gives all tokens weight 1.
      nll_P: losses of the tokens, in nats; tokens of one response are consecutive and in order.
      entry_P: int32, the response of each token; E or more for padding.
      weighed_E: bool, the responses to which the weights apply; tokens of other responses have weight 1.
    """
    E = weighed_E.shape[0]
    nll_P = jax.lax.stop_gradient(nll_P)
    logit_P = jnp.stack([nll_P, largest_before(nll_P, entry_P)], axis=-1) @ psi_2

    def gather(values_E):
        return values_E.at[entry_P].get(mode="fill", fill_value=1)

    highest_E = jax.lax.stop_gradient(jax.ops.segment_max(logit_P, entry_P, num_segments=E))
    share_P = jnp.exp(logit_P - gather(highest_E))
    total_E, number_E = (jax.ops.segment_sum(part, entry_P, num_segments=E) for part in (share_P, jnp.ones_like(share_P)))
    weight_P = gather(number_E) * share_P / gather(total_E)
    return jnp.where(gather(weighed_E), weight_P, 1.0)
