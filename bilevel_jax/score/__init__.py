"""The losses of responses: the command `python -m bilevel_jax.score`, and the function `bilevel_jax.score(rows, model)`.

A package and a function of one name: the package can be called.
"""

import sys
import types


class _Score(types.ModuleType):
    def __call__(
        self,
        rows,
        model=None,
        adapter=None,
        *,
        template="auto",
        eos=True,
        learn="all",
        dtype="auto",
        quantization="none",
        batch_size=8,
        columns="",
    ) -> list[dict]:
        """The loss of the response of every row, under a model.

        Args:
          rows: objects with the fields of a schema (docs/data.md): a list, a `datasets.Dataset`, a `pandas.DataFrame`, or what the
            command's --data takes, such as the name of a file.
          model: a model directory in Hugging Face format, or a hub id; None is the embedded model.
          adapter: a PEFT directory, such as `run.adapter_path`, or None.
          template: of the prompt: `auto` (the tokenizer's chat template, else `human`), `chat`, `human`, `alpaca` or `none`.
          eos: whether the EOS after the response counts.
          learn: which answers of a conversation are scored: `all`, or the `last` one.
          dtype: of the weights: `float32`, `bfloat16`, or `auto`, which is bfloat16 on accelerators and float32 on a CPU.
          quantization: of the model's linear layers: `none`, `nf4` or `int8`.
          batch_size: packed sequences per forward pass.
          columns: other names of columns, such as `question:query,response:answer`.

        Returns:
          An object for every row, in order: `id`, `loss` (mean negative log-likelihood of the tokens of the response, nats),
          `logprob` (the sum of their log-probabilities) and `num_tokens`. A row that cannot be scored has None for `loss` and
          `logprob`, and a `reason`.

        Raises:
          ValueError: an option is out of range.
          DataError: no row is usable.
          ModelError: the model or the adapter cannot be used.
        """
        from bilevel_jax import api

        options = {"template": template, "eos": eos, "learn": learn, "dtype": dtype, "batch_size": batch_size, "columns": columns}
        options["quantization"] = quantization
        with api.started():
            from bilevel_jax import inputs
            from bilevel_jax.score import scorer

            return scorer.score(rows, model or inputs.EMBEDDED, adapter, **options)


sys.modules[__name__].__class__ = _Score
