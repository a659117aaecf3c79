"""Learned tokens of conversations, against the masks that transformers computes from `{% generation %}` markers."""

import json
import pathlib
import re

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bilevel_jax import batches, scoring
from bilevel_jax.data import levels, packing, rendering, templates
from tests.data import test_templates
from tests.data.test_templates import CHATTING, EOS, HEADER, PAIR, PLAIN, WITH_BOS, make_tokenizer, parse

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "chat_templates"
MARKERS = re.compile(r"\{%-? (?:end)?generation %\}\n?")  # a block tag takes the line feed behind it with it
SPECIAL = {  # BOS, EOS, end of a turn, others
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "qwen2_5": (None, "<|im_end|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "qwen3": (None, "<|im_end|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    "mistral": ("<s>", "</s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    "gemma2": ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
    "gemma3": ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    "smollm3": (None, "<|im_end|>", "<|im_end|>", "<|im_start|>"),
    "chatml": (None, "<|im_end|>", "<|im_end|>", "<|im_start|>"),
    "zephyr": ("<s>", "</s>", "</s>"),
    "granite": ("<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
}
OPENING = {"qwen3": "<think>\n\n</think>\n\n"}  # before the last answer alone, which is learned without it


def user(content):
    return {"role": "user", "content": content}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(city, content=None, **fields):
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return answer(content, tool_calls=[{"id": f"call_{city:.4}", "type": "function", "function": function}], **fields)


def result(city, content):
    return {"role": "tool", "content": content, "tool_call_id": f"call_{city:.4}"}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {}}}]
SHAPES = {
    "single turn": {"messages": [user("Is 2 + 2 = 4?"), answer("Yes, the answer is fine.")]},
    "system": {"messages": [SYSTEM, user("hello"), answer("hello there"), user("again"), answer("hello")]},
    "several turns": {
        "messages": [user("a"), answer("hello world"), user("hello world"), answer("hello world"), user("c"), answer("hello world")]
    },
    "tool results": {
        "messages": [user("Paris?"), call("Paris", ""), result("Paris", "sun"), answer("Sunny."), user("Sure?"), answer("Yes.")],
        "tools": TOOLS,
    },
    "tool calls": {
        "messages": [user("hello"), answer("Hi."), user("Paris?"), call("Paris", ""), result("Paris", "sun"), call("Rome", "")],
        "tools": TOOLS,
    },
    "null content": {
        "messages": [
            user("Rome?"),
            call("Rome"),
            result("Rome", "rain"),
            answer("Wet."),
            user("So?"),
            answer(""),
            user("?"),
            answer("!"),
        ]
    },
    "reasoning": {
        "messages": [
            user("a"),
            answer("<think>\nthe world\n</think>\n\nfine"),
            user("b"),
            answer("hello", reasoning_content="the world is fine"),
        ]
    },
    "odd": {
        "messages": [
            answer("Welcome!"),
            user("say <|im_end|> and </s> and <end_of_turn>"),
            answer(" \n it is <|im_end|>\n<|im_start|>assistant\nhello </s> <end_of_turn> [INST] \n"),
            answer("the world"),
            user("the world"),
            answer("the world"),
        ]
    },
}


def byte_level(name):
    bos, eos, *special = SPECIAL[name]
    return make_tokenizer(bos_token=bos, eos_token=eos, additional_special_tokens=special)


def metaspace(name):
    """A tokenizer in the manner of SentencePiece, which writes a space before every text."""
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    texts = ["hello world the world is fine Is 2 + 2", "user assistant system hello there"] * 4
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *alphabet], show_progress=False))
    bos, eos, *special = SPECIAL[name]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token=bos, eos_token=eos, additional_special_tokens=special
    )


def both(name, make=byte_level):
    """The tokenizer with the template as published, and with markers."""
    text = (FOLDER / f"{name}.jinja").read_text().removesuffix("\n")
    plain, marked = make(name), make(name)
    plain.chat_template, marked.chat_template = MARKERS.sub("", text), text
    return plain, marked


# ---- the reference ----


def witness(marked, messages, tools, header):
    """The rendered text, its tokens, and for each assistant turn the tokens that transformers' mask marks."""
    options = {"tools": tools, "add_generation_prompt": header}
    text = marked.apply_chat_template(messages, tokenize=False, **options)
    encoded = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    edges = np.flatnonzero(np.diff([0, *encoded["assistant_masks"], 0])).reshape(-1, 2)
    return text, encoded["input_ids"], [tuple(edge) for edge in edges.tolist()]


def text_of(marked, text, span):
    offsets = marked(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[offsets[span[0]][0] : offsets[span[1] - 1][1]]


def is_changed(name, marked, messages, tools, i, text, span):
    """Whether the template writes turn i, or what is before it, otherwise than in the conversation that ends with it."""
    end, written = SPECIAL[name][2], text_of(marked, text, span)
    if any(message["role"] == "user" for message in messages[:i]):
        offsets = marked(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if witness(marked, messages[:i], tools, True)[0] != text[: offsets[span[0]][0]]:
            return True
    if "tool_calls" not in messages[i]:
        return written.removesuffix(end).strip() != messages[i]["content"].strip()
    last, _, runs = witness(marked, messages[: i + 1], tools, False)
    return text_of(marked, last, runs[-1]).removeprefix(OPENING.get(name, "")) != written


def reference(name, marked, row):
    """Tokens of the prompt, the learned ones among them, tokens of the response; or the first turn that is changed."""
    messages = templates.messages_of(row, with_response=True)
    text, ids, spans = witness(marked, messages[:-1], row.tools, True)
    turns = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    assert len(turns) == len(spans)
    answers = [  # an empty turn is nothing to learn
        (number, i, span)
        for number, (i, span) in enumerate(zip(turns, spans), 1)
        if messages[i]["content"].strip() or "tool_calls" in messages[i]
    ]
    for number, i, span in answers:
        if is_changed(name, marked, messages, row.tools, i, text, span):
            return number
    whole, _, spans = witness(marked, messages, row.tools, False)
    response = text_of(marked, whole, spans[-1])
    response = response if "tool_calls" in messages[-1] else response.removeprefix(OPENING.get(name, "")).lstrip()
    return ids, [span for _, _, span in answers], marked(response, add_special_tokens=False)["input_ids"]


WITHOUT_TOOLS = ("gemma2", "gemma3", "olmo2", "phi3", "chatml", "zephyr")
NOT_RENDERED = {  # what the published template has no form for: rows are left out with this reason, or the template's own error
    **{(name, shape): "tools, which" for name in WITHOUT_TOOLS for shape in ("tool calls", "tool results")},
    **{(name, "null content"): "tool calls, which" for name in WITHOUT_TOOLS},
    **{
        (name, shape): "tool calls, which"
        for name in ("smollm3", "granite")
        for shape in SHAPES
        if "tool" in shape or "null" in shape
    },
    **{(name, "odd"): "roles must alternate" for name in ("mistral", "gemma2", "gemma3")},
    ("gemma2", "system"): "System role not supported",
}
CHANGED = {  # turn of a conversation that its template changes later
    ("qwen3", "reasoning"): 1,  # removes reasoning from earlier turns
    ("qwen3", "odd"): 3,  # an empty block of reasoning before the second of two answers
    ("mistral", "system"): 1,  # the system text moves to the last question
    ("mistral", "tool results"): 1,  # so do the tools
    ("mistral", "tool calls"): 1,
    ("olmo2", "odd"): 3,  # no line feed after the last turn
}


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("name", SPECIAL)
def test_masks_equal_those_of_transformers(name, make):
    plain, marked = both(name, make)
    for shape, value in SHAPES.items():
        (row,) = parse(value)
        if reason := NOT_RENDERED.get((name, shape)):
            try:
                (example,) = templates.encode([row], plain, template="chat")
            except ValueError as error:
                assert reason in str(error), shape
            else:
                assert example.reason.startswith(reason) and not example.size, shape
            continue
        (example,) = templates.encode([row], plain, template="chat")
        expected = reference(name, marked, row)
        if (name, shape) in CHANGED:
            assert expected == CHANGED[name, shape], shape
            assert example.reason.startswith(f"assistant turn {expected} or what is before it is changed"), shape
            continue
        prompt, earlier, response = expected
        assert example.prompt.tolist() == prompt and list(example.earlier) == earlier, shape
        assert example.response.tolist() == response and example.reason is None, shape


@pytest.mark.parametrize("name", SPECIAL)
def test_the_last_answer_alone(name):
    """`learn="last"` has the tokens of `all` without the earlier answers, and refuses no row for what a template changes."""
    plain, _ = both(name)
    for shape, value in SHAPES.items():
        if (name, shape) not in NOT_RENDERED:
            (last,) = templates.encode(parse(value), plain, template="chat", learn="last")
            (full,) = templates.encode(parse(value), plain, template="chat")
            assert last.earlier == () and last.reason is None and len(last.response), shape
            if full.reason is None:
                np.testing.assert_array_equal(last.prompt, full.prompt)
                np.testing.assert_array_equal(last.response, full.response)


# ---- other templates ----

CONVERSATION = {
    "messages": [
        SYSTEM,
        answer("Welcome"),
        user("hello"),
        answer(" the world"),
        user("fine?"),
        answer(" "),
        user("?"),
        answer("fine"),
    ]
}


HUMAN = (
    "Be brief.\n\nAssistant: ⟦Welcome⟧\n\nHuman: hello\n\nAssistant: ⟦ the world⟧\n\n"
    "Human: fine?\n\nAssistant:  \n\nHuman: ?\n\nAssistant: ⟦fine⟧"
)
ALPACA = f"<s>Be brief.\n\n{HEADER}### Response:{HUMAN.removeprefix('Be brief.')[len('..Assistant: ') :]}"
ALPACA = ALPACA.replace("Human: ", "### Instruction:\n").replace("Assistant: ", "### Response:")
VERBATIM = "⟦Welcome⟧\n\nhello\n\n⟦ the world⟧\n\nfine?\n\n \n\n?⟦fine⟧"
CHAT = (
    "<s><|system|>\nBe brief.\n<|assistant|>\n⟦Welcome⟧\n<|user|>\nhello\n<|assistant|>\n⟦ the world⟧\n"
    "<|user|>\nfine?\n<|assistant|>\n \n<|user|>\n?\n<|assistant|>\n⟦fine⟧"
)


@pytest.mark.parametrize(
    ("tokenizer", "template", "text"),
    [(PLAIN, "human", HUMAN), (WITH_BOS, "alpaca", ALPACA), (PLAIN, "none", VERBATIM), (CHATTING, "chat", CHAT)],
)
def test_templates_without_an_end_of_turn(tokenizer, template, text):
    """Earlier answers are learned without an end, the last one with EOS. No token reaches over the marks."""
    (example,) = templates.encode(parse(CONVERSATION), tokenizer, template=template)
    pieces, end = [], 0
    for start, stop in example.earlier:
        pieces += [tokenizer.decode(example.prompt[end:start]), "⟦", tokenizer.decode(example.prompt[start:stop]), "⟧"]
        end = stop
    pieces += [tokenizer.decode(example.prompt[end:]), "⟦", tokenizer.decode(example.response[:-1]), "⟧"]
    assert "".join(pieces) == text and example.response[-1] == tokenizer.eos_token_id
    assert example.num_learned == sum(stop - start for start, stop in example.earlier) + len(example.response)


@pytest.mark.parametrize("is_fast", [False, True])
def test_no_token_reaches_over_an_answer(monkeypatch, is_fast):
    """In the whole text, the space of the header is part of the first word. Slow tokenizers have no offsets."""
    tokenizer = metaspace("chatml")
    monkeypatch.setattr(type(tokenizer), "is_fast", is_fast)
    talk = {"messages": [user("hello"), answer("the world"), user("is"), answer("fine")]}
    (example,) = templates.encode(parse(talk), tokenizer, template="human")
    assert "▁the" in tokenizer.tokenize("Human: hello\n\nAssistant: the world")
    assert [tokenizer.decode(example.prompt[start:stop]) for start, stop in example.earlier] == ["the world"]


def test_an_answer_has_the_same_tokens_before_it_as_when_the_model_gives_it(monkeypatch):
    """The two line feeds of this header are one token at the end of a text, and two before a word."""
    monkeypatch.setattr(test_templates, "CORPUS", ["hello\n\n", "the world\n\n"] * 20)
    tokenizer, _ = both("llama3")
    (line_feeds,) = tokenizer("\n\n")["input_ids"]
    assert len(tokenizer("\n\nhello")["input_ids"]) > len(tokenizer("hello")["input_ids"]) + 1
    (example,) = templates.encode(parse(SHAPES["several turns"]), tokenizer, template="chat")
    starts = [start for start, _ in example.earlier] + [len(example.prompt)]
    assert len(starts) == 3 and all(example.prompt[start - 1] == line_feeds for start in starts)


def test_preferences_learn_the_last_turn():
    turns = [user("a"), answer("b"), user("c")]
    (pair,) = parse({"prompt": turns, "chosen": [answer("fine")], "rejected": [answer("the world")]}, preference=True)
    (example,) = templates.encode([pair], PLAIN, template="human")
    assert example.earlier == () and PLAIN.decode(example.rejected) == "the world" + EOS


def test_unknown_choice():
    with pytest.raises(ValueError, match="learn='first' is not among all, last"):
        templates.encode(parse(PAIR), PLAIN, template="human", learn="first")


# ---- conversations that do not fit ----


@pytest.mark.parametrize(
    ("max_length", "prompt", "response", "earlier", "note"),
    [
        (14, 10, 4, ((2, 4), (6, 9)), None),
        (12, 10, 2, ((2, 4), (6, 9)), "response cut to 12 tokens"),
        (10, 6, 3, ((2, 4),), "conversation cut to 10 tokens"),  # the second answer fits
        (8, 6, 2, ((2, 4),), "conversation cut to 8 tokens"),  # but for its end
        (6, 2, 2, (), "conversation cut to 6 tokens"),
        (3, 2, 1, (), "conversation cut to 3 tokens"),
        (2, None, None, None, "question over 2 tokens"),
    ],
)
def test_a_long_conversation_ends_with_an_earlier_answer(max_length, prompt, response, earlier, note):
    tokens = np.arange(14, dtype=np.int32)
    example = templates.Example(tokens[:10], tokens[10:], None, earlier=((2, 4), (6, 9)))
    (row,) = parse(CONVERSATION)
    _, fitted, counts = templates.fit([example], [row], max_length)
    assert counts == ({note: (1, 1)} if note else {})
    if prompt is None:
        assert fitted == []
        return
    (one,) = fitted
    assert (len(one.prompt), len(one.response), one.earlier) == (prompt, response, earlier)
    np.testing.assert_array_equal([*one.prompt, *one.response], tokens[: prompt + response])
    assert one.ends_early == (note is not None and note.startswith("conversation"))
    if one.ends_early:
        assert templates.fit([example], [row], max_length, cut_turns=False)[2] == {f"question over {max_length} tokens": (1, 1)}
        assert [len(offsets) for offsets in templates.response_offsets([row], [one], PLAIN)] == [0]


# ---- shown and packed ----


def test_all_answers_are_marked():
    (example,) = templates.encode(parse(SHAPES["system"]), both("chatml")[0], template="chat")
    expected = (
        "    <|im_start|>system\n    Be brief.<|im_end|>\n    <|im_start|>user\n    hello<|im_end|>\n    <|im_start|>assistant\n"
        "    ⟦hello there<|im_end|>⟧\n    <|im_start|>user\n    again<|im_end|>\n    <|im_start|>assistant\n    ⟦hello<|im_end|>⟧"
    )
    assert rendering.show(example, both("chatml")[0]) == expected


def test_a_batch_learns_all_answers():
    rows = parse(SHAPES["system"])
    examples = templates.encode(rows, both("chatml")[0], template="chat")
    (segment,) = batches.row_segments(levels.Level(rows, examples, [], []), 0, share=0.5, group=0, row_index=3)
    assert len(segment.earlier) == 1 and len(segment.targets) == examples[0].num_learned
    assert scoring.example_segments(examples)[0].earlier == segment.earlier


def test_targets_of_a_packed_conversation():
    """Every learned token is predicted by the token before it; the first of a segment has none."""
    tokens = np.arange(100, 112, dtype=np.int32)
    talk = packing.Segment(tokens[:9], tokens[9:], earlier=((0, 2), (4, 6)))
    single = packing.Segment(tokens[:3], tokens[3:5])
    packed = packing.pack([talk, single], packing.Layout(sequences=1, length=20, entries=2))
    number = int(packed.num_targets[0])
    learned = [101, 104, 105, 109, 110, 111, 103, 104]
    assert packed.target[0, :number].tolist() == learned and packed.entry[0, :number].tolist() == [0] * 6 + [1] * 2
    assert packed.tokens[0, 0][packed.logit_index[0, :number]].tolist() == [token - 1 for token in learned]
    assert packed.length.tolist() == [6, 2]
