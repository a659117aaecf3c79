"""Renders rows as text and tokenizes them: prompt templates, EOS, and the maximum length.

    chat     the tokenizer's chat template, with the header of the assistant's turn
    human    [system, blank line] "Human: …\\n\\nAssistant: ", earlier turns in the same form
    alpaca   [system, blank line] the prompt of Stanford Alpaca, with an input section if the row has an input
    none     the question, verbatim; no system text and no special tokens
    auto     chat if the tokenizer has a chat template, else human

Prompt and response are tokenized *separately*. In one text, the space at the end of a prompt would merge into the first word of the
response, and a loss that starts at the prompt's length would miss that word. The end of a prompt is stored as a position and not
derived from the pad id, so that the EOS is learned even if it is also the pad token.

Earlier answers in the prompt are learned too unless `learn="last"`, see `turns`.

Every response ends with the special token that the chat template writes after an answer, else with EOS, unless `eos=False`. `human`
and `alpaca` start with BOS if the tokenizer adds one; a chat template writes its own BOS, or none.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bilevel_jax import errors, progress
from bilevel_jax.data import limits, tokenization, turns
from bilevel_jax.data.messages import Unusable
from bilevel_jax.data.rejections import Rejection, location, tally
from bilevel_jax.data.rows import Row

LEARN = ("all", "last")
TEMPLATES = ("auto", "chat", "human", "alpaca", "none")
CUT = "cut to"  # in the notes of `fit` on rows that remain
CHUNK = 1024  # texts per tokenizer call: enough to use all its threads

HUMAN = {"user": "Human: ", "assistant": "Assistant: "}
ALPACA = {"user": "### Instruction:\n", "assistant": "### Response:"}
ALPACA_HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT_HEADER = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """The token ids of a row."""

    prompt: np.ndarray  # [P] int32
    response: np.ndarray  # [R] int32, including EOS; empty if the row has only a question
    rejected: np.ndarray | None  # [R'] int32, including EOS; None unless the row is a preference
    reason: str | None = None  # why the template cannot render the row, which then has no tokens
    earlier: turns.Spans = ()  # tokens of `prompt` that are learned: the answers before the response
    ends_early: bool = False  # the conversation is cut: `response` is an earlier answer of the row

    @property
    def size(self) -> int:
        """Number of tokens of question and response, P + R."""
        return len(self.prompt) + len(self.response)

    @property
    def token_bytes(self) -> bytes:
        """All tokens as bytes, for fingerprints: each part that the example has, with -1 after it."""
        earlier = np.ravel(self.earlier) if self.earlier else None
        parts = (self.prompt, self.response, self.rejected, earlier)
        return b"".join(np.append(part, -1).astype("<i4").tobytes() for part in parts if part is not None)

    @property
    def num_learned(self) -> int:
        """Number of learned tokens: the response, and the answers before it."""
        return len(self.response) + sum(stop - start for start, stop in self.earlier)


def load_tokenizer(path: str):
    """Loads the Hugging Face tokenizer of a directory or hub id, without PyTorch and without running remote code.

    Raises:
      ValueError: there is no usable tokenizer; the message is one line.
    """
    # On import, transformers logs advice to install PyTorch, which a tokenizer does not need. Other messages are kept.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenization.tokenize(tokenizer, ["a"])  # some damaged files fail only here
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # what transformers makes without its files
            raise ValueError("it has no tokens but special ones; is tokenizer.json missing?")
        return tokenizer
    except Exception as error:  # missing and damaged files raise many types of errors
        reason = errors.first_line(error)
        raise ValueError(f"no usable tokenizer at '{path}': {reason.rstrip(': ')}") from error


def resolve(template: str | None, tokenizer) -> str:
    """Resolves `auto` (or None) to `chat` or `human`; returns other templates unchanged.

    Raises:
      ValueError: an unknown template, or `chat` for a tokenizer without a chat template.
    """
    template = template or "auto"
    if template not in TEMPLATES:
        raise ValueError(f"unknown template '{template}'; choose one of {', '.join(TEMPLATES)}")
    if template == "auto":
        return "chat" if tokenizer.chat_template else "human"
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(f"template 'chat': the tokenizer '{tokenizer.name_or_path}' has no chat template")
    return template


def render(row: Row, tokenizer, template: str) -> str:
    """The prompt of a row as text, up to the start of the response; `template` as returned by `resolve`."""
    if template == "chat":
        return _chat(row, messages_of(row, with_response=False), tokenizer, add_generation_prompt=True)
    return turns.joined(_parts(row, template)).text


def encode(rows: Sequence[Row], tokenizer, *, template: str | None, eos: bool = True, learn: str = "all") -> list[Example]:
    """Tokenizes rows, in order.

    Args:
      rows: with `learn="all"` the answers before the response are learned too, except those of preferences.
      tokenizer: of the model.
      template: see `resolve`.
      eos: whether the response ends with the end of a turn.
      learn: `all` or `last`.

    Raises:
      ValueError: an unusable template (see `resolve`), a row that the chat template rejects, or `eos` for a tokenizer without EOS.
    """
    encode_rows = make_encoder(tokenizer, template=template, eos=eos, learn=learn)
    examples = []
    with progress.bar(total=len(rows), desc="tokenizing", unit="row") as bar:
        for first in range(0, len(rows), CHUNK):
            chunk = rows[first : first + CHUNK]
            examples += encode_rows(chunk)
            bar.update(len(chunk))
    return examples


def make_encoder(
    tokenizer, *, template: str | None, eos: bool = True, learn: str = "all"
) -> Callable[[Sequence[Row]], list[Example]]:
    """A function that tokenizes some rows at a time; arguments and errors as for `encode`."""
    template = resolve(template, tokenizer)
    if learn not in LEARN:
        raise ValueError(f"learn={learn!r} is not among {', '.join(LEARN)}")
    if eos and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token; set eos_token in its tokenizer_config.json")
    head = [tokenizer.bos_token_id] if template in ("human", "alpaca") and _adds_bos(tokenizer) else []
    form = _form(tokenizer, template)
    tail = [tokenizer.convert_tokens_to_ids(form.end) if form.end else tokenizer.eos_token_id] if eos else []

    def encode_rows(rows: Sequence[Row]) -> list[Example]:
        with limits.many():
            prompts = [_prompt(row, tokenizer, template, learn, form) for row in rows]
        return _encode(rows, prompts, tokenizer, head, tail)

    return encode_rows


def _encode(
    rows: Sequence[Row], prompts: Sequence[turns.Prompt | str], tokenizer, head: list[int], tail: list[int]
) -> list[Example]:
    """The examples of rows with their prompts, or with the reasons why they have none."""
    usable = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if isinstance(prompt, turns.Prompt)]
    encoded = turns.tokenize([prompt for _, prompt in usable], tokenizer) if usable else iter(())
    responses = iter(tokenization.token_ids(tokenizer, [response_text(row, tokenizer) for row, _ in usable]))
    rejected = iter(tokenization.token_ids(tokenizer, [row.rejected for row, _ in usable if row.rejected is not None]))

    def example(row: Row, prompt: turns.Prompt | str) -> Example:
        if isinstance(prompt, str):
            return Example(_ids(), _ids(), None, reason=prompt)
        (ids, answers), response = next(encoded), _ids(next(responses), tail)
        return Example(
            prompt=_ids(head, ids),
            response=response if row.response else _ids(),
            rejected=None if row.rejected is None else _ids(next(rejected), tail),
            earlier=tuple((len(head) + start, len(head) + stop) for start, stop in answers),
        )

    return [example(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def _prompt(row: Row, tokenizer, template: str, learn: str, form: turns.Form) -> turns.Prompt | str:
    """The prompt of a row with the earlier answers to learn, or the reason why the template cannot render it."""
    if reason := refusal(row, tokenizer, template):
        return reason
    if template != "chat":
        prompt = turns.joined(_parts(row, template))
    else:
        prompt = turns.Prompt(render(row, tokenizer, template))
    if learn == "last" or row.rejected is not None or not any(role == "assistant" for role, _ in row.messages):
        return turns.Prompt(prompt.text)
    if template != "chat":
        return prompt

    def rendered(messages: Sequence[dict], add_generation_prompt: bool) -> str:
        return _chat(row, list(messages), tokenizer, add_generation_prompt)

    try:
        return prompt._replace(answers=turns.in_chat(messages_of(row, with_response=False), prompt.text, rendered, form))
    except Unusable as error:
        return str(error)


# --------------------------------------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------------------------------------


def messages_of(row: Row, with_response: bool) -> list[dict]:
    """The messages of a row as a chat template takes them."""
    system = [{"role": "system", "content": row.system}] if row.system else []
    if row.chat:
        return system + list(row.chat if with_response or not row.response else row.chat[:-1])
    messages = [{"role": role, "content": content} for role, content in row.messages]
    return system + messages + ([{"role": "assistant", "content": row.response}] if with_response else [])


def refusal(row: Row, tokenizer, template: str) -> str | None:
    """Why a template cannot render the tools of a row; None if it can, or if there are none. `template` is from `resolve`."""
    if not row.chat:
        return None
    if template != "chat":
        return f"tools, which need a chat template; the template here is '{template}'"
    source = tokenizer.get_chat_template(tools=row.tools)
    if row.tools and "tools" not in source:
        return "tools, which the chat template does not render"
    if any("tool_calls" in message for message in row.chat) and "tool_calls" not in source:
        return "tool calls, which the chat template does not render"
    try:
        prompt, text = render(row, tokenizer, template), _full_text(row, tokenizer)
    except ValueError:
        return "tool calls or results that the chat template refuses"
    if _ends_with_call(row) and not text.startswith(prompt):
        return "a tool call that the chat template does not put after the prompt"
    return None


def response_text(row: Row, tokenizer) -> str:
    """The response as text without EOS; of a tool call, what the chat template writes after the prompt."""
    if not _ends_with_call(row):
        return row.response
    text = _full_text(row, tokenizer)[len(render(row, tokenizer, "chat")) :]
    return turns.without_end(text, _form(tokenizer, "chat").end or tokenizer.eos_token or "\n")


def _ends_with_call(row: Row) -> bool:
    return bool(row.chat and row.response and "tool_calls" in row.chat[-1])


def ends(eos: Sequence[int], tokenizer, template: str | None) -> tuple[int, ...]:
    """The ids that end a response: those of the model, and the token that the template writes after an answer."""
    end = _form(tokenizer, resolve(template, tokenizer)).end
    return tuple(dict.fromkeys([*eos, tokenizer.convert_tokens_to_ids(end)] if end else eos))


def _form(tokenizer, template: str) -> turns.Form:
    if template != "chat":
        return turns.Form("", "")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    row = Row(id="", system="", messages=(), response="", rejected=None, source="", fields={}, line=0, schema="")

    def rendered(messages: Sequence[dict], add_generation_prompt: bool) -> str:
        return _chat(row, list(messages), tokenizer, add_generation_prompt)

    return turns.form_of(rendered, special.union(tokenizer.all_special_tokens))


def _full_text(row: Row, tokenizer) -> str:
    return _chat(row, messages_of(row, with_response=True), tokenizer, add_generation_prompt=False)


# --------------------------------------------------------------------------------------------------------------------
# Lengths and tokens
# --------------------------------------------------------------------------------------------------------------------


def response_offsets(rows: Sequence[Row], examples: Sequence[Example], tokenizer) -> list[np.ndarray]:
    """Character offsets of every response token: for each row [R, 2] int32, [start, stop), with start = stop for EOS.

    A conversation that is cut to an earlier answer has none, [0, 2].

    Raises:
      ValueError: the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no character offsets; it needs a tokenizer.json")
    offsets = []
    for first in range(0, len(rows), CHUNK):
        texts = [response_text(row, tokenizer) for row in rows[first : first + CHUNK]]
        encoded = tokenization.tokenize(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
        for text, token_offsets, example in zip(texts, encoded["offset_mapping"], examples[first : first + CHUNK]):
            number = 0 if example.ends_early else len(example.response)
            offsets.append(np.array([*token_offsets, (len(text), len(text))], np.int32)[:number])
    return offsets


def fit(
    examples: Sequence[Example], rows: Sequence[Row], max_length: int, cut_turns: bool = True
) -> tuple[list[int], list[Example], Mapping[str, tuple[int, int]]]:
    """Truncates or skips examples that do not fit into `max_length` tokens.

    A truncated response has no EOS: it would teach the model to stop in the middle of a sentence. A conversation whose last
    question does not fit ends with the last answer that fits, which may be truncated too. A preference row is never truncated,
    since that could change which response is better. Its two responses, each with the prompt, share a packed sequence and must fit
    together.

    Args:
      examples, rows: in the same order.
      max_length: in tokens.
      cut_turns: whether a conversation may end with an earlier answer; otherwise its row is skipped.

    Returns:
      kept: indices into `examples` of the remaining ones, in order.
      examples: the remaining examples, truncated.
      counts: note -> (count, line of the first row), as in `Report.rejected`.
    """
    kept, fitted, notes = [], [], []
    for index, (example, row) in enumerate(zip(examples, rows, strict=True)):
        shorter, note = fit_one(example, max_length, cut_turns)
        if note:
            notes.append(Rejection(row.line, note))
        if shorter is not None:
            kept.append(index)
            fitted.append(shorter)
    return kept, fitted, tally(notes)


def fit_one(example: Example, max_length: int, cut_turns: bool = True) -> tuple[Example | None, str]:
    """An example as `fit` leaves it, None if it is skipped, and the note on it; "" if it fits as it is."""
    room = max_length - len(example.prompt)
    responses = [example.response] if example.rejected is None else [example.response, example.rejected]
    if example.reason:
        return None, example.reason
    if not len(example.prompt) or not all(len(response) for response in responses):
        return None, "question or response without a token"
    if example.rejected is not None:
        length = sum(len(example.prompt) + len(response) for response in responses)
        return (None, f"pair over {max_length} tokens") if length > max_length else (example, "")
    if room < 1:
        shorter = _cut(example, max_length) if cut_turns else None
        note = f"question over {max_length} tokens" if shorter is None else f"conversation {CUT} {max_length} tokens"
        return shorter, note
    if len(example.response) > room:
        return dataclasses.replace(example, response=example.response[:room]), f"response {CUT} {max_length} tokens"
    return example, ""


def _cut(example: Example, max_length: int) -> Example | None:
    """A conversation that ends with the last earlier answer that starts within `max_length` tokens; None if there is none."""
    fitting = [(start, stop) for start, stop in example.earlier if 0 < start < min(stop, max_length)]
    if not fitting:
        return None
    start, stop = fitting.pop()
    response = example.prompt[start : min(stop, max_length)]
    earlier = tuple(span for span in example.earlier if span[1] <= start)
    return dataclasses.replace(example, prompt=example.prompt[:start], response=response, earlier=earlier, ends_early=True)


def _parts(row: Row, template: str) -> list[tuple[str, bool]]:
    """The texts of a prompt without a chat template, each with whether it is an answer of the assistant."""
    if template == "none":
        parts = [part for role, content in row.messages for part in (("\n\n", False), (content, role == "assistant"))]
        return parts[1:]
    system = [(f"{row.system}\n\n", False)] if row.system else []
    if template == "human":
        return [*system, *_labelled(row.messages, HUMAN)]
    if row.schema == "instruction/input/output" and (row.fields.get("input") or "").strip():
        instruction = f"{row.fields['instruction']}\n\n### Input:\n{row.fields['input']}"
        return [*system, (ALPACA_INPUT_HEADER, False), *_labelled((("user", instruction),), ALPACA)]
    return [*system, (ALPACA_HEADER, False), *_labelled(row.messages, ALPACA)]


def _labelled(messages: Sequence[tuple[str, str]], labels: Mapping[str, str]) -> list[tuple[str, bool]]:
    written = ([(labels[role], False), (content, role == "assistant"), ("\n\n", False)] for role, content in messages)
    return [part for parts in written for part in parts] + [(labels["assistant"], False)]


def _chat(row: Row, messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    options = {"tools": row.tools} if row.tools else {}
    try:
        return limits.render(tokenizer, messages, add_generation_prompt=add_generation_prompt, **options)
    except limits.LimitError as error:  # no row is left out for it: each would take as long
        raise limits.LimitError(f"the chat template on the row of line {row.line} (id {row.id}): {error}") from error
    except Exception as error:  # rejected rows, for example system texts, and any error in the template
        reason = errors.first_line(error)
        file = getattr(row.line, "file", "")
        where = location(file, row.line) if file else f"line {row.line}"
        raise ValueError(f"the chat template refuses the row of {where} (id {row.id}): {reason}") from error


def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _ids(*parts: Sequence[int]) -> np.ndarray:
    return np.array(list(itertools.chain(*parts)), np.int32)
