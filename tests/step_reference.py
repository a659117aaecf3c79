"""The joint step in float64, one response at a time: equations (7)-(10c), (44), (47), (48), (I1) and (I2) written out in NumPy.

Only the derivative of a response's NLL in θ is automatic, and it is that of `float64_llama`, which shares no code with the model.

`predict` starts from the state before the step. Where an equation is at θ^{k+1}, or divides by a moment of Adam, it takes the
θ^{k+1} or the moments that the step returned: these are compared too, and rounding is not amplified.

Axes: E entries (responses), P parameters that are learned, L tokens.
"""

import fractions
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from bilevel_jax import config as configuration
from tests.float64_llama import Model, double, flat

PAIRS = ("dpo", "ipo")
LARGEST_LOG_RATIO = 80.0
TINY = 1e-30
ROUNDING = 2e-6  # of a loss in float32, relative
DOUBTFUL = 1e-4  # cosine below which float32 may have another sign
UNDERFLOW = 1e-25  # of a factor of a loss: products with its gradients may be 0 in float32


class Entry(NamedTuple):
    """One response of a step, after its question."""

    tokens: np.ndarray
    learned: np.ndarray  # positions of the tokens that are learned
    row: int  # of the lower level; -1: upper level
    part: float  # of its row: 1, or 1/G; 0 for a rejected response, which its pair counts already
    partner: int = 0  # +1: the next entry is the rejected response of the pair; -1: the previous one is the chosen one
    group: int = -1  # the row's number in the batch
    reference: float = 0.0
    old_log_prob: float = math.nan
    reward: float = math.nan

    @property
    def generated(self) -> bool:
        return not math.isnan(self.old_log_prob)


# --------------------------------------------------------------------------------------------------------------------
# The rows of a step
# --------------------------------------------------------------------------------------------------------------------


def entry(prompt, response, earlier=(), **fields) -> Entry:
    size = len(prompt) + len(response)
    learned = [t for start, stop in (*earlier, (len(prompt), size)) for t in range(max(1, start), stop)]
    return Entry(np.concatenate([prompt, response]), np.array(learned, int), **fields)


def data_entries(level, i: int, **fields) -> list[Entry]:
    """The response of the data, or the chosen and the rejected one."""
    example = level.examples[i]
    if level.references is None:
        return [entry(example.prompt, example.response, example.earlier, part=1.0, **fields)]
    chosen, rejected = level.references[i]
    return [
        entry(example.prompt, example.response, part=1.0, partner=1, reference=chosen, **fields),
        entry(example.prompt, example.rejected, part=0.0, partner=-1, reference=rejected, **fields),
    ]


def own_entries(config, store, i: int, prompt, **fields) -> list[Entry]:
    """The generated responses to row i that its loss uses, as `online.objective` says; none where their pair is too long."""
    mine = [g for g, row in enumerate(store.row_index) if row == i]

    def one(g, **more):
        return entry(prompt, store.tokens[g], old_log_prob=store.log_prob[g], **fields, **more)

    kind = config.online.objective
    if not mine:
        return []
    if kind in ("sft", "rwr", "reinforce"):
        return [one(g, part=1 / len(mine), reward=math.nan if kind == "sft" else store.reward[g]) for g in mine]
    best = max(mine, key=lambda g: store.reward[g])
    worst = min(mine, key=lambda g: store.reward[g])
    size = 2 * len(prompt) + len(store.tokens[best]) + len(store.tokens[worst])
    is_pair = store.reward[best] > store.reward[worst] and list(store.tokens[best]) != list(store.tokens[worst])
    if kind == "best_of" or not is_pair:
        return [one(best, part=1.0)]
    if size > config.data.max_length:
        return []
    return [
        one(best, part=1.0, partner=1, reference=store.reference[best]),
        one(worst, part=0.0, partner=-1, reference=store.reference[worst]),
    ]


def entries_of(config, upper, lower, store, lower_rows, upper_rows) -> list[Entry]:
    """All responses of a step: the rows of the lower level, then those of the upper one."""
    result = []
    for group, i in enumerate(lower_rows):
        fields = {"row": int(i), "group": group}
        result += own_entries(config, store, i, lower.examples[i].prompt, **fields) or data_entries(lower, i, **fields)
    for j in upper_rows:
        result += data_entries(upper, j, row=-1)
    return result


# --------------------------------------------------------------------------------------------------------------------
# Losses and weights
# --------------------------------------------------------------------------------------------------------------------


def entry_losses(kind, config, entries, nll) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each entry, and its derivative in all summed NLLs [E, E]; 0 for entries of no pair where `kind` is of pairs."""
    loss, slope = np.zeros(len(entries)), np.zeros((len(entries), len(entries)))
    mean = config.loss.reduction == "mean"
    length = np.array([max(1, len(one.learned)) for one in entries], float)
    beta = config.loss.beta
    for e, one in enumerate(entries):
        if kind == "sft":
            divisor = length[e] if mean else 1.0
            loss[e], slope[e, e] = nll[e] / divisor, 1 / divisor
        elif one.partner == 1:
            by = length if kind == "ipo" and mean else np.ones(len(entries))
            margin = (-nll[e] - one.reference) / by[e] - (-nll[e + 1] - entries[e + 1].reference) / by[e + 1]
            if kind == "dpo":
                loss[e], of_margin = np.logaddexp(0, -beta * margin), -beta / (1 + np.exp(beta * margin))
            else:
                loss[e], of_margin = (margin - 1 / (2 * beta)) ** 2, 2 * (margin - 1 / (2 * beta))
            slope[e, e], slope[e, e + 1] = -of_margin / by[e], of_margin / by[e + 1]
    return loss, slope


def response_weights(config, objective, entries, nll) -> np.ndarray:
    """r of each entry."""
    kind, r = objective.response_weight, np.ones(len(entries))
    if kind == "none" or objective.generated in PAIRS:
        return r
    for e, one in enumerate(entries):
        if not one.generated:
            continue
        if kind == "softmax":
            others = [f for f, other in enumerate(entries) if other.group == one.group]
            r[e] = len(others) / sum(np.exp(nll[e] - nll[f]) for f in others)
        else:
            log_ratio = -nll[e] - one.old_log_prob
            log_ratio /= max(1, len(one.learned)) if kind == "geometric" else 1
            r[e] = min(np.exp(min(log_ratio, LARGEST_LOG_RATIO)), config.online.clip)
    return r


def reward_factors(config, objective, entries) -> np.ndarray:
    """The factors of the losses of generated responses by their rewards."""
    factor = np.ones(len(entries))
    for e, one in enumerate(entries):
        if math.isnan(one.reward):
            continue
        rewards = np.array([other.reward for other in entries if other.group == one.group])
        if objective.generated == "rwr":
            temperature = config.online.reward_temperature
            factor[e] = len(rewards) / np.exp((rewards - one.reward) / temperature).sum()
        elif objective.generated == "reinforce":
            others = len(rewards) - 1
            factor[e] = one.reward - (rewards.sum() - one.reward) / others if others else 0.0
    return factor


def training_losses(config, objective, entries, nll) -> tuple[np.ndarray, np.ndarray]:
    """ℓ of each entry of the lower level as θ descends it, without r, and its derivative in the NLLs."""
    loss, slope = entry_losses(objective.lower, config, entries, nll)
    factor = reward_factors(config, objective, entries)
    loss, slope = factor * loss, factor[:, None] * slope
    if objective.lower == "sft" and objective.generated in PAIRS:
        paired, paired_slope = entry_losses(objective.generated, config, entries, nll)
        own = np.array([one.generated for one in entries])
        loss, slope = np.where(own, paired, loss), np.where(own[:, None], paired_slope, slope)
    return loss, slope


def surprises(config, entries, token_nll, loss) -> np.ndarray:
    """(mean_t nll_t^4)^(1/4) of each entry, for pairs their loss."""
    if config.loss.lower in PAIRS:
        return loss
    return np.array([np.mean(nll**4) ** 0.25 if len(nll) else 0.0 for nll in token_nll])


def token_scores(nll) -> np.ndarray:
    """z of each token, [n, 2]: its loss, and the largest of those before it."""
    before = np.maximum.accumulate(np.append(0.0, nll))[: len(nll)]
    return np.stack([nll, before], axis=1)


def token_weights(phi, nll) -> np.ndarray:
    """v of each token of a response."""
    score = token_scores(nll) @ phi
    likelihood = np.exp(score - score.max(initial=-np.inf))
    return len(nll) * likelihood / likelihood.sum() if len(nll) else likelihood


def softmax(logits) -> np.ndarray:
    likelihood = np.exp(logits - logits.max())
    return likelihood / likelihood.sum()


# --------------------------------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------------------------------


def rate(settings, num_steps: int, k: int) -> float:
    """The learning rate of step k of `num_steps`, by the table of docs/training.md."""
    rising = math.ceil(fractions.Fraction(str(settings.warmup)) * num_steps) if settings.warmup < 1 else int(settings.warmup)
    if k < rising:
        return settings.learning_rate * (k + 1) / rising
    u = min(1.0, (k - rising) / (num_steps - rising))
    return settings.learning_rate * {"constant": 1.0, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2}[settings.schedule]


def moments(state) -> tuple[np.ndarray, np.ndarray] | None:
    """Adam's means of gradients and of squares, or None."""
    mu, nu = (optax.tree.get(state, name, default=None) for name in ("mu", "nu"))
    return None if nu is None else (flat(mu), flat(nu))


def adam_move(b1, b2, first, second, k: int, eps_root: float = 0.0) -> np.ndarray:
    """What Adam subtracts in step k, from 0, at rate 1, given its moments after the step."""
    return first / (1 - b1 ** (k + 1)) / (np.sqrt(second / (1 - b2 ** (k + 1)) + eps_root) + 1e-8)


def descend(settings, num_steps: int, k: int, eps_root: float, before, after, gradient) -> dict[str, np.ndarray]:
    """θ^{k+1}, and Adam's moments after the step, of a learner with the joint gradient."""
    norm = np.linalg.norm(gradient)
    if settings.clip_norm and norm > settings.clip_norm:
        gradient = gradient * settings.clip_norm / norm
    theta, eta = flat(before.adapter), rate(settings, num_steps, k)
    if settings.name == "sgd":
        return {"θ": theta - eta * gradient}
    first, second = moments(before.optimizer)
    result = {
        "mu": settings.b1 * first + (1 - settings.b1) * gradient,
        "nu": settings.b2 * second + (1 - settings.b2) * gradient**2,
    }
    move = adam_move(settings.b1, settings.b2, *moments(after.optimizer), k, eps_root)
    decay = settings.weight_decay * theta if settings.name == "adamw" else 0.0
    return result | {"θ": theta - eta * (move + decay)}


# --------------------------------------------------------------------------------------------------------------------
# The selector
# --------------------------------------------------------------------------------------------------------------------


def move_omega(config, selector, before, after, k, entries, cost, count, gamma, features) -> dict[str, np.ndarray]:
    """ω^{k+1}, the running baseline and Adam's moments from the costs C of the entries.

    Args:
      before, after: the selector's state, of which `after` is used for Adam's moments and φ.
      cost: [E]; only those of entries with `count` > 0 matter.
      count: [E], each entry's part of its row; 0 where it is none of the lower level or has no cost.
      gamma: γ.
      features: X or the group of each row; None for a table.
    """
    omega, baseline = double(before.logits), float(before.baseline)
    N, num_rows, used = len(omega), count.sum(), np.flatnonzero(count)
    batch_mean = sum(count[e] * cost[e] for e in used) / num_rows if num_rows else math.nan
    offset = {"none": 0.0, "batch": batch_mean, "running": batch_mean if math.isnan(baseline) else baseline}[selector.baseline]
    if num_rows:
        baseline = batch_mean if math.isnan(baseline) else 0.9 * baseline + 0.1 * batch_mean
    result = {"baseline": np.array(baseline)}
    if selector.frozen:
        unmoved = moments(before.optimizer)
        return result | {"ω": omega} | ({} if unmoved is None else dict(zip(("mu of ω", "nu of ω"), unmoved)))
    sigma, gradient = softmax(omega), np.zeros(N)
    scale = N if selector.weight_scale == "dataset" else 1.0
    for e in used:
        i, centred = entries[e].row, cost[e] - offset
        if selector.rule == "bmo":
            gradient[i] += count[e] * (omega[i] + selector.tau * centred)
        elif selector.optimizer == "mirror":
            gradient[i] += count[e] * gamma * scale / N * centred
        else:
            slope = -sigma[i] * sigma  # ∇σ_i
            slope[i] += sigma[i]
            gradient += gamma * scale * count[e] / num_rows * centred * slope
    if features is None:
        return result | _move(selector, k, omega, gradient, after.optimizer, before.optimizer, "ω")
    matrix = np.eye(len(before.feature_params))[features] if features.ndim == 1 else double(features)
    phi = double(before.feature_params)
    ridge = selector.ridge * (num_rows if selector.rule == "bmo" else 1)
    gradient = matrix.T @ gradient + ridge * phi
    return result | _move(selector, k, phi, gradient, after.optimizer, before.optimizer, "φ") | {
        "ω": matrix @ double(after.feature_params)
    }  # fmt: skip


def _move(selector, k, value, gradient, after, before, name) -> dict[str, np.ndarray]:
    if selector.optimizer != "adam":
        return {name: value - selector.learning_rate * gradient}
    b1, b2 = selector.b1, selector.b2
    first, second = moments(before)
    return {
        "mu of ω": b1 * first + (1 - b1) * gradient,
        "nu of ω": b2 * second + (1 - b2) * gradient**2,
        name: value - selector.learning_rate * adam_move(b1, b2, *moments(after), k),
    }


# --------------------------------------------------------------------------------------------------------------------
# The step
# --------------------------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """A step of a run, before it is taken."""

    config: configuration.Config
    model: Model
    entries: list[Entry]
    scales: tuple[float, float]  # of the two levels' means
    factor: np.ndarray  # of each row in (7), [N]
    features: np.ndarray | None
    num_steps: int


def _means(inputs: Inputs, counted) -> tuple[np.ndarray, np.ndarray]:
    """How much each entry counts in the mean of the upper level, and in that of the lower one."""
    part = np.array([one.part for one in inputs.entries])
    is_lower = np.array([one.row >= 0 for one in inputs.entries])
    upper, lower = np.where(is_lower, 0, part), np.where(is_lower, part, 0)
    lower = np.where(counted, lower, 0)
    return upper / max(upper.sum(), 1e-300), lower / max(lower.sum(), 1e-300)


def _projections(learned) -> np.ndarray:
    """A number for the projection and layer of each parameter, [P]; -1 for those that have no vote: of all weights, no kernels."""
    names: dict = {}

    def of_leaf(path, leaf):
        keys = [key.key for key in path]
        if "embed_tokens" in learned and (keys[0], keys[-1]) != ("layers", "kernel"):
            return np.full(leaf.shape, -1)
        first = names.setdefault(tuple(keys[:-1]), len(names)) * 100  # layers
        return np.broadcast_to((first + np.arange(len(leaf))).reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)

    leaves = jax.tree.leaves(jax.tree_util.tree_map_with_path(of_leaf, learned))
    return np.concatenate([leaf.ravel() for leaf in leaves])


def _products(inputs, before, after, at: "_Evaluated") -> tuple[np.ndarray, np.ndarray]:
    """⟨∇_p ℓ, D m_p⟩ of each projection and entry, and whether rounding leaves its sign in doubt."""
    config, mean = inputs.config, flat(after.influence.upper_mean)
    direction = mean
    settings = configuration.optimizer_settings(config)
    if moments(before.policy.optimizer) is not None:  # v after a step with ∇L0 alone
        k = int(before.step)
        square = descend(settings, inputs.num_steps, k, settings.eps_root, before.policy, after.policy, at.of_upper)["nu"]
        direction = np.where(square > 0, direction / np.sqrt(np.maximum(square, 1e-300)), 0.0)
    gradient = at.loss_slope @ np.where(at.has_part[:, None], at.gradient, 0.0)
    number = _projections(before.policy.adapter)
    size = np.abs(at.loss_slope) @ np.where(at.has_part, np.linalg.norm(at.gradient, axis=1), 0.0)  # before those of a pair cancel
    products, rounding = [], []
    for one in np.unique(number[number >= 0]):
        of_rows, along = gradient[:, number == one], direction[number == one]
        products.append(of_rows @ along)
        # A part of the gradient that is 0, as where a token attends to itself alone, is rounding of the others.
        length = DOUBTFUL * np.linalg.norm(of_rows, axis=1) + 5 * ROUNDING * size
        # Adam divides a gradient of the trusted rows that is rounding by its own size.
        vague = np.linalg.norm(mean[number == one]) < 5 * ROUNDING * np.linalg.norm(mean)
        rounding.append(np.where(at.has_part, np.inf, 0.0) if vague else length * np.linalg.norm(along))
    return np.array(products), (np.abs(products) < np.array(rounding)) | at.doubtful_part


def _influence(inputs, before, after, entries, at: "_Evaluated") -> tuple[dict, np.ndarray, np.ndarray, dict]:
    """The running means, harm and cost of (I1)-(I3), from gradients of single rows, and what rounding may change in them."""
    state, surprise, share = before.influence, at.surprise, at.share
    product, doubtful = _products(inputs, before, after, at)
    change, doubt = -np.sign(product).mean(axis=0), 2 * doubtful.mean(axis=0)

    def running(mean, value):
        if not share.any():
            return float(mean)
        return value if math.isnan(mean) else 0.9 * float(mean) + 0.1 * value

    square = running(state.influence_square, np.sum(share * change**2))
    center = running(state.surprise_mean, np.sum(share * surprise))
    spread = running(state.surprise_square, np.sum(share * (surprise - center) ** 2))
    named = {"influence_square": square, "surprise_mean": center, "surprise_square": spread, "correlation": state.correlation}
    named = {key: np.array(value, float) for key, value in named.items()}
    if not share.any():
        return named, np.zeros(len(entries)), np.zeros(len(entries)), {}
    root, width = (max(math.sqrt(value), TINY) for value in (square, spread))
    harm, excess = np.tanh(change / root), np.tanh((surprise - center) / width)
    rms = [max(math.sqrt(share @ value**2), TINY) for value in (harm, excess)]
    correlation = running(state.correlation, share @ (harm * excess) / np.prod(rms))
    named["correlation"] = np.array(correlation)
    part = min(1.0, max(correlation, 0) * 0.57 / (0.43 - correlation**2)) if correlation < 0.43 else 1.0
    cost = harm + part * excess
    # A vote of vectors that are nearly orthogonal may be another one, and a difference between rows loses digits.
    lost = np.max(doubt) / root, ROUNDING * np.max(np.abs(surprise)) / width
    noise = {"influence: influence_square": 2 * lost[0] * square, "influence: surprise_square": 2 * lost[1] * spread}
    of_correlation = 0.2 * (lost[0] / rms[0] + lost[1] / rms[1])
    noise |= {"influence: correlation": of_correlation, "selector: harm": lost[0]}
    # 6 is the largest slope of the part of the surprise in the correlation.
    return named, harm, cost, noise | {"cost": sum(lost) + 6 * of_correlation}


class _Evaluated(NamedTuple):
    """The step at θ^k."""

    share: np.ndarray  # of each entry in the mean of the costs, [E]
    count: np.ndarray  # its part of its row, where it has a cost
    pull: np.ndarray  # its factor in the mean of the lower level: share · w · r
    loss: np.ndarray  # its loss
    surprise: np.ndarray
    of_upper: np.ndarray  # ∇L0, [P]
    gradient: np.ndarray  # of the NLL of each entry, [E, P]
    loss_slope: np.ndarray  # derivatives of the losses in the NLLs, [E, E]
    has_part: np.ndarray  # whether the loss of the lower level depends on its NLL
    doubtful_part: np.ndarray  # whether it does by so little that float32 may say that it does not
    weigh: Any  # of tokens


def predict(inputs: Inputs, before, after, k: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What step k must give, by name, and by how much rounding may change some of it more than the rest.

    `before` and `after` are the states (`train_state.State`) of the compiled step.
    """
    config, entries = inputs.config, inputs.entries
    selector = configuration.to_selector(config)
    at, expected, joint = _at_theta(inputs, before, after)
    expected |= _learner(inputs, "policy", before, after, k, joint)
    cost, harm, more, noise = _costs(inputs, at, before, after, k)
    if selector.rule == "bds":  # the gradient of (7); the targets of (47) have no factor
        cost = cost * _row_factors(inputs)
    moved = move_omega(
        config, selector, before.selector, after.selector, k, entries, cost, at.count, inputs.scales[1], inputs.features
    )
    records = _records(before.selector, entries, at.count, at.surprise, harm)
    expected |= more | {f"selector: {name}": value for name, value in (moved | records).items()}
    return expected, noise | _noise_of_omega(inputs, selector, noise.get("cost", 0.0), at.count.sum(), expected)


def _row_factors(inputs) -> np.ndarray:
    return np.array([inputs.factor[one.row] if one.row >= 0 else 1.0 for one in inputs.entries])


def _learner(inputs, kind, before, after, k, gradient) -> dict[str, np.ndarray]:
    settings = configuration.optimizer_settings(inputs.config)
    result = descend(settings, inputs.num_steps, k, settings.eps_root, getattr(before, kind), getattr(after, kind), gradient)
    return {f"{kind}: {name}": value for name, value in result.items()}


def _at_theta(inputs, before, after) -> tuple[_Evaluated, dict[str, np.ndarray], np.ndarray]:
    """What is computed at θ^k, the metrics, and the joint gradient."""
    config, entries = inputs.config, inputs.entries
    objective, selector = configuration.to_objective(config), configuration.to_selector(config)
    is_lower = np.array([one.row >= 0 for one in entries])
    has_cost = is_lower & np.array([objective.lower == "sft" or one.partner == 1 for one in entries])
    upper, lower = _means(inputs, np.ones(len(entries), bool))
    sigma = softmax(double((after if selector.order == "paper" else before).selector.logits))
    sigma *= len(sigma) if selector.weight_scale == "dataset" else 1.0
    weight = np.array([sigma[one.row] if one.row >= 0 else 0.0 for one in entries]) * _row_factors(inputs)

    phi = None if before.token_params is None else double(before.token_params)
    weigh = None if phi is None else (lambda one, nll: token_weights(phi, nll) if one.row >= 0 else np.ones(len(nll)))
    token_nll, nll, gradient = inputs.model.evaluate(before.policy.adapter, entries, weigh)
    r = response_weights(config, objective, entries, nll)
    above, above_slope = entry_losses(objective.upper, config, entries, nll)
    below, below_slope = training_losses(config, objective, entries, nll)
    pull, (loss, loss_slope) = lower * weight * r, entry_losses(objective.lower, config, entries, nll)
    of_upper = upper @ above_slope @ gradient
    joint = inputs.scales[0] * of_upper + inputs.scales[1] * pull @ below_slope @ gradient
    share, count = _means(inputs, has_cost)[1], np.where(has_cost, [one.part for one in entries], 0.0)
    metrics = {
        "loss": np.array(inputs.scales[0] * upper @ above + inputs.scales[1] * pull @ below),
        "upper_loss": np.array(upper @ above),
        "lower_loss": np.array(share @ loss),
        "gradient_norm": np.array(np.linalg.norm(joint)),
        "response_tokens": np.array(float(sum(len(one.learned) for one in entries))),
        "row_loss": entry_losses("sft", config, entries, nll)[0],
        "log_ratio": -nll - np.array([one.old_log_prob for one in entries]),
        "response_weight": r,
    }
    surprise, part = surprises(config, entries, token_nll, loss), np.abs(pull @ below_slope)
    doubtful = (part > 0) & (part < max(ROUNDING * part.max(), UNDERFLOW))
    evaluated = _Evaluated(share, count, pull, loss, surprise, of_upper, gradient, loss_slope, part > 0, doubtful, weigh)
    return evaluated, metrics, joint


def _costs(inputs, at: _Evaluated, before, after, k) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """C of each entry, its harm, the results of θ', φ and the running means of influences, and what rounding may change."""
    config, model, entries = inputs.config, inputs.model, inputs.entries
    objective, selector = configuration.to_objective(config), configuration.to_selector(config)
    expected, cost, tracked = {}, at.loss, None
    if objective.value_function == "tracked":
        _, tracked, slopes = model.evaluate(before.tracker.adapter, entries)
        _, tracked_slope = training_losses(config, objective, entries, tracked)
        expected |= _learner(inputs, "tracker", before, after, k, at.pull @ tracked_slope @ slopes)
    if before.influence is not None:
        expected["influence: upper_mean"] = 0.9 * flat(before.influence.upper_mean) + 0.1 * at.of_upper
        means, harm, cost, noise = _influence(inputs, before, after, entries, at)
        return cost, harm, expected | {f"influence: {name}": value for name, value in means.items()}, noise
    if objective.coefficient_at == "next" and not selector.frozen:
        token_nll, nll, _ = model.evaluate(after.policy.adapter, entries, at.weigh)
        cost = entry_losses(objective.lower, config, entries, nll)[0]
        if tracked is not None:
            _, tracked, _ = model.evaluate(after.tracker.adapter, entries)
        if before.token_params is not None:
            phi = double(before.token_params)
            slopes = sum(at.pull[e] * _phi_slope(config, phi, nll) for e, nll in enumerate(token_nll) if at.pull[e])
            expected["φ of tokens"] = phi - selector.token_learning_rate * inputs.scales[1] * slopes
    if tracked is not None:
        cost = cost - entry_losses(objective.lower, config, entries, tracked)[0]
    return cost, np.zeros(len(entries)), expected, {}


def _noise_of_omega(inputs, selector, of_cost, num_rows, expected) -> dict[str, float]:
    """What an error of the costs may change in ω and its moments, to first order."""
    N = len(inputs.factor)
    scale = (N if selector.weight_scale == "dataset" else 1.0) * inputs.scales[1]
    pull = selector.tau * num_rows if selector.rule == "bmo" else scale
    of_gradient = 2 * of_cost * pull * max(1.0, np.max(inputs.factor))
    if inputs.features is not None and inputs.features.ndim == 2:
        of_gradient *= np.abs(inputs.features).sum()
    largest = np.max(np.abs(expected.get("selector: mu of ω", 0.0))) / max(1 - selector.b1, TINY)
    of_move = 0.0 if selector.optimizer == "adam" else selector.learning_rate * of_gradient
    spread = 1.0 if inputs.features is None else max(1.0, 3 * np.max(np.abs(inputs.features)))
    return {
        "selector: baseline": of_cost,
        "selector: ω": of_move * spread,
        "selector: φ": of_move,
        "selector: mu of ω": of_gradient,
        "selector: nu of ω": 2 * largest * of_gradient,
    }


def _phi_slope(config, phi, nll) -> np.ndarray:
    """dℓ/dφ of a response, (T5) of `token_weights`."""
    if not len(nll):
        return np.zeros(2)
    v, z = token_weights(phi, nll), token_scores(nll)
    slope = np.mean((v * nll)[:, None] * (z - np.mean(v[:, None] * z, axis=0)), axis=0)
    return slope * (1 if config.loss.reduction == "mean" else len(nll))


def _records(before, entries, count, surprise, harm) -> dict[str, np.ndarray]:
    """Visits, and what is noted of the responses of the data."""
    result = {name: double(getattr(before, name)) for name in ("visits", "data_visits", "surprise", "harm")}
    for e, one in enumerate(entries):
        if not count[e]:
            continue
        result["visits"][one.row] += count[e]
        if not one.generated:
            result["data_visits"][one.row] += 1
            result["surprise"][one.row] = surprise[e]
            result["harm"][one.row] += harm[e]
    return result
