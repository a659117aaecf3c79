"""Features of rows: pooling against rows that stand alone, trust against closed forms and a planted truth, files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import errors, features, sharding
from bilevel_jax.data import templates
from bilevel_jax.models import decoder
from bilevel_jax.runtime import metrics
from tests.conftest import load

LENGTH = 48


# --------------------------------------------------------------------------------------------------------------------
# Hidden states
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def half_way_up(config, base, tokens):
    """Normalised hidden states of one sequence after two of four layers."""
    positions = jnp.arange(len(tokens))[None]
    table, segments = decoder.rotary_table(positions, config), jnp.ones_like(positions)
    x = base["embed_tokens"][tokens]
    for i in range(2):
        params = jax.tree.map(lambda stack, i=i: stack[i], base["layers"])
        x, _ = decoder.Layer(config).apply({"params": params}, x, table, segments)
    return decoder._norm(config, None).apply({"params": base["norm"]}, x)


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_means_of_packed_rows_are_those_of_each_alone(architecture, request):
    config = dataclasses.replace(load(request.getfixturevalue(architecture))[0], num_layers=4)
    base = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    sizes = [(3, 5), (20, 11), (1, 1), (7, 30), (12, 2), (5, 5), (17, 31)]  # the last one fills its sequence
    examples = [templates.Example(*(rng.integers(0, 299, n).astype(np.int32) for n in size), rejected=None) for size in sizes]
    found = features.pooled(config, base, examples, 2, LENGTH, sharding.make_mesh(1))
    assert found.shape == (len(sizes), 2, config.hidden_size)
    for example, (question, answer) in zip(examples, found, strict=True):
        P, size = len(example.prompt), len(example.prompt) + len(example.response)
        tokens = np.concatenate([example.prompt, example.response, np.zeros(LENGTH - size, np.int32)])
        hidden = np.asarray(half_way_up(config, base, tokens), np.float64)
        np.testing.assert_allclose(question, hidden[:P].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer, hidden[P:size].mean(0), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


def drawn(number, bad, seed, hidden=32):
    """Questions of two kinds, on the two sides of one direction. A good answer lies on its question's side of another, a bad one
    opposite: neither answers nor questions alone tell good from bad."""
    rng = np.random.default_rng(seed)
    is_bad = np.arange(number) < bad
    kind = rng.choice([-1.0, 1.0], number)
    raw = rng.normal(size=(number, 2, hidden)) * 0.5
    raw[:, 0, :4] += kind[:, None]
    raw[:, 1, 2:6] += (kind * np.where(is_bad, -1, 1))[:, None]
    return raw.astype(np.float32), is_bad


def ranks(found, is_bad, place=features.TRUST):
    return metrics.auroc(-found[:, place].astype(np.float64), is_bad)


def test_trust_tells_answers_by_their_question():
    lower, is_bad = drawn(600, 150, seed=0)
    upper, _ = drawn(400, 0, seed=1)
    encoder = features.fit(lower, upper)
    found = features.encode(encoder, lower)
    assert found.shape == (600, features.SIZE) and found.dtype == np.float32
    assert ranks(found, is_bad) > 0.95
    for column in found[:, : features.TRUST].T:
        assert 0.35 < metrics.auroc(column.astype(np.float64), is_bad) < 0.65  # no part of a question or an answer knows

    new, new_bad = drawn(600, 150, seed=2)
    assert abs(ranks(features.encode(encoder, new), new_bad) - ranks(found, is_bad)) < 0.02


def test_canonical_directions_of_a_known_covariance():
    """With variances 1 and correlations ρ_j, ridge λ: directions are the axes over √(1+λ), correlations ρ_j / (1+λ)."""
    rng, k = np.random.default_rng(0), 10
    rho = np.linspace(0.9, 0.0, k)
    noise, _ = np.linalg.qr(rng.normal(size=(500, 2 * k)))  # no sampling error: all 2k columns are uncorrelated
    noise *= 500**0.5
    question = noise[:, :k]
    answer = rho * question + np.sqrt(1 - rho**2) * noise[:, k:]
    directions, correlation = features.canonical_directions(question, answer)
    np.testing.assert_allclose(correlation, rho[: features.CANONICAL] / (1 + features.RIDGE), rtol=1e-6)
    axes = np.eye(k)[:, : features.CANONICAL] / np.sqrt(1 + features.RIDGE)
    np.testing.assert_allclose(np.abs(directions), [axes, axes], atol=1e-6)
    np.testing.assert_array_less(0, (directions[0] * directions[1]).sum(0))  # of a pair, both have the same sign


def test_trust_is_the_gaussian_log_ratio_to_first_order():
    """log p(a|q) / p(a) of a Gaussian with small correlation, up to what depends on q or a alone, by its density."""
    rng = np.random.default_rng(0)
    rho, number = 0.05, 200
    u, v = rng.normal(size=(2, number))
    exact = -0.5 * (v - rho * u) ** 2 / (1 - rho**2) + 0.5 * v**2
    alone = -0.5 * rho**2 * (u**2 + v**2) / (1 - rho**2)
    rest = dict.fromkeys(("mean", "directions", "trust", "spread", "odds_weights", "odds"))
    encoder = features.Encoder(trusted_mean=np.zeros((2, 1)), canonical=np.ones((2, 1, 1)), correlation=np.array([rho]), **rest)
    trust = features._trust(encoder, np.stack([u, v], axis=1)[..., None])
    np.testing.assert_allclose(trust, exact - alone, rtol=2 * rho**2, atol=1e-9)


def test_odds_tell_rows_by_how_common_they_are_among_trusted_ones():
    (lower, is_rare), (new, new_rare) = (drawn(600, 150, seed) for seed in (0, 2))
    for rows, rare in ((lower, is_rare), (new, new_rare)):
        rows[:, :, 8:16] += np.where(rare, 0.7, 0.0)[:, None, None]
    encoder = features.fit(lower, drawn(400, 0, seed=1)[0])
    for rows, rare in ((lower, is_rare), (new, new_rare)):
        assert ranks(features.encode(encoder, rows), rare, -1) > 0.97


def test_odds_are_the_log_ratio_of_frequencies(monkeypatch):
    """Of a feature that is there or not, in 30 of 40 trusted rows and in 20 of 100 others; the ridge makes a smaller difference."""
    upper, lower = (np.stack([np.ones(n), np.arange(n) < there], axis=1) for n, there in ((40, 30), (100, 20)))
    shrunk = features.logistic_weights(upper, lower)
    monkeypatch.setattr(features, "ODDS_RIDGE", 0.0)
    weights = features.logistic_weights(upper, lower)
    np.testing.assert_allclose([weights[0], weights.sum()], [np.log(0.25 / 0.8), np.log(0.75 / 0.2)], atol=1e-3)
    assert 0 < shrunk[1] < weights[1] / 2


def test_the_other_features_are_principal_components():
    lower, _ = drawn(300, 50, seed=0, hidden=90)
    found = features.encode(features.fit(lower * 7 + 3, drawn(100, 0, seed=1, hidden=90)[0]), lower * 7 + 3)
    for part in range(2):
        scaled = (lower[:, part] - lower[:, part].mean(0)) / lower[:, part].std(0)
        singular = np.linalg.svd(scaled, compute_uv=False)[: features.WIDTH]
        mine = found[:, part * features.WIDTH : (part + 1) * features.WIDTH]
        np.testing.assert_allclose(mine.T @ mine, np.diag(singular**2 / 90), atol=0.02)
        np.testing.assert_allclose(mine.mean(0), 0, atol=1e-4)
    for column, spread in zip(found[:, features.TRUST :].T, (features.TRUST_SPREAD, features.ODDS_SPREAD), strict=True):
        assert column.mean() == pytest.approx(0, abs=1e-4) and column.std() == pytest.approx(spread, rel=1e-4)


def test_a_trusted_level_of_one_row_and_a_model_narrower_than_its_features():
    lower, _ = drawn(5, 1, seed=0, hidden=8)
    found = features.encode(features.fit(lower, lower[:1]), lower)
    assert found.shape == (5, features.SIZE) and np.isfinite(found).all()


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    lower, _ = drawn(40, 5, seed=0)
    encoder = features.fit(lower, drawn(30, 0, seed=1)[0])
    found = features.encode(encoder, lower)
    file, phi_file = tmp_path / features.FILE, tmp_path / features.PARAMS_FILE
    features.write(file, encoder, found)
    again, same = features.read(file)
    np.testing.assert_array_equal(same, found)
    for name, array in encoder._asdict().items():
        np.testing.assert_array_equal(getattr(again, name), array, err_msg=name)
    features.write_params(phi_file, found[0])
    np.testing.assert_array_equal(features.read_params(phi_file), found[0])

    file.write_bytes(file.read_bytes()[:1000])
    phi_file.unlink()
    for read, reason in ((functools.partial(features.read, file), "damaged"), (lambda: features.read_params(phi_file), "missing")):
        with pytest.raises(errors.RunError, match=reason) as caught:
            read()
        assert "\n" not in str(caught.value)
