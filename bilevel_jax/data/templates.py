"""Renders rows as text and tokenizes them: prompt templates, EOS, and the maximum length.

    chat     the tokenizer's chat template, with the header of the assistant's turn
    human    [system, blank line] "Human: …\\n\\nAssistant: ", earlier turns in the same form
    alpaca   [system, blank line] the prompt of Stanford Alpaca, with an input section if the row has an input
    none     the question, verbatim; no system text and no special tokens
    auto     chat if the tokenizer has a chat template, else human

Prompt and response are tokenized *separately*. In one text, the space at the end of a prompt would merge into the first word of the
response, and a loss that starts at the prompt's length would miss that word. The end of a prompt is stored as a position and not
derived from the pad id, so that the EOS is learned even if it is also the pad token.

Every response ends with EOS unless `eos=False`. `human` and `alpaca` start with BOS if the tokenizer adds one; a chat template
writes its own BOS, or none.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from bilevel_jax.data import limits
from bilevel_jax.data.rejections import Rejection, location, tally
from bilevel_jax.data.rows import Row

TEMPLATES = ("auto", "chat", "human", "alpaca", "none")
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

    @property
    def size(self) -> int:
        """Number of tokens of question and response, P + R."""
        return len(self.prompt) + len(self.response)


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
        limits.tokenize(tokenizer, ["a"])  # some damaged files fail only here
        return tokenizer
    except Exception as error:  # missing and damaged files raise many types of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
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
    if template == "none":
        return row.question
    system = f"{row.system}\n\n" if row.system else ""
    if template == "human":
        return system + _labelled(row.messages, HUMAN)
    if row.schema == "instruction/input/output" and (row.fields.get("input") or "").strip():
        instruction = f"{row.fields['instruction']}\n\n### Input:\n{row.fields['input']}"
        return system + ALPACA_INPUT_HEADER + _labelled((("user", instruction),), ALPACA)
    return system + ALPACA_HEADER + _labelled(row.messages, ALPACA)


def encode(rows: Sequence[Row], tokenizer, *, template: str | None, eos: bool = True) -> list[Example]:
    """Tokenizes rows, in order.

    Raises:
      ValueError: an unusable template (see `resolve`), a row that the chat template rejects, or `eos` for a tokenizer without EOS.
    """
    template = resolve(template, tokenizer)
    if eos and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token to end a response; turn EOS off")
    head = [tokenizer.bos_token_id] if template in ("human", "alpaca") and _adds_bos(tokenizer) else []
    tail = [tokenizer.eos_token_id] if eos else []
    reasons = [refusal(row, tokenizer, template) for row in rows]
    usable = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    prompts = iter(_tokenize((render(row, tokenizer, template) for row in usable), len(usable), tokenizer, "prompts"))
    texts = (response_text(row, tokenizer) for row in usable)
    responses = iter(_tokenize(texts, len(usable), tokenizer, "responses"))
    pairs = [row for row in usable if row.rejected is not None]
    rejected = iter(_tokenize((row.rejected for row in pairs), len(pairs), tokenizer, "rejected responses"))

    def example(row: Row, reason: str | None) -> Example:
        if reason:
            return Example(_ids(), _ids(), None, reason)
        prompt, response = _ids(head, next(prompts)), _ids(next(responses), tail)
        return Example(prompt, response if row.response else _ids(), None if row.rejected is None else _ids(next(rejected), tail))

    return [example(row, reason) for row, reason in zip(rows, reasons, strict=True)]


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
    head, eos, tail = text.rpartition(tokenizer.eos_token or "\n")
    return head if eos and not tail.strip() else text


def _ends_with_call(row: Row) -> bool:
    return bool(row.chat and row.response and "tool_calls" in row.chat[-1])


def _full_text(row: Row, tokenizer) -> str:
    return _chat(row, messages_of(row, with_response=True), tokenizer, add_generation_prompt=False)


# --------------------------------------------------------------------------------------------------------------------
# Lengths and tokens
# --------------------------------------------------------------------------------------------------------------------


def response_offsets(rows: Sequence[Row], examples: Sequence[Example], tokenizer) -> list[np.ndarray]:
    """Character offsets of every response token: for each row [R, 2] int32, [start, stop), with start = stop for EOS.

    Raises:
      ValueError: the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no character offsets; it needs a tokenizer.json")
    offsets = []
    for first in range(0, len(rows), CHUNK):
        texts = [response_text(row, tokenizer) for row in rows[first : first + CHUNK]]
        encoded = limits.tokenize(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
        for text, token_offsets, example in zip(texts, encoded["offset_mapping"], examples[first : first + CHUNK]):
            offsets.append(np.array([*token_offsets, (len(text), len(text))], np.int32)[: len(example.response)])
    return offsets


def fit(
    examples: Sequence[Example], rows: Sequence[Row], max_length: int
) -> tuple[list[int], list[Example], Mapping[str, tuple[int, int]]]:
    """Truncates or skips examples that do not fit into `max_length` tokens.

    A truncated response has no EOS: it would teach the model to stop in the middle of a sentence. A preference row is never
    truncated, since that could change which response is better. Its two responses, each with the prompt, share a packed sequence
    and must fit together.

    Returns:
      kept: indices into `examples` of the remaining ones, in order.
      examples: the remaining examples, truncated.
      counts: note -> (count, line of the first row), as in `Report.rejected`.
    """
    kept, fitted, notes = [], [], []
    for index, (example, row) in enumerate(zip(examples, rows, strict=True)):
        room = max_length - len(example.prompt)
        responses = [example.response] if example.rejected is None else [example.response, example.rejected]
        if example.reason:
            note = example.reason
        elif not len(example.prompt) or not all(len(response) for response in responses):
            note = "question or response without a token"
        elif example.rejected is not None:
            length = sum(len(example.prompt) + len(response) for response in responses)
            note = f"pair over {max_length} tokens" if length > max_length else None
        else:
            note = f"question over {max_length} tokens" if room < 1 else None
        if note is None:
            if len(example.response) > room:
                notes.append(Rejection(row.line, f"response cut to {max_length} tokens"))
                example = dataclasses.replace(example, response=example.response[:room])
            kept.append(index)
            fitted.append(example)
        else:
            notes.append(Rejection(row.line, note))
    return kept, fitted, tally(notes)


def _labelled(turns: Sequence[tuple[str, str]], labels: Mapping[str, str]) -> str:
    return "".join(f"{labels[role]}{content}\n\n" for role, content in turns) + labels["assistant"]


def _chat(row: Row, messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    options = {"tools": row.tools} if row.tools else {}
    try:
        return limits.render(tokenizer, messages, add_generation_prompt=add_generation_prompt, **options)
    except limits.LimitError as error:  # no row is left out for it: each would take as long
        raise limits.LimitError(f"the chat template on the row of line {row.line} (id {row.id}): {error}") from error
    except Exception as error:  # rejected rows, for example system texts, and any error in the template
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = location(row.line.file, row.line) if getattr(row.line, "file", "") else f"line {row.line}"
        raise ValueError(f"the chat template refuses the row of {where} (id {row.id}): {reason}") from error


def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _tokenize(texts, total: int, tokenizer, name: str) -> list[list[int]]:
    """Token ids of each text, without special tokens; shows a progress bar after two seconds."""
    texts, ids = iter(texts), []
    with tqdm.tqdm(total=total, desc=f"tokenizing {name}", delay=2, leave=False, disable=None) as bar:
        while chunk := list(itertools.islice(texts, CHUNK)):
            ids += limits.tokenize(tokenizer, chunk, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            bar.update(len(chunk))
    return ids


def _ids(*parts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in (*parts, ())])
