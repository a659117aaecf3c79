"""Calls of tokenizers: token ids of texts, without warnings, and with errors of one line."""

import contextlib
from collections.abc import Iterator


def tokenize(tokenizer, texts: list[str], **options):
    """Calls a tokenizer on texts, without its warnings of long ones: `templates.fit` checks lengths.

    Raises:
      ValueError: its code, which is in Rust, failed; one line. The error of Rust is no `Exception`, so nothing else would catch it.
    """
    with _one_line(tokenizer, texts):
        return tokenizer(texts, verbose=False, **options)


def token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens; errors as for `tokenize`.

    A tokenizer of the library `tokenizers` is called directly, without offsets of the tokens.
    """
    import transformers

    direct = getattr(transformers.PreTrainedTokenizerFast, "_encode_plus", None)
    if not texts:
        return []
    if direct is None or getattr(type(tokenizer), "_encode_plus", None) is not direct:  # it has code of its own
        return tokenize(tokenizer, texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    with _one_line(tokenizer, texts):
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextlib.contextmanager
def _one_line(tokenizer, texts: list[str]) -> Iterator[None]:
    """Turns an error of Rust into one of Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(f"the tokenizer '{tokenizer.name_or_path}' failed on {len(texts)} texts: {reason:.200}") from error
