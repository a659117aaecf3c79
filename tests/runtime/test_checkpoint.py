"""What comes back from disk is what was saved, to the bit."""

import errno
import os
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from bilevel_jax import errors, online, selector, step
from bilevel_jax.data import templates
from bilevel_jax.runtime import checkpoint

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
    first.save(5, state, online.empty(7), COUNTERS)
    first.close()

    second = checkpoint.Checkpoints(tmp_path, keep=1)
    assert second.latest() == 5 and second.counters(5) == COUNTERS
    assert_same(second.restore(5, jax.tree.map(jnp.zeros_like, state))[0], state)
    second.close()


def make_responses(number):
    """What a refresh may leave: responses of unequal length, some of them used; or none at all."""
    rng = np.random.default_rng(number)
    return online.ResponseStore(
        step=30,
        masked=np.array([True, False, True, True, False, False, True]),
        row_index=np.arange(number, dtype=np.int64),
        sample_index=np.arange(number, dtype=np.int64) % 2,
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
    for name, expected in (("masked", own.masked), ("row", own.row_index), ("sample", own.sample_index), ("log_ratio", kept)):
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
    checkpoints.save(3, make_state(), online.empty(7), counters)
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
        checkpoints.save(k, make_state(seed=k), online.empty(7), COUNTERS)
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
        checkpoints.save(k, {"x": x}, online.empty(7), {})
        x = add_one(x)
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=3)
    for k in range(3):
        assert (np.asarray(again.restore(k, {"x": x})[0]["x"]) == k).all()
    again.close()


def test_a_step_is_written_once(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, make_state(seed=1), online.empty(7), COUNTERS)
    checkpoints.save(3, make_state(seed=2), online.empty(7), COUNTERS)
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert_same(again.restore(3, make_state())[0], make_state(seed=1))
    again.close()


def test_a_model_is_known_by_its_weights_and_tokens():
    """Two values exchanged, the smallest change of one, another dtype, another token; not where the weights live."""
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, jnp.bfloat16)}
    examples = [templates.Example(np.array([1, 2], np.int32), np.array([3], np.int32), None)]

    def known(changes=(), examples=examples):
        return checkpoint.fingerprint_model(jax.tree.map(jnp.asarray, weights | dict(changes)), examples)

    swapped, moved = weights["a"][:, [1, 0, 2]], weights["a"].copy()
    moved[1, 1] = np.nextafter(moved[1, 1], 9, dtype=np.float32)
    others = [{"a": swapped}, {"a": moved}, {"a": weights["a"].astype(jnp.bfloat16)}, {"b": -weights["b"]}, {"a": weights["a"].T}]
    tokens = [templates.Example(np.array([1, 2], np.int32), np.array([4], np.int32), None)]
    shifted = [templates.Example(np.array([1], np.int32), np.array([2, 3], np.int32), None)]
    found = [known(), *map(known, others), known(examples=tokens), known(examples=shifted), known(examples=[])]
    assert len(set(found)) == len(found) and known() == found[0]


@pytest.mark.parametrize(
    "ids, same",
    [(["ab", "c"], True), (["c", "ab"], False), (["a", "bc"], False), (["ab"], False), (["ab", "c", "c"], False)],
)
def test_fingerprint(ids, same):
    assert (checkpoint.fingerprint(ids) == checkpoint.fingerprint(iter(["ab", "c"]))) == same


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Directory with checkpoints of the steps 4 and 6."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = checkpoint.Checkpoints(directory, keep=2)
    for k in (4, 6):
        checkpoints.save(k, make_state(seed=k), make_responses(2), COUNTERS | {"step": k})
    checkpoints.close()
    return directory


def files_of(directory):
    return sorted(file for file in directory.rglob("*") if file.is_file())


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << place % 8
    file.write_bytes(bytes(content))


def test_damage_is_told(two, tmp_path):
    """Every file, cut short, with a bit flipped, and gone; Orbax's mark of success, which says nothing more, alone may go."""
    whole = two / "6"
    assert checkpoint.damage(whole) == ""
    copy = shutil.copytree(whole, tmp_path / "6")
    for file in files_of(copy):
        content, name = file.read_bytes(), file.relative_to(copy).as_posix()
        if file.name == "commit_success.txt":
            continue
        file.write_bytes(content[: len(content) // 2])
        assert name in checkpoint.damage(copy), name
        file.write_bytes(content)
        time = re.search(rb'"commit_timestamp_nsecs": (\d+)', content)  # of Orbax's own, added last
        ours = [place for place in range(len(content)) if not time or not time.start(1) <= place < time.end(1)]
        for place in np.random.default_rng(0).choice(ours, 5):
            flip(file, place)
            assert checkpoint.damage(copy), (name, place)
            file.write_bytes(content)
        file.unlink()
        assert checkpoint.damage(copy) == f"{name} is missing"
        file.write_bytes(content)
    assert checkpoint.damage(copy) == ""
    assert checkpoint.damage(tmp_path / "absent") == f"{checkpoint.MANIFEST} is missing"


def spoil_largest(directory):
    flip(max(files_of(directory), key=lambda file: file.stat().st_size), 100)


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("spoil", [spoil_largest, empty])
def test_the_one_before_a_damaged_one_is_used(two, tmp_path, capsys, spoil, keep):
    """The damaged one stays to be looked at, and another of its step can be saved."""
    directory = shutil.copytree(two, tmp_path / "checkpoints")
    spoil(directory / "6")
    left = {file.relative_to(directory / "6"): file.read_bytes() for file in files_of(directory / "6")}
    checkpoints = checkpoint.Checkpoints(directory, keep)
    assert checkpoints.latest() == 4 and checkpoints.counters(4)["step"] == 4
    assert (directory / "6").exists()  # nothing is touched before the run is known to go on
    assert_same(checkpoints.restore(4, make_state())[0], make_state(seed=4))
    (line,) = capsys.readouterr().out.splitlines()
    assert str(directory / "6") in line and "damaged" in line and "step 4 is used" in line
    aside = directory / "damaged-6"
    assert {file.relative_to(aside): file.read_bytes() for file in files_of(aside)} == left
    checkpoints.save(6, make_state(seed=6), make_responses(2), COUNTERS)
    checkpoints.close()
    assert {entry.name for entry in directory.iterdir()} == {"damaged-6", "6"} | ({"4"} if keep == 2 else set())
    again = checkpoint.Checkpoints(directory, keep)
    assert again.latest() == 6
    assert_same(again.restore(6, make_state())[0], make_state(seed=6))
    again.close()
    assert capsys.readouterr().out == ""


def test_a_checkpoint_is_whole_however_late_its_metadata_are_written(tmp_path, monkeypatch):
    """Orbax writes them in a thread of their own, and does not wait for it."""
    write = orbax_metadata._MetadataStoreImpl.update

    def late(self, *args, **kwargs):
        time.sleep(0.3)
        write(self, *args, **kwargs)

    monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "update", late)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for k in (4, 6):
        checkpoints.save(k, make_state(seed=k), make_responses(2), COUNTERS | {"step": k})
    checkpoints.close()
    assert [checkpoint.damage(tmp_path / step) for step in ("4", "6")] == ["", ""]
    assert checkpoint.Checkpoints(tmp_path, keep=2).counters(4)["step"] == 4


def test_without_a_whole_one_nothing_is_touched(two, tmp_path):
    directory = shutil.copytree(two, tmp_path / "checkpoints")
    spoil_largest(directory / "6")
    (directory / "4" / checkpoint.MANIFEST).unlink()
    before = {file: file.read_bytes() for file in files_of(directory)}
    with pytest.raises(errors.RunError, match=r"no checkpoint is whole \(6: .*; 4: manifest.json is missing\)") as caught:
        checkpoint.Checkpoints(directory, keep=2)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in files_of(directory)} == before


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    """Whether the next save or the end finds out."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), online.empty(7), COUNTERS)

    def full(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints.save(2, make_state(), online.empty(7), COUNTERS)
    checkpoints._response.result()
    monkeypatch.setattr(checkpoint, "sign", full)
    checkpoints.save(3, make_state(), online.empty(7), COUNTERS)
    for going_on in (lambda: checkpoints.save(4, make_state(), online.empty(7), COUNTERS), checkpoints.close):
        with pytest.raises(errors.RunError, match="No space left on device.*the one before it is whole") as caught:
            going_on()
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoint.Checkpoints(tmp_path, keep=2).latest() == 2
