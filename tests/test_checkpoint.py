"""What comes back from disk is what was saved, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax import checkpoint, online, selector, step

COUNTERS = {"data": "abc", "seconds": {"train": 1.5}, "at_start": {"eval/upper_loss": 1 / 3}}


def make_state(rule_optimizer="adam", tracked=True, seed=0):
    """A state with a number of its own in every place; the running baseline is NaN, as before the first batch."""
    adapter = {"layers": {"mlp": {"up": {"a": jnp.zeros((2, 5, 3)), "b": jnp.zeros((2, 3, 4))}}}}
    state = step.init(adapter, optax.adam(1e-3), selector.Selector(optimizer=rule_optimizer), 7, tracked)
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(state)
    drawn = [jnp.asarray(100 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    state = tree.unflatten(drawn)
    return state._replace(selector=state.selector._replace(baseline=jnp.float32(jnp.nan)))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)  # takes NaN for NaN


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("optimizer", selector.OPTIMIZERS)
def test_round_trip(tmp_path, optimizer, tracked):
    state = make_state(optimizer, tracked)
    first = checkpoint.Checkpoints(tmp_path, keep=1)
    first.save(5, state, online.nothing_yet(7), COUNTERS)
    first.close()

    second = checkpoint.Checkpoints(tmp_path, keep=1)
    assert second.latest() == 5 and second.counters(5) == COUNTERS
    assert_same(second.restore(5, jax.tree.map(jnp.zeros_like, state))[0], state)
    second.close()


def make_responses(number):
    """What a refresh may leave: responses of unequal length, some of them used; or none at all."""
    rng = np.random.default_rng(number)
    return online.Own(
        step=30,
        masked=np.array([True, False, True, True, False, False, True]),
        row=np.arange(number, dtype=np.int64),
        sample=np.arange(number, dtype=np.int64) % 2,
        tokens=[rng.integers(0, 2**31 - 1, 1 + i, dtype=np.int32) for i in range(number)],
        log_prob=-100 * rng.random(number),
        log_ratio=np.where(np.arange(number) % 3 == 1, np.nan, rng.normal(size=number)),
    )


@pytest.mark.parametrize("number", [0, 1, 5])
def test_responses_come_back(tmp_path, number):
    """A refresh whose responses were all empty is one too: its mask counts."""
    own = make_responses(number)
    first = checkpoint.Checkpoints(tmp_path, keep=1)
    first.save(31, make_state(), own, COUNTERS)
    kept = own.log_ratio.copy()
    own.log_ratio[:] = 7.0  # goes on being noted while the checkpoint is written
    first.close()
    second = checkpoint.Checkpoints(tmp_path, keep=1)
    _, found = second.restore(31, make_state())
    second.close()
    assert found.step == 30 and len(found.tokens) == number
    for name, expected in (("masked", own.masked), ("row", own.row), ("sample", own.sample), ("log_ratio", kept)):
        np.testing.assert_array_equal(getattr(found, name), expected)
        assert getattr(found, name).dtype == expected.dtype
    np.testing.assert_array_equal(found.log_prob, own.log_prob)
    assert found.log_prob.dtype == np.float64
    for one, other in zip(found.tokens, own.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int32
    assert found.by_row == {i: [i] for i in range(number)}
    found.log_ratio[:] = 1.0  # goes on being noted


def test_counters_after_saving(tmp_path):
    """They too may change while the checkpoint is still being written."""
    counters = {"data": "abc", "refreshed": {"online/responses": 3.0}}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, make_state(), online.nothing_yet(7), counters)
    counters["refreshed"]["online/responses"] = 4.0
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=1)
    assert again.counters(3) == {"data": "abc", "refreshed": {"online/responses": 3.0}}
    again.close()


def test_nothing_saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "absent", keep=1)
    assert checkpoints.latest() is None
    checkpoints.close()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_remain(tmp_path, keep):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep)
    steps = [2, 4, 5, 10, 100]
    for k in steps:
        checkpoints.save(k, make_state(seed=k), online.nothing_yet(7), COUNTERS)
    checkpoints.close()
    assert sorted(int(file.name) for file in tmp_path.iterdir()) == steps[-keep:]
    again = checkpoint.Checkpoints(tmp_path, keep)
    assert again.latest() == 100
    assert_same(again.restore(100, make_state())[0], make_state(seed=100))
    again.close()


def test_donation_after_saving(tmp_path):
    """The arrays may be overwritten as soon as `save` returns, while the checkpoint is still being written."""
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpoints, x = checkpoint.Checkpoints(tmp_path, keep=3), jnp.zeros(4_000_000)
    for k in range(3):
        checkpoints.save(k, {"x": x}, online.nothing_yet(7), {})
        x = add_one(x)
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=3)
    for k in range(3):
        assert (np.asarray(again.restore(k, {"x": x})[0]["x"]) == k).all()
    again.close()


def test_a_step_is_written_once(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, make_state(seed=1), online.nothing_yet(7), COUNTERS)
    checkpoints.save(3, make_state(seed=2), online.nothing_yet(7), COUNTERS)
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert_same(again.restore(3, make_state())[0], make_state(seed=1))
    again.close()


@pytest.mark.parametrize(
    "ids, same",
    [(["ab", "c"], True), (["c", "ab"], False), (["a", "bc"], False), (["ab"], False), (["ab", "c", "c"], False)],
)
def test_fingerprint(ids, same):
    assert (checkpoint.fingerprint(ids) == checkpoint.fingerprint(iter(["ab", "c"]))) == same
