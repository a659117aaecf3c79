"""Metagradients against reverse-mode differentiation of the whole run, every row by itself; and the operations they need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import config as configuration
from bilevel_jax import forward, losses, metagradient, search, selector, step, train_state
from bilevel_jax.data import packing
from bilevel_jax.data.packing import Layout, Segment
from bilevel_jax.errors import RunError
from bilevel_jax.models import attention, decoder, lora, model_config
from bilevel_jax.objective import Objective
from bilevel_jax.train_state import Scales

N, STEPS = 4, 2
LAYOUT = Layout(sequences=2, length=16, entries=6)
CONFIG = model_config.ModelConfig(
    "llama", vocab_size=24, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    rotary_dim=4, max_positions=32, norm_eps=1e-5, activation="silu", rope_theta=1e4, tie_embeddings=True, adapter_scale=2.0,
)  # fmt: skip
TWICE = dataclasses.replace(CONFIG, second_order=True)
OPTIMIZERS = {
    "sgd": optax.sgd(0.3, momentum=0.9),
    "adam": optax.adam(0.02, eps_root=1e-10),
    "adamw": optax.adamw(0.02, eps_root=1e-10),
}
WEIGHTS = np.array([0.5, 1.5, 0.2, 1.8], np.float32)


@functools.cache
def parameters():
    base = jax.jit(decoder.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    base = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), base)
    adapter = lora.init_adapter(CONFIG, jax.random.key(1), 2, lora.resolve_targets(CONFIG, "all-linear"))
    return base, adapter


@functools.cache
def rows():
    """Trusted rows, rows to weigh, and the row whose loss is differentiated."""
    rng = np.random.default_rng(0)

    def segment(prompt, response, **role):
        ids = rng.integers(1, CONFIG.vocab_size, prompt + response).astype(np.int32)
        return Segment(ids[:prompt], ids[prompt:], **role)

    upper = [segment(3, 4, share=0.5), segment(2, 6, share=0.5)]
    lower = [segment(3, 3 + i, row_index=i) for i in range(N)]
    return upper, lower, segment(4, 5)


def chosen(k):
    """The rows of the lower level in step k."""
    return [(2 * k + i) % N for i in range(3)]


def row_losses(adapter):
    """The losses of all rows, the trusted ones first, then those to weigh, then the last one; one row a sequence."""
    upper, lower, last = rows()
    members = [*upper, *lower, last]
    tokens, is_response = np.zeros((len(members), 16), np.int32), np.zeros((len(members), 16), bool)
    for r, row in enumerate(members):
        tokens[r, : row.size] = np.concatenate([row.prompt, row.response])
        is_response[r, len(row.prompt) : row.size] = True
    log_probs = jax.nn.log_softmax(decoder.logits(TWICE, parameters()[0], adapter, jnp.array(tokens[:, :-1])))
    nll = -jnp.take_along_axis(log_probs, jnp.array(tokens[:, 1:, None]), axis=2)[..., 0]
    return jnp.sum(jnp.where(is_response[:, 1:], nll, 0.0), axis=1) / is_response.sum(axis=1)


def scales(k):
    return Scales(jnp.float32(1.0), jnp.float32(0.5 + k))


def trained_loss(weights, optimizer):
    """The loss of the last row after training, written out."""
    adapter = parameters()[1]
    state = optimizer.init(adapter)
    for k in range(STEPS):
        share = np.bincount(chosen(k), minlength=N) / 3
        factors = jnp.concatenate([jnp.full(2, 0.5), scales(k).lower * share * weights, jnp.zeros(1)])
        gradient = jax.grad(lambda adapter, factors=factors: factors @ row_losses(adapter))(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return row_losses(adapter)[-1]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name != "adam" else []) for name in OPTIMIZERS])
def test_metagradient_is_the_derivative_of_the_whole_run(name):
    optimizer, (base, adapter), (upper, lower, last) = OPTIMIZERS[name], parameters(), rows()
    uniform = selector.Selector(rule="uniform")
    advance = jax.jit(step.make_step(CONFIG, Objective(cost="loss"), uniform, optimizer))
    state = train_state.init(adapter, optimizer, Objective(), uniform, N)
    state = state._replace(selector=state.selector._replace(logits=jnp.log(WEIGHTS)))  # their mean is 1
    past = []
    for k in range(STEPS):
        members = [*upper, *(lower[i]._replace(share=1 / 3) for i in chosen(k))]
        batch = packing.pack_step(members, N, 3, LAYOUT)
        past.append((state.policy, batch, scales(k)))
        state, _ = advance(base, state, batch, scales(k))
    packed = packing.pack([last], LAYOUT)
    final = jax.jit(metagradient.make_upper_gradient(CONFIG))(base, state.policy.adapter, packed, jnp.float32(1))
    replay = functools.partial(jax.jit(metagradient.make_replay(CONFIG, Objective(cost="loss"), optimizer)), base)
    gradient = metagradient.metagradient(replay, past, jnp.array(WEIGHTS), final, "test")
    expected = jax.jit(jax.grad(lambda w: trained_loss(w, optimizer)))(jnp.array(WEIGHTS))
    assert np.abs(expected).min() > 1e-6
    np.testing.assert_allclose(gradient, expected, rtol=5e-3, atol=2e-3 * np.abs(expected).max())


# --------------------------------------------------------------------------------------------------------------------
# Operations with derivatives of every order
# --------------------------------------------------------------------------------------------------------------------


def test_plain_attention_is_attention():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(2, 37, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    segments, c = jnp.array([[1] * 20 + [2] * 17, [1] * 37]), jnp.array(rng.normal(size=(2, 37, 4, 4)), jnp.float32)

    def value_and_gradients(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(c * attend(*qkv, segments)), argnums=(0, 1, 2)))(q, k, v)

    fast, plain = value_and_gradients(attention.attend), value_and_gradients(attention.attend_plain)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5), fast, plain)


@pytest.mark.slow
def test_plain_losses_are_the_losses_and_their_second_derivative_is_right():
    base, adapter = parameters()
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    packed = packing.pack([*rows()[0], *rows()[1][:3]], LAYOUT)

    def loss(config, adapter):
        return sum(forward.micro_nll(config, base, adapter, packed, m).sum() for m in range(2))

    fast, plain = (jax.jit(jax.value_and_grad(functools.partial(loss, config)))(adapter) for config in (CONFIG, TWICE))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), fast, plain)
    gradient = jax.jit(jax.grad(functools.partial(loss, CONFIG)))
    way = jax.tree.map(lambda x: jnp.full_like(x, 0.5), adapter)
    _, curvature = jax.jit(lambda a: jax.jvp(jax.grad(functools.partial(loss, TWICE)), (a,), (way,)))(adapter)
    ahead, behind = (gradient(jax.tree.map(lambda x, w, s=s: x + s * w, adapter, way)) for s in (2e-3, -2e-3))
    difference = jax.tree.map(lambda one, other: (one - other) / 4e-3, ahead, behind)
    size = float(optax.tree.norm(curvature))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, curvature, difference))) < 0.02 * size


def test_plain_losses_skip_what_is_no_target():
    rng = np.random.default_rng(0)
    hidden, head = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((300, 6), (11, 6)))
    index, target = jnp.arange(256), jnp.array(rng.integers(0, 11, 256))
    for number in (0, 1, 200, 256):
        plain, fast = (f(hidden, head, index, target, jnp.int32(number)) for f in (losses.token_nll_plain, losses.token_nll))
        np.testing.assert_allclose(plain, fast, rtol=1e-5, atol=1e-6)
        assert (np.asarray(plain)[number:] == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# The search
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, mean", [("dataset", 1.0), ("literal", 0.25)])
def test_differentiated_weights_are_those_of_a_step(scale, mean):
    config = configuration.Config(selection=configuration.Selection(rule="metagradient", weight_scale=scale))
    weights = search.row_weights(config, np.array([0.0, 1.0, -1.0, 0.5], np.float32))
    exponentials = np.exp([0.0, 1.0, -1.0, 0.5])
    np.testing.assert_allclose(weights, 4 * mean * exponentials / exponentials.sum(), rtol=1e-6)


@pytest.mark.parametrize("number", [6, 7, 100])
def test_trusted_rows_are_split_into_three(number):
    parts = search.split_trusted(number, seed=0)
    assert [len(part) > 0 for part in parts] == [True] * 3
    assert sorted(np.concatenate(parts)) == list(range(number))


def test_weights_of_a_run_that_diverged_are_not_taken():
    """NumPy takes NaN for the smallest loss."""
    assert [search._comparable(2.5, 0), search._comparable(float("nan"), 1), search._comparable(float("inf"), 2)] == [
        2.5,
        float("inf"),
        float("inf"),
    ]
    with pytest.raises(RunError, match="^selection.rule=metagradient: the loss of the trusted rows is nan with equal weights; low"):
        search._comparable(float("nan"), 0)


def test_search_of_other_rows_is_not_continued(tmp_path, capsys):
    file = tmp_path / search.FILE
    search._write(file, "rows model", [np.ones(3)], [2.0, 1.0])
    gradients, measured = search._read(file, "rows model")
    assert np.array_equal(gradients, [np.ones(3)]) and measured == [2.0, 1.0]
    assert search._read(file, "others model") == ([], [])
    assert "metagradient.npz is of other rows, another model or other settings, so" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x", None], ids=["empty", "a broken archive", "a text", "an array"])
def test_a_damaged_search_is_refused(tmp_path, content):
    file = tmp_path / search.FILE
    if content is None:
        with open(file, "wb") as opened:
            np.save(opened, np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises(RunError, match="not the state of a search .*remove it, and the search begins again$"):
        search._read(file, "rows model")
