"""From rows to token ids: prompt templates, the end of a response, and what fits into the maximal length.

    chat     the tokenizer's own chat template, with the assistant's turn opened
    human    [system, blank line] "Human: …\\n\\nAssistant: ", earlier turns alternating in the same way
    alpaca   [system, blank line] the prompt of Stanford Alpaca, with its input section where the row has an input
    none     the question, verbatim; no system text and no special tokens
    auto     chat where the tokenizer has a chat template, else human

Prompt and response are tokenized *apart*. Tokenized as one text, the space that ends a prompt merges into the first
word of the response, and a loss that begins at the prompt's length then misses this word. From here on, where a prompt
ends is known by position and never by a pad id, so that the EOS is learned even where it pads.

The EOS follows every response unless asked not to. A BOS comes first where the tokenizer itself puts one, under `human`
and `alpaca`; a chat template writes its own, or means that there is none.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from bilevel_jax.data.rows import Rejection, Row, tally

TEMPLATES = ("auto", "chat", "human", "alpaca", "none")
CHUNK = 1024  # texts per call of the tokenizer: enough to keep its threads busy

HUMAN = {"user": "Human: ", "assistant": "Assistant: "}
ALPACA = {"user": "### Instruction:\n", "assistant": "### Response:"}
ALPACA_HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT_HEADER = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in token ids."""

    prompt: np.ndarray  # [P] int32
    response: np.ndarray  # [R] int32, the EOS included; empty where the row has a question only
    rejected: np.ndarray | None  # [R'] int32, the EOS included; None unless the row is a preference

    @property
    def size(self) -> int:
        """Tokens of question and response, P + R."""
        return len(self.prompt) + len(self.response)


def load_tokenizer(path: str):
    """The Hugging Face tokenizer of a directory or hub id; it needs no PyTorch and runs no code from there.

    Raises:
      ValueError: if there is none, in one line.
    """
    # Importing transformers advises on installing PyTorch, which a tokenizer does not need. Nothing else is silenced.
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer(["a"], verbose=False)  # some damage shows only here
        return tokenizer
    except Exception as error:  # missing and broken files surface as errors of every family
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no usable tokenizer at '{path}': {reason.rstrip(': ')}") from error


def resolve(template: str | None, tokenizer) -> str:
    """The template that is meant: `chat`, `human`, `alpaca` or `none`. Python's None means `auto`.

    Raises:
      ValueError: for an unknown name, and for `chat` without a chat template.
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
    """The prompt of a row as text, up to where the response begins; `template` as returned by `resolve`."""
    if template == "chat":
        return _chat(row, tokenizer)
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
      ValueError: for a template that cannot be used (see `resolve`), a row that the chat template refuses, or an EOS
        asked of a tokenizer that has none.
    """
    template = resolve(template, tokenizer)
    if eos and tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' has no EOS token to end a response; turn EOS off")
    head = [tokenizer.bos_token_id] if template in ("human", "alpaca") and _adds_bos(tokenizer) else []
    tail = [tokenizer.eos_token_id] if eos else []
    prompts = _tokenize((render(row, tokenizer, template) for row in rows), len(rows), tokenizer, "prompts")
    responses = _tokenize((row.response for row in rows), len(rows), tokenizer, "responses")
    pairs = [row for row in rows if row.rejected is not None]
    rejected = iter(_tokenize((row.rejected for row in pairs), len(pairs), tokenizer, "rejected responses"))
    return [
        Example(
            prompt=_ids(head, prompt),
            response=_ids(response, tail) if row.response else _ids(),
            rejected=None if row.rejected is None else _ids(next(rejected), tail),
        )
        for row, prompt, response in zip(rows, prompts, responses, strict=True)
    ]


def response_offsets(rows: Sequence[Row], examples: Sequence[Example], tokenizer) -> list[np.ndarray]:
    """Where in its response each token of it stands, [T, 2] of each row: [start, stop) in characters, empty for an EOS at the end.

    Raises:
      ValueError: the tokenizer does not tell.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' does not tell where a token stands; it needs a tokenizer.json")
    found = []
    for first in range(0, len(rows), CHUNK):
        texts = [row.response for row in rows[first : first + CHUNK]]
        asked = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, offsets, example in zip(texts, asked["offset_mapping"], examples[first : first + CHUNK]):
            found.append(np.array([*offsets, (len(text), len(text))], np.int32)[: len(example.response)])
    return found


def fit(
    examples: Sequence[Example], rows: Sequence[Row], max_length: int
) -> tuple[list[int], list[Example], Mapping[str, tuple[int, int]]]:
    """Drops and cuts what does not fit into `max_length` tokens.

    A response is cut at the end, its EOS with it: an EOS after half a sentence would teach the model to stop there. A
    preference row is never cut, since that could change which answer is better; its two answers, each with the prompt,
    lie side by side in one packed row and must fit together.

    Returns:
      kept: indices into `examples` of those that remain, in order.
      examples: those that remain, cut.
      counts: what happened -> (count, line of the first row), in the form of `Report.rejected`.
    """
    kept, fitted, notes = [], [], []
    for index, (example, row) in enumerate(zip(examples, rows, strict=True)):
        room = max_length - len(example.prompt)
        answers = [example.response] if example.rejected is None else [example.response, example.rejected]
        if not len(example.prompt) or not all(len(answer) for answer in answers):
            note = "question or response without a token"
        elif example.rejected is not None:
            length = sum(len(example.prompt) + len(answer) for answer in answers)
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


def _chat(row: Row, tokenizer) -> str:
    turns = ((("system", row.system),) if row.system else ()) + row.messages
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text.encode()  # a template may write half a surrogate pair, which is no text
        return text
    except Exception as error:  # refusals, such as of system texts, and whatever goes wrong in a template
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template refuses the row of line {row.line} (id {row.id}): {reason}") from error


def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _tokenize(texts, total: int, tokenizer, what: str) -> list[list[int]]:
    """Token ids of each text, without special tokens; a progress bar appears if it takes more than two seconds."""
    texts, ids = iter(texts), []
    with tqdm.tqdm(total=total, desc=f"tokenizing {what}", delay=2, leave=False, disable=None) as bar:
        while chunk := list(itertools.islice(texts, CHUNK)):
            # verbose=False: lengths are checked by `fit`, against our own limit.
            ids += tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            bar.update(len(chunk))
    return ids


def _ids(*parts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in (*parts, ())])
