"""Weights of the tokens within a response, from a score whose parameters all tokens share (`selection.unit=token`).

Beside its own weight w_i = N·σ_i(ω), row i has one for each of the T_i tokens of its response, with mean 1:

    v_t = T_i · softmax_t(φ·z_t),    ℓ_i = mean_t [ v_t ℓ_t ],

so that σ_i(ω) · v_t/T_i is a distribution over all tokens of the lower level. One logit for each of them would be visited as often
as there are epochs; φ has two entries, and learns from every token. Its score z_t is of the losses that θ has at hand, in nats:

    z_t = (ℓ_t, max_{s<t} ℓ_s).

The first says by how much a token's loss exceeds that of others in its response, for the softmax sees differences alone. The second
says whether the response has gone astray before t: what follows there continues from what is bad, easy to predict and no better for
it. θ gets no gradient through v. φ moves against the gradient of the same penalty as ω does, (10b), which vanishes as v leaves what
is surprising:

    dφ = γ · mean_b [ w_b · dℓ_b/dφ ],    dℓ_b/dφ = mean_t [ v_t (z_t - mean_s [v_s z_s]) ℓ_t ]    at θ^{k+1}.
"""

import jax
import jax.numpy as jnp

SCORES = ("own", "before")  # what φ weighs


def largest_before(nll_P, entry_P) -> jax.Array:
    """The largest loss of earlier tokens of the same response, [P]; 0 at its first."""
    first_P = jnp.concatenate([jnp.array([True]), entry_P[1:] != entry_P[:-1]])
    previous_P = jnp.where(first_P, 0.0, jnp.roll(nll_P, 1))

    def join(left, right):
        (a, _), (b, starts) = left, right
        return jnp.where(starts, b, jnp.maximum(a, b)), left[1] | starts

    return jax.lax.associative_scan(join, (previous_P, first_P))[0]


def weights(phi_2, nll_P, entry_P, weighed_E) -> jax.Array:
    """v of each token, [P]. No gradient flows into `nll_P`.

    Args:
      phi_2: φ, per nat; 0 where all tokens weigh the same.
      nll_P: the tokens' losses, in nats; those of one response side by side, in their order.
      entry_P: int32, the response that each belongs to; E or more for padding.
      weighed_E: bool, the responses to whose tokens this applies; tokens of others have weight 1.
    """
    E = weighed_E.shape[0]
    nll_P = jax.lax.stop_gradient(nll_P)
    logit_P = jnp.stack([nll_P, largest_before(nll_P, entry_P)], axis=-1) @ phi_2

    def of_its_response(values_E):
        return values_E.at[entry_P].get(mode="fill", fill_value=1)

    top_E = jax.lax.stop_gradient(jax.ops.segment_max(logit_P, entry_P, num_segments=E))
    share_P = jnp.exp(logit_P - of_its_response(top_E))
    total_E, number_E = (jax.ops.segment_sum(part, entry_P, num_segments=E) for part in (share_P, jnp.ones_like(share_P)))
    weight_P = of_its_response(number_E) * share_P / of_its_response(total_E)
    return jnp.where(of_its_response(weighed_E), weight_P, 1.0)
