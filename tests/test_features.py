"""Features of rows: pooling against single rows, the two scores against closed forms and planted bad rows, files."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax import errors, features, random_streams, ranking, sharding, similarity
from bilevel_jax.data import templates
from bilevel_jax.models import decoder, layer_settings, layers
from tests.conftest import load
from tests.test_step import LLAMA

LENGTH = 48


# --------------------------------------------------------------------------------------------------------------------
# Hidden states
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def middle_states(config, base, tokens):
    """Normalised hidden states of one sequence after two of four layers."""
    positions = jnp.arange(len(tokens))[None]
    table, segments = layer_settings.rotary_table(positions, config), jnp.ones_like(positions)
    x = base["embed_tokens"][tokens]
    for i in range(2):
        params = jax.tree.map(lambda stack, i=i: stack[i], base["layers"])
        x, _ = layers.Layer(config).apply({"params": params}, x, table, segments)
    return layers.norm(config, None).apply({"params": base["norm"]}, x)


@pytest.mark.parametrize("architecture", ["neox", "llama"])
def test_means_of_packed_rows_equal_those_of_single_rows(architecture, request):
    config = dataclasses.replace(load(request.getfixturevalue(architecture))[0], num_layers=4)
    base = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    sizes = [(3, 5), (20, 11), (1, 1), (7, 30), (12, 2), (5, 5), (17, 31)]  # the last one fills its sequence
    examples = [templates.Example(*(rng.integers(0, 299, n).astype(np.int32) for n in size), rejected=None) for size in sizes]
    means = features.pooled(config, base, examples, 2, LENGTH, sharding.make_mesh(1))
    assert means.shape == (len(sizes), 2, config.hidden_size)
    for example, (question, answer) in zip(examples, means, strict=True):
        P, size = len(example.prompt), len(example.prompt) + len(example.response)
        tokens = np.concatenate([example.prompt, example.response, np.zeros(LENGTH - size, np.int32)])
        hidden = np.asarray(middle_states(config, base, tokens), np.float64)
        np.testing.assert_allclose(question, hidden[:P].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer, hidden[P:size].mean(0), rtol=1e-4, atol=1e-5)


def test_no_layers_are_copied(monkeypatch):
    """The program takes the base itself, and its temporary memory does not hold two of eight layers."""
    config = dataclasses.replace(LLAMA, hidden_size=64, intermediate_size=512, num_layers=8)
    base = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    program, calls = features._entry_means, []
    monkeypatch.setattr(features, "_entry_means", lambda *arguments: calls.append(arguments) or program(*arguments))
    tokens = np.arange(1, 9, dtype=np.int32)
    features.pooled(config, base, [templates.Example(tokens, tokens, None)], 1, 16, sharding.make_mesh(1))
    ((_, used, packed),) = calls
    assert all(one is other for one, other in zip(jax.tree.leaves(used), jax.tree.leaves(base), strict=True))
    memory = program.lower(config, base, packed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 / 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(base["layers"]))


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


def random_rows(number, bad, seed, hidden=32):
    """Hidden states with questions of two kinds, on the two sides of one direction. A good answer is on the side of its question
    along another direction, a bad one on the opposite side: neither answers nor questions alone separate good from bad."""
    rng = np.random.default_rng(seed)
    is_bad = np.arange(number) < bad
    kind = rng.choice([-1.0, 1.0], number)
    raw = rng.normal(size=(number, 2, hidden)) * 0.5
    raw[:, 0, :4] += kind[:, None]
    raw[:, 1, 2:6] += (kind * np.where(is_bad, -1, 1))[:, None]
    return raw.astype(np.float32), is_bad


def auroc(values, is_bad, column=features.CCA_SCORE):
    return ranking.auroc(-values[:, column].astype(np.float64), is_bad)


def test_cca_score_finds_answers_to_other_questions():
    lower, is_bad = random_rows(600, 150, seed=0)
    upper, _ = random_rows(400, 0, seed=1)
    encoder = features.fit(lower, upper)
    values = features.encode(encoder, lower)
    assert values.shape == (600, features.SIZE) and values.dtype == np.float32
    assert auroc(values, is_bad) > 0.95
    for column in values[:, : features.CCA_SCORE].T:
        assert 0.35 < ranking.auroc(column.astype(np.float64), is_bad) < 0.65  # no single direction separates them

    new, new_bad = random_rows(600, 150, seed=2)
    assert abs(auroc(features.encode(encoder, new), new_bad) - auroc(values, is_bad)) < 0.02


def test_canonical_directions_for_a_known_covariance():
    """For variances 1, correlations ρ_j and ridge λ, the directions are the axes over √(1+λ), the correlations ρ_j / (1+λ)."""
    rng, k = np.random.default_rng(0), 10
    rho = np.linspace(0.9, 0.0, k)
    noise, _ = np.linalg.qr(rng.normal(size=(500, 2 * k)))  # no sampling error: all 2k columns are uncorrelated
    noise *= 500**0.5
    question = noise[:, :k]
    answer = rho * question + np.sqrt(1 - rho**2) * noise[:, k:]
    directions, correlation = features.canonical_directions(question, answer)
    np.testing.assert_allclose(correlation, rho[: features.NUM_CANONICAL] / (1 + features.RIDGE), rtol=1e-6)
    axes = np.eye(k)[:, : features.NUM_CANONICAL] / np.sqrt(1 + features.RIDGE)
    np.testing.assert_allclose(np.abs(directions), [axes, axes], atol=1e-6)
    np.testing.assert_array_less(0, (directions[0] * directions[1]).sum(0))  # the two directions of a pair have the same sign


def test_cca_score_is_the_gaussian_log_ratio_to_first_order():
    """log p(a|q) / p(a) of a Gaussian with small correlation, less the terms that depend on q or a alone, by its density."""
    rng = np.random.default_rng(0)
    rho, number = 0.05, 200
    u, v = rng.normal(size=(2, number))
    exact = -0.5 * (v - rho * u) ** 2 / (1 - rho**2) + 0.5 * v**2
    separate = -0.5 * rho**2 * (u**2 + v**2) / (1 - rho**2)
    unused = dict.fromkeys(("mean", "directions", "cca_score", "spread", "density_ratio_weights", "log_density_ratio"))
    encoder = features.Encoder(trusted_mean=np.zeros((2, 1)), canonical=np.ones((2, 1, 1)), correlation=np.array([rho]), **unused)
    score = features._cca_score(encoder, np.stack([u, v], axis=1)[..., None])
    np.testing.assert_allclose(score, exact - separate, rtol=2 * rho**2, atol=1e-9)


def test_log_density_ratio_finds_rows_that_are_rare_among_trusted_rows():
    (lower, is_rare), (new, new_rare) = (random_rows(600, 150, seed) for seed in (0, 2))
    for rows, rare in ((lower, is_rare), (new, new_rare)):
        rows[:, :, 8:16] += np.where(rare, 0.7, 0.0)[:, None, None]
    encoder = features.fit(lower, random_rows(400, 0, seed=1)[0])
    for rows, rare in ((lower, is_rare), (new, new_rare)):
        assert auroc(features.encode(encoder, rows), rare, features.LOG_DENSITY_RATIO) > 0.97


def test_log_density_ratio_is_the_log_ratio_of_frequencies(monkeypatch):
    """For a binary feature with value 1 in 30 of 40 trusted rows and in 20 of 100 others; the ridge shrinks the difference."""
    upper, lower = (np.stack([np.ones(n), np.arange(n) < ones], axis=1) for n, ones in ((40, 30), (100, 20)))
    shrunk = features.logistic_weights(upper, lower)
    monkeypatch.setattr(features, "DENSITY_RATIO_RIDGE", 0.0)
    weights = features.logistic_weights(upper, lower)
    np.testing.assert_allclose([weights[0], weights.sum()], [np.log(0.25 / 0.8), np.log(0.75 / 0.2)], atol=1e-3)
    assert 0 < shrunk[1] < weights[1] / 2


def test_the_other_features_are_principal_components():
    lower, _ = random_rows(300, 50, seed=0, hidden=90)
    values = features.encode(features.fit(lower * 7 + 3, random_rows(100, 0, seed=1, hidden=90)[0]), lower * 7 + 3)
    for part in range(2):
        scaled = (lower[:, part] - lower[:, part].mean(0)) / lower[:, part].std(0)
        singular = np.linalg.svd(scaled, compute_uv=False)[: features.WIDTH]
        columns = values[:, part * features.WIDTH : (part + 1) * features.WIDTH]
        np.testing.assert_allclose(columns.T @ columns, np.diag(singular**2 / 90), atol=0.02)
        np.testing.assert_allclose(columns.mean(0), 0, atol=1e-4)
    for column, spread in zip(
        values[:, features.CCA_SCORE :].T, (features.CCA_SCORE_SPREAD, features.DENSITY_RATIO_SPREAD), strict=True
    ):
        assert column.mean() == pytest.approx(0, abs=1e-4) and column.std() == pytest.approx(spread, rel=1e-4)


def test_dimensions_in_which_the_rows_do_not_differ_are_left_out():
    """All rows to select from have one question, the trusted rows others: distances are those of the answers."""
    (lower, _), (upper, _) = random_rows(300, 0, seed=0), random_rows(100, 0, seed=1)
    lower[:, 0] = lower[0, 0]
    encoder = features.fit(lower, upper)
    coordinates = features.coordinates(encoder, upper).reshape(100, 2, -1)
    assert (coordinates[:, 0] == 0).all() and 0.3 < np.linalg.norm(coordinates[:, 1], axis=1).mean() < 3


def test_one_trusted_row_and_fewer_dimensions_than_features():
    lower, _ = random_rows(5, 1, seed=0, hidden=8)
    values = features.encode(features.fit(lower, lower[:1]), lower)
    assert values.shape == (5, features.SIZE) and np.isfinite(values).all()


def test_similarity_is_the_mean_of_two_standardised_scores():
    lower, is_bad = random_rows(600, 150, seed=0)
    encoder = features.fit(lower, random_rows(400, 0, seed=1)[0])
    scores = features.encode(encoder, lower)[:, [features.CCA_SCORE, features.LOG_DENSITY_RATIO]].astype(np.float64)
    expected = ((scores - scores.mean(0)) / scores.std(0)).mean(1)
    similar = features.similarity(encoder, lower)
    assert similar.dtype == np.float32 and ranking.auroc(-similar.astype(np.float64), is_bad) > 0.9
    np.testing.assert_allclose(similar, expected, atol=1e-3)


@pytest.fixture
def compared(monkeypatch):
    """`f(lower, upper) -> Likeness` of rows with these hidden states."""
    descriptions = []

    def means(config, setup, level, rows, description):
        descriptions.append(description)
        return level.examples[np.asarray(rows)]

    monkeypatch.setattr(similarity, "_means", means)

    def measure(lower, upper):
        levels = (types.SimpleNamespace(examples=states) for states in (upper, lower))
        return similarity.measure(types.SimpleNamespace(seed=0), types.SimpleNamespace(**dict(zip(("upper", "lower"), levels))))

    measure.descriptions = descriptions
    return measure


def test_similarity_of_many_rows(compared, monkeypatch):
    """The scores are fitted to some rows of each level, and all rows get a number, block by block."""
    (lower, is_bad), (upper, _) = random_rows(650, 150, seed=0), random_rows(400, 0, seed=1)
    monkeypatch.setattr(similarity, "FITTED", 300)
    similar, nearest = compared(lower, upper)
    assert similar.shape == (650,) and ranking.auroc(-similar.astype(np.float64), is_bad) > 0.9
    drawn = [np.sort(np.random.default_rng([0, random_streams.SIMILARITY, n]).permutation(n)[:300]) for n in (650, 400)]
    encoder = features.fit(lower[drawn[0]], upper[drawn[1]])
    np.testing.assert_allclose(similar, features.similarity(encoder, lower), rtol=1e-5, atol=1e-6)
    lower_Nxd, upper_txd = (features.coordinates(encoder, states) for states in (lower, upper[drawn[1]]))
    distance_Nxt = np.linalg.norm(lower_Nxd[:, None] - upper_txd, axis=2)
    assert nearest.dtype == np.int32 and nearest.tolist() == drawn[1][distance_Nxt.argmin(axis=1)].tolist()
    assert compared.descriptions[2:] == [f"rows to compare, {stop} of 650" for stop in (300, 600, 650)]


def test_few_trusted_rows_say_nothing(compared):
    lower, _ = random_rows(60, 10, seed=0)
    assert compared(lower, lower[: similarity.MIN_TRUSTED - 1]) is None
    assert np.isfinite(compared(lower, lower[: similarity.MIN_TRUSTED]).similar).all()


def test_the_nearest_of_points_on_a_line(monkeypatch):
    """Ties go to the first; blocks do not matter."""
    monkeypatch.setattr(similarity, "COMPARED", 2)
    points, others = np.array([[0.0], [0.9], [2.0], [5.0], [-3.0]]), np.array([[3.0], [1.0], [-1.0]])
    assert similarity.nearest(points, others).tolist() == [1, 1, 0, 0, 2]


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    lower, _ = random_rows(40, 5, seed=0)
    encoder = features.fit(lower, random_rows(30, 0, seed=1)[0])
    values = features.encode(encoder, lower)
    file, phi_file = tmp_path / features.FILE, tmp_path / features.PARAMS_FILE
    features.write(file, encoder, values)
    read_encoder, read_values = features.read(file)
    np.testing.assert_array_equal(read_values, values)
    for name, array in encoder._asdict().items():
        np.testing.assert_array_equal(getattr(read_encoder, name), array, err_msg=name)
    features.write_params(phi_file, values[0])
    np.testing.assert_array_equal(features.read_params(phi_file), values[0])

    file.write_bytes(file.read_bytes()[:1000])
    phi_file.unlink()
    for read, reason in ((functools.partial(features.read, file), "damaged"), (lambda: features.read_params(phi_file), "missing")):
        with pytest.raises(errors.RunError, match=reason) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_files_of_earlier_versions(tmp_path):
    """They have the fields `trust`, `odds_weights` and `odds`."""
    lower, _ = random_rows(40, 5, seed=0)
    encoder = features.fit(lower, random_rows(30, 0, seed=1)[0])
    values, file = features.encode(encoder, lower), tmp_path / features.FILE
    arrays = encoder._asdict()
    for name, old in (("cca_score", "trust"), ("density_ratio_weights", "odds_weights"), ("log_density_ratio", "odds")):
        arrays[old] = arrays.pop(name)
    np.savez(file, features=values, **arrays)
    read_encoder, read_values = features.read(file)
    np.testing.assert_array_equal(read_values, values)
    np.testing.assert_array_equal(features.encode(read_encoder, lower), values)
