"""A Llama in float64, one response at a time: the NLLs of its tokens and their derivative in what is learned."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def _token_nll(shape, params, adapter, scale, tokens):
    """A Llama in float64: NLL of each token [L] given those before it, 0 for the first."""
    L, C = len(tokens), shape.head_dim
    angles = np.arange(L)[:, None] * shape.rope_theta ** (-np.arange(C // 2) / (C // 2))

    def norm(x, weights):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + shape.norm_eps) * weights["scale"]

    def rotate(x):
        a, b = x[:, : C // 2], x[:, C // 2 :]
        return jnp.hstack([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])

    x = params["embed_tokens"][tokens]
    for n in range(shape.num_layers):

        def linear(x, module, name, n=n):
            low_rank = ((adapter or {}).get("layers", {}).get(module) or {}).get(name)
            update = 0 if low_rank is None else scale * (x @ low_rank["a"][n]) @ low_rank["b"][n]
            return x @ params["layers"][module][name]["kernel"][n] + update

        h = norm(x, jax.tree.map(lambda w, n=n: w[n], params["layers"]["input_layernorm"]))
        q, k, v = (linear(h, "self_attn", name).reshape(L, -1, C) for name in ("q_proj", "k_proj", "v_proj"))
        heads = []
        for head in range(shape.num_heads):
            kv = head * shape.num_kv_heads // shape.num_heads
            scores = jnp.where(np.tri(L, dtype=bool), rotate(q[:, head]) @ rotate(k[:, kv]).T / np.sqrt(C), -np.inf)
            heads.append(jax.nn.softmax(scores) @ v[:, kv])
        x = x + linear(jnp.hstack(heads), "self_attn", "o_proj")
        h = norm(x, jax.tree.map(lambda w, n=n: w[n], params["layers"]["post_attention_layernorm"]))
        x = x + linear(jax.nn.silu(linear(h, "mlp", "gate_proj")) * linear(h, "mlp", "up_proj"), "mlp", "down_proj")
    log_probs = jax.nn.log_softmax(norm(x, params["norm"]) @ params["embed_tokens"].T)
    return jnp.concatenate([jnp.zeros(1), -log_probs[np.arange(L - 1), tokens[1:]]])


@functools.partial(jax.jit, static_argnums=0)
def _pullback(shape, base, learned, scale, tokens_ExL, cotangent_ExL):
    """Token NLLs [E, L], and for each response the gradient of their product with a cotangent."""

    def nll(learned, tokens):
        is_full = "embed_tokens" in learned
        return _token_nll(shape, learned if is_full else base, None if is_full else learned, scale, tokens)

    def one(tokens, cotangent):
        values, pull = jax.vjp(lambda x: nll(x, tokens), learned)
        return values, pull(cotangent)[0]

    return jax.vmap(one)(tokens_ExL, cotangent_ExL)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(double(tree))])


class Model(NamedTuple):
    """What the NLLs of responses come from; `room` is the (E, L) to which they are padded, for one compilation."""

    shape: object  # `model_config.ModelConfig`
    base: dict
    scale: float
    room: tuple[int, int]

    def evaluate(self, learned, entries, weigh=None) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """NLLs of the learned tokens of each entry; their weights' sums [E]; ∇ of these sums in θ, weights fixed [E, P]."""
        tokens, ones = np.zeros(self.room, np.int32), np.zeros(self.room)
        for e, one in enumerate(entries):
            tokens[e, : len(one.tokens)] = one.tokens
            ones[e, one.learned] = 1.0
        with jax.enable_x64(True):
            learned, base = double(learned), double(self.base)
            nll, gradient = _pullback(self.shape, base, learned, float(self.scale), tokens, ones)
            token_nll = [np.asarray(nll)[e, one.learned] for e, one in enumerate(entries)]
            if weigh is not None:
                for e, one in enumerate(entries):
                    ones[e, one.learned] = weigh(one, token_nll[e])
                nll, gradient = _pullback(self.shape, base, learned, float(self.scale), tokens, ones)
            leaves = [np.asarray(leaf).reshape(self.room[0], -1) for leaf in jax.tree.leaves(gradient)]
        total = np.sum(np.asarray(nll) * ones, axis=1)[: len(entries)]
        return token_nll, total, np.hstack(leaves)[: len(entries)]
