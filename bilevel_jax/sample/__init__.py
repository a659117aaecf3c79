"""Responses of a model: the command `python -m bilevel_jax.sample`, and the function `bilevel_jax.sample(prompts, model)`.

A package and a function of one name: the package can be called.
"""

import sys
import types


class _Sample(types.ModuleType):
    def __call__(
        self,
        prompts,
        model=None,
        adapter=None,
        *,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=512,
        num_samples=1,
        seed=0,
        stop=(),
        template="auto",
        dtype="auto",
        quantization="none",
        batch_size=16,
        columns="",
    ) -> list[dict]:
        """Responses of a model to prompts.

        Args:
          prompts: objects with the fields of a schema (docs/data.md), of which the response is not used and may be missing: a list,
            a `datasets.Dataset`, a `pandas.DataFrame`, or what the command's --prompts takes, such as the name of a file.
          model: a model directory in Hugging Face format, or a hub id; None is the embedded model.
          adapter: a PEFT directory, such as `run.adapter_path`, or None.
          temperature: divides the logits; 0 is greedy.
          top_k: sample from the k most likely tokens; 0: from all.
          top_p: sample from the smallest set of most likely tokens with total probability of at least this.
          max_new_tokens: maximum length of a response, including the EOS.
          num_samples: responses to each prompt.
          seed: the same seed gives the same responses.
          stop: texts before which a response ends.
          template: of the prompt: `auto` (the tokenizer's chat template, else `human`), `chat`, `human`, `alpaca` or `none`.
          dtype: of the weights: `float32`, `bfloat16`, or `auto`, which is bfloat16 on accelerators and float32 on a CPU.
          quantization: of the model's linear layers: `none`, `nf4` or `int8`.
          batch_size: responses generated in parallel.
          columns: other names of columns, such as `question:query,response:answer`.

        Returns:
          An object for every prompt and sample, in order: `id`, `sample`, `text`, `tokens` (without the EOS), `logprob` (under the
          model), `sampled_logprob` (after temperature, top-k and top-p) and `finish_reason` (`stop` or `length`). A prompt that
          cannot be used has one object of None, with a `reason`.

        Raises:
          ValueError: an option is out of range.
          DataError: no prompt can be used.
          ModelError: the model or the adapter cannot be used.
        """
        from bilevel_jax import api

        with api.started():
            from bilevel_jax import inputs, sampling
            from bilevel_jax.sample import sampler

            ends = (stop,) if isinstance(stop, str) else tuple(stop)
            settings = sampling.Settings(temperature, top_k, top_p, max_new_tokens, ends)
            options = {"num_samples": num_samples, "seed": seed, "template": template, "dtype": dtype, "batch_size": batch_size}
            options |= {"columns": columns, "quantization": quantization}
            return sampler.sample(prompts, model or inputs.EMBEDDED, adapter, settings, **options)


sys.modules[__name__].__class__ = _Sample
