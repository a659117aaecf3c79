"""Preference objectives against the loss code of `trl`, recomputed live with PyTorch: `make parity`.

The trainers are created without `__init__`, which requires a model and rows. Their own code computes the loss from
log-probabilities or rewards.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import accelerate

from bilevel_jax import importance, preferences
from experiments.didactic import objectives

pytestmark = pytest.mark.parity
PAIRS, TOKENS = 5, 7
QUESTIONS, G = 4, 3


def bare(trainer, **attributes):
    """A trainer that has only these attributes."""
    instance = object.__new__(trainer)
    vars(instance).update(
        accelerator=accelerate.Accelerator(cpu=True),
        model=types.SimpleNamespace(training=True),
        _metrics={"train": collections.defaultdict(list)},
        aux_loss_enabled=False,
        **attributes,
    )
    return instance


def trl_pair_loss(loss_type, beta, chosen, rejected, lengths):
    """The loss of DPOTrainer for summed log-ratios, and its gradient. The tokens of a response share its sum equally."""
    logs = torch.tensor(np.concatenate([chosen, rejected]), dtype=torch.float64, requires_grad=True)
    length = torch.tensor(lengths)
    mask = (torch.arange(TOKENS) < length[:, None]).long()
    per_token = logs[:, None] / length[:, None] * mask
    zeros = torch.zeros(2 * PAIRS, TOKENS, dtype=torch.float64)

    def model(**_):
        return types.SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = bare(
        trl.DPOTrainer,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    prompt = torch.zeros(2 * PAIRS, 1, dtype=torch.long)
    rows = {
        "input_ids": torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, TOKENS + 1, dtype=torch.long),
        "completion_mask": torch.cat([prompt, mask], 1),
        "ref_chosen_logps": torch.zeros(PAIRS, dtype=torch.float64),
        "ref_rejected_logps": torch.zeros(PAIRS, dtype=torch.float64),
    }
    loss = trainer._compute_loss(model, rows, return_outputs=False)
    loss.backward()
    return loss.item(), logs.grad.numpy()


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("loss_type, objective", [("sigmoid", objectives.dpo), ("ipo", objectives.ipo)])
def test_dpo_and_ipo(loss_type, objective, beta):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 5, (2, PAIRS))
    lengths = rng.integers(1, TOKENS + 1, 2 * PAIRS)
    sign = jnp.repeat(jnp.array([1.0, -1.0]), PAIRS)
    group = jnp.tile(jnp.arange(PAIRS), 2)

    def ours(log_ratio):
        if loss_type == "ipo":  # trl averages over tokens
            log_ratio = log_ratio / lengths
        return objective(*objectives.pairs(log_ratio, sign, jnp.full(2 * PAIRS, 1 / PAIRS), group), beta)

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(np.concatenate([chosen, rejected]), jnp.float32))
    expected, slope = trl_pair_loss(loss_type, beta, chosen, rejected, lengths)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)


def trl_advantages(rewards):
    """The advantages of RLOOTrainer, from its code that generates and scores; every response has one token."""
    number = len(rewards)
    zeros = torch.zeros(number, 1)
    trainer = bare(
        trl.RLOOTrainer,
        args=types.SimpleNamespace(per_device_train_batch_size=number, gradient_checkpointing_kwargs=None),
        _generate=lambda prompts: ([[1]] * number, [[2]] * number, ["."] * number),
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (zeros, None, None),
        _calculate_rewards=lambda *_: torch.tensor(rewards)[:, None],
        num_generations=G,
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        beta=0.0,
        normalize_advantages=False,
        reward_func_names=["reward"],
        _logs={"rewards": collections.defaultdict(list), "extra": {}, "prompt": [], "completion": [], "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer.model.is_gradient_checkpointing = False
    return trainer._generate_and_score_completions([{"prompt": "?"}] * number)["advantages"].numpy()


def test_leave_one_out():
    rewards = np.random.default_rng(1).normal(size=QUESTIONS * G)
    weight = preferences.leave_one_out(jnp.asarray(rewards), jnp.repeat(jnp.arange(QUESTIONS), G))
    np.testing.assert_allclose(weight, trl_advantages(rewards), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("move", [0.0, 0.1])
def test_reinforce(move):
    """The loss of trl has r·A, with gradient r A ∇log π; ours has the weight r A. Without clipping, the gradients are equal."""
    rng = np.random.default_rng(2)
    advantages, old, moves = rng.normal(size=(3, QUESTIONS * G))
    log_prob = old + move * moves
    logs = torch.tensor(log_prob, requires_grad=True)
    trainer = bare(
        trl.RLOOTrainer,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logs[:, None], torch.zeros(len(logs), 1), None),
        epsilon_low=0.9,
        epsilon_high=0.9,
    )
    ones = torch.ones(len(logs), 1, dtype=torch.long)
    tokens = {name: ones for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    loss = trainer._compute_loss(None, tokens | {"old_logps": torch.tensor(old), "advantages": torch.tensor(advantages)})
    loss.backward()

    def ours(log_prob):
        group = jnp.repeat(jnp.arange(QUESTIONS), G)
        ratio = importance.response_weights("sequence", log_prob, jnp.asarray(old), jnp.ones(len(old)), group, 1.9)
        return objectives.likelihood(log_prob, ratio * advantages, jnp.full(len(old), 1 / len(old)))

    gradient = jax.grad(ours)(jnp.asarray(log_prob))
    np.testing.assert_allclose(gradient, logs.grad.numpy(), rtol=1e-4, atol=1e-7)
