"""The model behind lm-eval's interface, with the conventions of its `hf` backend, so that scores agree.

Needs lm-eval (`pip install 'bilevel_jax[eval]'`), but no PyTorch.
"""

import jinja2
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from bilevel_jax import sampling, scoring, sharding
from bilevel_jax.data import limits, packing, token_ids
from bilevel_jax.models import attention, layer_settings

MAX_GEN_TOKS = 256  # default of a task, as in lm-eval
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


def read_options(options: dict) -> sampling.Settings:
    """A task's `generation_kwargs` as settings.

    Raises:
      ValueError: an option is not supported or out of range.
    """
    options = normalize_gen_kwargs(options, MAX_GEN_TOKS)  # one name for the maximum length
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise ValueError(f"generation option {unknown[0]!r} is not supported; supported are {', '.join(OPTIONS)}")
    temperature = float(options.get("temperature", 0)) if options["do_sample"] else 0.0
    if options["do_sample"] and not temperature:
        raise ValueError("generation option do_sample=True needs a temperature above 0")
    stop = tuple(end for end in options["until"] if end)
    return sampling.Settings(temperature, options.get("top_k", 0), options.get("top_p", 1.0), options["max_gen_toks"], stop)


class JaxLM(TemplateLM):
    """A model with or without an adapter. lm-eval's own code turns texts into token requests.

    Args:
      model, base, adapter: config, weights and adapter (or None) from `huggingface`.
      tokenizer: of Hugging Face; has an EOS.
      eos: ids that end a generated text.
      batch_size: number of packed sequences scored, or of texts generated, in parallel.
      max_length: maximum number of tokens of the input; by default the model's number of positions.
    """

    def __init__(self, model, base, adapter, tokenizer, eos, *, batch_size: int = 8, max_length: int | None = None):
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token, which lm-eval needs")
        self.model, self.base, self.adapter, self.tokenizer, self.eos = model, base, adapter, tokenizer, tuple(eos)
        self.batch_size, self.max_length = batch_size, max_length or model.max_positions
        self.mesh = sharding.make_mesh(1)
        self._prefix = tokenizer.decode(self.prefix_token_id)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        special = not string.startswith(self._prefix) if add_special_tokens is None else add_special_tokens
        tokens = self.tokenizer.encode(string, add_special_tokens=special, verbose=False)
        if problem := token_ids.outside(np.array(tokens, np.int32), self.tokenizer, self.model.vocab_size):
            raise token_ids.TokenError(problem)
        return tokens

    def tok_decode(self, tokens) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return limits.render(self.tokenizer, chat_history, **options)
        except jinja2.TemplateError:  # as in lm-eval: some templates refuse a system text
            chat_history = [message for message in chat_history if message["role"] != "system"]
            return limits.render(self.tokenizer, chat_history, **options)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding generates it.

        Args:
          requests: (texts or None, context ids, continuation ids). A context that does not fit loses its beginning.
        """
        segment_index: dict[tuple, int] = {}  # equal requests are scored once
        indices = []
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                size = f"{len(continuation)} tokens after {len(context)}"
                raise ValueError(f"a request of {size} cannot be scored within {self.max_length} positions: {texts!r:.200}")
            room = self.max_length + 1 - len(continuation)
            key = tuple(context[-room:]), tuple(continuation)
            indices.append(segment_index.setdefault(key, len(segment_index)))
        segments = [
            packing.Segment(np.array(context, np.int32), np.array(continuation, np.int32))
            for context, continuation in segment_index
        ]
        nll, _, greedy = self._score(segments)
        _check_numbers(nll)
        return [(-float(nll[i]), bool(greedy[i])) for i in indices]

    def _score(self, segments: list[packing.Segment]) -> tuple[np.ndarray, ...]:
        model = layer_settings.for_length(self.model, max((segment.size for segment in segments), default=0))
        # A request is up to one token longer than the input: the last token is only predicted.
        score = scoring.make_scorer(model, self.batch_size, self.max_length + 1, self.mesh, greedy=True)
        return score(self.base, self.adapter, segments, "scoring")

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, request_indices = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                request_indices.append(index)
        totals = [0.0] * len(requests)
        for index, (log_likelihood, _) in zip(request_indices, self._loglikelihood_tokens(windows)):
            totals[index] += log_likelihood
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        groups: dict[sampling.Settings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(read_options(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for settings, indices in groups.items():
            for index, text in zip(indices, self._generate([requests[i].args[0] for i in indices], settings)):
                texts[index] = text
        return texts

    def _generate(self, contexts: list[str], settings: sampling.Settings) -> list[str]:
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks={settings.max_new_tokens} leaves no room for a prompt in {self.max_length} positions")
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        # Generated texts skip special tokens, so a stop string that is a special token becomes an end id.
        special = [self.tokenizer.convert_tokens_to_ids(end) for end in settings.stop if end in self.tokenizer.all_special_tokens]
        length = min(attention.cache_window(max(map(len, prompts)) + settings.max_new_tokens), self.max_length)
        sample = sampling.make_sampler(
            layer_settings.for_length(self.model, length),
            settings,
            (*self.eos, *special),
            slots=min(self.batch_size, len(prompts)),
            length=length,
            mesh=self.mesh,
            detokenize=self.tok_decode,
        )
        keys = sampling.row_keys(0, map(str, range(len(prompts))), 0, 1)
        responses = sample(self.base, self.adapter, [np.array(prompt, np.int32) for prompt in prompts], keys, "generating")
        texts = []
        for (response,) in responses:
            _check_numbers(response.log_probs)
            ends = [*settings.stop, self.tokenizer.eos_token]
            texts.append(postprocess_generated_text(self.tok_decode(response.ids), ends, think_end_token=None))
        return texts


def _check_numbers(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError("the model's probabilities are not numbers; are its weights damaged?")
