"""Checkpoints: restored values equal the saved ones to the bit, and damage is detected."""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from bilevel_jax import errors, objective, online, selector, train_state
from bilevel_jax.data import templates
from bilevel_jax.runtime import checkpoint

COUNTERS = {"data": "abc", "seconds": {"train": 1.5}, "at_start": {"eval/upper_loss": 1 / 3}}


def make_state(rule_optimizer="adam", tracked=True, seed=0):
    """A state of random numbers; the running baseline is NaN, as before the first batch."""
    adapter = {"layers": {"mlp": {"up": {"a": jnp.zeros((2, 5, 3)), "b": jnp.zeros((2, 3, 4))}}}}
    aim = objective.Objective(value_function="tracked" if tracked else "zero")
    state = train_state.init(adapter, optax.adam(1e-3), aim, selector.Selector(optimizer=rule_optimizer), 7)
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(state)
    drawn = [jnp.asarray(100 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    state = tree.unflatten(drawn)
    return state._replace(selector=state.selector._replace(baseline=jnp.float32(jnp.nan)))


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == expected_leaf.dtype
        np.testing.assert_array_equal(leaf, expected_leaf)  # NaN equals NaN


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


@pytest.mark.parametrize("saved, wanted", [(True, False), (False, True)])
def test_a_state_with_other_arrays_is_refused(tmp_path, saved, wanted):
    """As of another version of the package. Its files are intact, so it is not set aside as damaged."""
    first = checkpoint.Checkpoints(tmp_path, keep=1)
    first.save(5, make_state(tracked=saved), online.empty(7), COUNTERS)
    first.close()
    second = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(errors.RunError, match=r"5: this version of the package does not read it \(.*tracker.*\); continue with"):
        second.restore(5, make_state(tracked=wanted))
    second.close()
    assert (tmp_path / "5").is_dir()


def make_responses(number):
    """A response store: responses of different lengths, some of them used."""
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
def test_responses_round_trip(tmp_path, number):
    """Also without responses: the mask of a refresh whose responses were all empty counts."""
    store = make_responses(number)
    first = checkpoint.Checkpoints(tmp_path, keep=1)
    first.save(31, make_state(), store, COUNTERS)
    log_ratio = store.log_ratio.copy()
    store.log_ratio[:] = 7.0  # steps continue to record ratios while the checkpoint is written
    first.close()
    second = checkpoint.Checkpoints(tmp_path, keep=1)
    _, restored, _ = second.restore(31, make_state())
    second.close()
    assert restored.step == 30 and len(restored.tokens) == number
    columns = {"masked": store.masked, "row_index": store.row_index, "sample_index": store.sample_index, "log_ratio": log_ratio}
    for name, expected in columns.items():
        np.testing.assert_array_equal(getattr(restored, name), expected)
        assert getattr(restored, name).dtype == expected.dtype
    np.testing.assert_array_equal(restored.log_prob, store.log_prob)
    assert restored.log_prob.dtype == np.float64
    for tokens, expected in zip(restored.tokens, store.tokens, strict=True):
        np.testing.assert_array_equal(tokens, expected)
        assert tokens.dtype == np.int32
    assert restored.by_row == {i: [i] for i in range(number)}
    restored.log_ratio[:] = 1.0  # writable: steps continue to record ratios


def test_counters_after_saving(tmp_path):
    """Counters may also change while the checkpoint is being written."""
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
def test_newest_checkpoints_remain(tmp_path, keep):
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


def test_a_step_is_saved_once(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, make_state(seed=1), online.empty(7), COUNTERS)
    checkpoints.save(3, make_state(seed=2), online.empty(7), COUNTERS)
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, keep=2)
    assert_same(again.restore(3, make_state())[0], make_state(seed=1))
    again.close()


def test_fingerprint_of_a_model():
    """It changes with two swapped values, the smallest change of one, another dtype, and another token."""
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, jnp.bfloat16)}
    examples = [templates.Example(np.array([1, 2], np.int32), np.array([3], np.int32), None)]

    def fingerprint(changes=(), examples=examples):
        return checkpoint.fingerprint_model(jax.tree.map(jnp.asarray, weights | dict(changes)), examples)

    swapped, moved = weights["a"][:, [1, 0, 2]], weights["a"].copy()
    moved[1, 1] = np.nextafter(moved[1, 1], 9, dtype=np.float32)
    others = [{"a": swapped}, {"a": moved}, {"a": weights["a"].astype(jnp.bfloat16)}, {"b": -weights["b"]}, {"a": weights["a"].T}]
    tokens = [templates.Example(np.array([1, 2], np.int32), np.array([4], np.int32), None)]
    shifted = [templates.Example(np.array([1], np.int32), np.array([2, 3], np.int32), None)]
    prints = [fingerprint(), *map(fingerprint, others)]
    prints += [fingerprint(examples=changed) for changed in (tokens, shifted, [])]
    assert len(set(prints)) == len(prints) and fingerprint() == prints[0]


@pytest.mark.parametrize(
    "ids, same",
    [(["ab", "c"], True), (["c", "ab"], False), (["a", "bc"], False), (["ab"], False), (["ab", "c", "c"], False)],
)
def test_fingerprint(ids, same):
    assert (checkpoint.fingerprint(ids) == checkpoint.fingerprint(iter(["ab", "c"]))) == same


def test_fingerprints_by_hand(monkeypatch):
    """SHA-256 of the ids as lines, and of the tokens as little-endian numbers with -1 after each part; chunks change nothing."""
    ids, of_ids = [f"{i:x}" for i in range(5)], hashlib.sha256(b"0\n1\n2\n3\n4\n").hexdigest()[:16]
    one, pair = np.array([1, 2], np.int32), np.array([3], np.int32)
    examples = [templates.Example(one, pair, rejected) for rejected in (None, pair)]
    examples.append(templates.Example(one, pair, None, earlier=((0, 1),)))
    numbers = [1, 2, -1, 3, -1, 1, 2, -1, 3, -1, 3, -1, 1, 2, -1, 3, -1, 0, 1, -1]
    expected = hashlib.sha256(struct.pack(f"<{len(numbers)}i", *numbers)).hexdigest()[:16]
    for size in (4096, 2, 1):
        monkeypatch.setattr(checkpoint, "CHUNK", size)
        assert checkpoint.fingerprint(iter(ids)) == of_ids
        assert checkpoint.fingerprint_model({}, examples) == expected


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


def flip(file, offset):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << offset % 8
    file.write_bytes(bytes(content))


def test_damage_is_detected(two, tmp_path):
    """Each file truncated, with a flipped bit, and removed; only Orbax's mark of success, which is not read, may be missing."""
    intact = two / "6"
    assert checkpoint.damage(intact) == ""
    copy = shutil.copytree(intact, tmp_path / "6")
    for file in files_of(copy):
        content, name = file.read_bytes(), file.relative_to(copy).as_posix()
        if file.name == "commit_success.txt":
            continue
        file.write_bytes(content[: len(content) // 2])
        assert name in checkpoint.damage(copy), name
        file.write_bytes(content)
        time = re.search(rb'"commit_timestamp_nsecs": (\d+)', content)  # added by Orbax after the manifest
        offsets = [i for i in range(len(content)) if not time or not time.start(1) <= i < time.end(1)]
        for offset in np.random.default_rng(0).choice(offsets, 5):
            flip(file, offset)
            assert checkpoint.damage(copy), (name, offset)
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
def test_falls_back_from_a_damaged_checkpoint(two, tmp_path, capsys, spoil, keep):
    """The damaged one is kept under another name, and its step can be saved again."""
    directory = shutil.copytree(two, tmp_path / "checkpoints")
    spoil(directory / "6")
    before = {file.relative_to(directory / "6"): file.read_bytes() for file in files_of(directory / "6")}
    checkpoints = checkpoint.Checkpoints(directory, keep)
    assert checkpoints.latest() == 4 and checkpoints.counters(4)["step"] == 4
    assert (directory / "6").exists()  # nothing is renamed before the run restores or saves
    assert_same(checkpoints.restore(4, make_state())[0], make_state(seed=4))
    (line,) = capsys.readouterr().out.splitlines()
    assert str(directory / "6") in line and "damaged" in line and "step 4 is used" in line
    aside = directory / "damaged-6"
    assert {file.relative_to(aside): file.read_bytes() for file in files_of(aside)} == before
    checkpoints.save(6, make_state(seed=6), make_responses(2), COUNTERS)
    checkpoints.close()
    assert {entry.name for entry in directory.iterdir()} == {"damaged-6", "6"} | ({"4"} if keep == 2 else set())
    again = checkpoint.Checkpoints(directory, keep)
    assert again.latest() == 6
    assert_same(again.restore(6, make_state())[0], make_state(seed=6))
    again.close()
    assert capsys.readouterr().out == ""


def test_manifest_waits_for_late_metadata(tmp_path, monkeypatch):
    """Orbax writes its metadata in another thread, and does not wait for it."""
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


def test_refuses_if_all_checkpoints_are_damaged(two, tmp_path):
    directory = shutil.copytree(two, tmp_path / "checkpoints")
    spoil_largest(directory / "6")
    (directory / "4" / checkpoint.MANIFEST).unlink()
    before = {file: file.read_bytes() for file in files_of(directory)}
    with pytest.raises(errors.RunError, match=r"no checkpoint is intact \(6: .*; 4: manifest.json is missing\)") as caught:
        checkpoint.Checkpoints(directory, keep=2)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in files_of(directory)} == before


def test_write_errors_are_raised(tmp_path, monkeypatch):
    """By the next save, or at the end."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), online.empty(7), COUNTERS)

    def full(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints.save(2, make_state(), online.empty(7), COUNTERS)
    checkpoints._response.result()
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    checkpoints.save(3, make_state(), online.empty(7), COUNTERS)
    for proceed in (lambda: checkpoints.save(4, make_state(), online.empty(7), COUNTERS), checkpoints.close):
        with pytest.raises(errors.RunError, match="No space left on device.*that of step 2 is intact") as caught:
            proceed()
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoint.Checkpoints(tmp_path, keep=2).latest() == 2


def test_no_earlier_checkpoint_is_promised_where_there_is_none(tmp_path, monkeypatch):
    """A disk that is full at the first save, and one that is full while the first checkpoint is being written."""
    first = checkpoint.Checkpoints(tmp_path / "full", keep=2)
    with monkeypatch.context() as full:
        full.setattr(checkpoint.shutil, "disk_usage", lambda directory: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(errors.RunError, match="No space left on device.*MB are free.*no earlier one.*starts from step 0"):
            first.save(1, make_state(), online.empty(7), COUNTERS)

    def cannot_write(directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_manifest", cannot_write)
    second = checkpoint.Checkpoints(tmp_path / "filling", keep=2)
    second.save(1, make_state(), online.empty(7), COUNTERS)
    with pytest.raises(errors.RunError, match="No space left on device.*no earlier one.*starts from step 0"):
        second.save(2, make_state(), online.empty(7), COUNTERS)


def test_nothing_stays_open(tmp_path):
    """Files and threads stay flat over runs in one process; each left three descriptors and a thread."""

    def run(i):
        checkpoints = checkpoint.Checkpoints(tmp_path / str(i), keep=1)
        for k in (1, 2):
            checkpoints.save(k, {"x": jnp.zeros(3)}, online.empty(7), COUNTERS)
        checkpoints.close()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    first, *others = [run(i) for i in range(8)][1:]
    assert others == [first] * len(others)


BEST = {"loss": 0.5, "step": 4, "stale": 0}


@pytest.mark.parametrize(
    "counters",
    [
        None,
        [],
        {"seconds": "x"},
        {"at_start": {"a": "b"}},
        {"num_steps": "12"},
        {"config": 3},
        {"best": 0.5},
        {"best": []},
        {"best": {"loss": 0.5}},
        {"best": BEST | {"loss": "0.5"}},
        {"best": BEST | {"stale": None}},
        {"best": BEST | {"other": 1}},
    ],
)
def test_counters_of_other_types_are_damage(two, tmp_path, counters):
    """Also where the checksums are right."""
    assert damage_with(two / "6", tmp_path / "6", counters) == f"{checkpoint.METADATA} cannot be read (TypeError)"


@pytest.mark.parametrize("counters", [{}, {"best": BEST}, {"best": BEST | {"loss": 1}}])
def test_counters_of_the_right_types(two, tmp_path, counters):
    assert not damage_with(two / "6", tmp_path / "6", counters)


def damage_with(saved, copy, counters) -> str:
    """The damage of a copy of a checkpoint with other counters."""
    shutil.copytree(saved, copy)
    file = copy / checkpoint.METADATA
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": counters}))
    checkpoint.write_manifest(copy)
    return checkpoint.damage(copy)
