"""Which parts of a prompt are earlier answers of the assistant: where they are in its text, and in its tokens.

Write P for the rendered prompt of a chat, the conversation before its last answer, and P_i for the conversation before answer i,
which is what the model sees when it gives that answer. Answer i starts in P where P_i ends, if P starts with P_i. It is the content
as the data have it, possibly with other white space around it, and the special token that ends a turn, if the template writes one.

A chat template may change what is before an answer, or the answer itself, as the conversation goes on. Qwen3, for example, removes
the reasoning from all turns but the last. In such a conversation the answer cannot be learned, and the row is refused.
"""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from bilevel_jax.data import tokenization
from bilevel_jax.data.messages import Unusable

Render = Callable[[Sequence[dict], bool], str]  # (messages, whether the header of an answer follows) -> text
Spans = tuple[tuple[int, int], ...]  # [start, stop) each, in order


class Prompt(NamedTuple):
    """A prompt as text."""

    text: str
    answers: Spans = ()  # the characters of the earlier answers that are learned


class Form(NamedTuple):
    """How a chat template writes an answer."""

    opening: str  # between the prompt and the last answer of a conversation, for example an empty block of reasoning; mostly ""
    end: str  # the special token after an answer; "" for none


def joined(parts: Iterable[tuple[str, bool]]) -> Prompt:
    """The prompt that consists of some texts. Each comes with whether it is an answer; blank answers are not learned."""
    text, answers = "", []
    for part, is_answer in parts:
        if is_answer and part.strip():
            answers.append((len(text), len(text) + len(part)))
        text += part
    return Prompt(text, tuple(answers))


# --------------------------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------------------------


def form_of(render: Render, special_tokens: Collection[str]) -> Form:
    """How the chat template of `render` writes an answer to a question; both texts are empty if it refuses a question alone."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    try:
        prompt = render(messages[:1], True)
        before, after = _around(render, messages)
    except ValueError:
        return Form("", "")
    ends = [token for token in special_tokens if token and after.lstrip().startswith(token)]
    return Form(before[len(prompt) :] if before.startswith(prompt) else "", max(ends, key=len, default=""))


def without_end(text: str, end: str) -> str:
    """A turn without the token that ends it, and without the white space after that."""
    head, token, tail = text.rpartition(end) if end else ("", "", text)
    return head if token and not tail.strip() else text


def in_chat(messages: Sequence[dict], text: str, render: Render, form: Form) -> Spans:
    """The characters of the earlier answers in the rendered prompt of a chat.

    Args:
      messages: of the prompt.
      text: the rendered prompt.
      render: renders other messages by the same template.
      form: of the template.

    Raises:
      Unusable: the template changes an answer, or what is before it; the reason names the turn.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = []
    for number, i in enumerate(turns, 1):
        if not messages[i]["content"].strip() and "tool_calls" not in messages[i]:
            continue  # nothing to learn
        answer = _answer(messages[: i + 1], text, render, form)
        if answer is None:
            what = f"assistant turn {number} or what is before it is changed by the chat template as the conversation goes on"
            raise Unusable(f"{what}; data.learn=last learns the last turn only")
        answers.append(answer)
    return tuple(answers)


def _answer(messages: Sequence[dict], text: str, render: Render, form: Form) -> tuple[int, int] | None:
    """The characters of the last of `messages`, an answer, in the text of a longer conversation; None if it is not there."""
    *earlier, answer = messages
    contents = [answer["content"]]
    try:
        if any(message["role"] in ("user", "tool") for message in earlier):
            before = render(earlier, True)
        else:  # an opening of the assistant; few templates render a conversation without a question
            before = _around(render, messages)[0]
        if "tool_calls" in answer:
            written = render(messages, False)
            if not written.startswith(before):
                return None
            written = without_end(written[len(before) :], form.end)
            contents = [written, written.removeprefix(form.opening)]
    except ValueError:
        return None
    if not text.startswith(before):
        return None
    for content in map(str.strip, contents):
        start = _skip_space(text, len(before))
        stop = start + len(content)
        end = _skip_space(text, stop) if form.end else stop
        if text.startswith(content, start) and text.startswith(form.end, end):
            return len(before), end + len(form.end)
    return None


def _around(render: Render, messages: Sequence[dict]) -> tuple[str, str]:
    """What the template writes before and after the content of the last message: what two different contents have in common."""
    *earlier, last = messages
    first, second = (render([*earlier, {**last, "content": content}], False) for content in "xy")
    before = os.path.commonprefix([first, second])
    return before, first[len(before) + 1 :]


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


def tokenize(prompts: Sequence[Prompt], tokenizer) -> Iterator[tuple[list[int], Spans]]:
    """Yields the token ids of each prompt, without special tokens, and which of them are the earlier answers.

    The texts between the starts and ends of answers are tokenized separately, as prompt and response are, so that an answer has the
    same tokens before it as when the model gives it. A tokenizer that writes a space before every text, such as that of Llama 2,
    would write one at each of these positions. Its prompts are tokenized whole, unless a token would reach over such a position.
    """
    writes_space = tokenization.token_ids(tokenizer, ["\na"])[0] != sum(tokenization.token_ids(tokenizer, ["\n", "a"]), [])
    whole = iter(_whole([prompt for prompt in prompts if writes_space or not prompt.answers], tokenizer))
    texts = [part for prompt in prompts if prompt.answers and not writes_space for part in _parts(prompt)]
    tokens = iter(tokenization.token_ids(tokenizer, texts))
    for prompt in prompts:
        ids, spans = next(whole) if writes_space or not prompt.answers else ([], None)
        if spans is None:
            number = 2 * len(prompt.answers) + 1
            parts = tokenization.token_ids(tokenizer, _parts(prompt)) if writes_space else list(itertools.islice(tokens, number))
            ends = [0, *itertools.accumulate(map(len, parts))]
            ids, spans = sum(parts, []), tuple(zip(ends[1::2], ends[2::2]))
        yield ids, spans


def _parts(prompt: Prompt) -> list[str]:
    """The texts between the starts and ends of answers, with those of the answers."""
    bounds = [0, *(bound for answer in prompt.answers for bound in answer), len(prompt.text)]
    return [prompt.text[start:stop] for start, stop in zip(bounds, bounds[1:])]


def _whole(prompts: Sequence[Prompt], tokenizer) -> Iterator[tuple[list[int], Spans | None]]:
    """The ids and answers of prompts that are tokenized whole; None in place of answers that no tokens have to themselves."""
    if not prompts:
        return
    texts = [prompt.text for prompt in prompts]
    if not tokenizer.is_fast or not any(prompt.answers for prompt in prompts):
        for prompt, ids in zip(prompts, tokenization.token_ids(tokenizer, texts)):
            yield ids, None if prompt.answers else ()
        return
    encoded = tokenization.tokenize(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"]):
        yield ids, _token_spans(offsets, prompt.answers) if prompt.answers else ()


def _token_spans(offsets: Sequence[tuple[int, int]], answers: Spans) -> Spans | None:
    """The tokens of the answers; None if an answer does not start or end between two tokens.

    Some tokenizers leave the space before a word out of its offsets. A token may then reach over a position that no offsets
    contain, so a position is only taken as the end of a token if the next one starts there.
    """
    token_at = {0: 0}
    for k, ((_, end), (start, _)) in enumerate(zip(offsets, offsets[1:]), 1):
        if end == start:
            token_at.setdefault(start, k)
    if not all(bound in token_at for answer in answers for bound in answer):
        return None
    return tuple((token_at[start], token_at[stop]) for start, stop in answers)
