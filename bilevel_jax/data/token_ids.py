"""Whether a model has all tokens that its tokenizer writes.

JAX clamps an index that is out of range. A token id beyond the model's vocabulary would be read as the last token of the vocabulary
in a prompt, and give NaN in a response.
"""

from collections.abc import Iterable

import numpy as np

from bilevel_jax.data.templates import Example


class TokenError(ValueError):
    """The tokenizer does not belong to the model; the message is one line."""


def outside(tokens: np.ndarray, tokenizer, vocab_size: int) -> str:
    """Describes the first token that a model with `vocab_size` tokens does not have; "" if it has all."""
    beyond = np.flatnonzero(np.asarray(tokens) >= vocab_size)
    if not len(beyond):
        return ""
    token = int(tokens[beyond[0]])
    name = tokenizer.convert_ids_to_tokens(token)
    return (
        f"token {token} ({name!r:.80}) is not in the model's vocabulary of {vocab_size}; the tokenizer has {len(tokenizer)} tokens"
    )


def check(examples: Iterable[Example], tokenizer, vocab_size: int) -> None:
    """Refuses rows with a token that the model does not have.

    Raises:
      TokenError: names the token and the sizes of both vocabularies.
    """
    if getattr(examples, "largest_token", vocab_size) < vocab_size:  # of prepared rows
        return
    for example in examples:
        for tokens in (example.prompt, example.response, example.rejected):
            if tokens is not None and (problem := outside(tokens, tokenizer, vocab_size)):
                raise TokenError(f"{problem}. Take the tokenizer of the model, or enlarge the model's embedding")
