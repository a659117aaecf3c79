"""Shows rows as the model sees them: rendered by the template, with the learned tokens marked."""

from collections.abc import Iterable, Sequence

from bilevel_jax.data import rows, templates
from bilevel_jax.text import visible

OPENING, CLOSING = "⟦", "⟧"  # around learned tokens
MAX_SHOWN = 400  # characters of a response, and of each part of the prompt


def _shown(text: str) -> str:
    """The beginning and the end of a text, with control characters escaped."""
    if len(text) > MAX_SHOWN:
        half = MAX_SHOWN // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    return visible(text)


def _decode(tokens, tokenizer) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def show(example: templates.Example, tokenizer) -> str:
    """An example as indented text, special tokens included. Learned tokens are between ⟦ and ⟧."""
    responses = [example.response] if example.rejected is None else [example.response, example.rejected]
    names = [""] if example.rejected is None else ["\n(chosen) ", "\n(rejected) "]
    text, end = "", 0
    for start, stop in example.earlier:
        text += _shown(_decode(example.prompt[end:start], tokenizer))
        text += f"{OPENING}{_shown(_decode(example.prompt[start:stop], tokenizer))}{CLOSING}"
        end = stop
    text += _shown(_decode(example.prompt[end:], tokenizer))
    for name, response in zip(names, responses):
        text += f"{name}{OPENING}{_shown(_decode(response, tokenizer))}{CLOSING}" if len(response) else ""
    return "\n".join(f"    {line}".rstrip() for line in text.split("\n"))


def template_notice(template: str | None, tokenizer, examples: Sequence[templates.Example]) -> str:
    """Which template stands in for a missing chat template, with the first example; "" if a template is given or there is one."""
    if template not in (None, "auto") or tokenizer.chat_template or not examples:
        return ""
    used = templates.resolve(template, tokenizer)
    what = f"the tokenizer has no chat template, so rows are rendered with the template '{used}'. The first one"
    return f"{what}, its response between {OPENING} and {CLOSING}:\n{show(examples[0], tokenizer)}"


def one_of_each_schema(
    all_rows: Iterable[rows.Row], examples: Iterable[templates.Example]
) -> list[tuple[rows.Row, templates.Example]]:
    """The first row of each schema, with its tokens; of conversations, the first with one and with several learned answers."""
    first: dict[tuple[str, bool], tuple[rows.Row, templates.Example]] = {}
    for row, example in zip(all_rows, examples, strict=True):
        first.setdefault((row.schema, bool(example.earlier)), (row, example))
    return list(first.values())
