import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bilevel_jax.data import rows, templates

EOS, BOS = "<|endoftext|>", "<s>"
CORPUS = ["Human: hello world\n\nAssistant: hello there, the world is fine. The answer is fine"] * 4
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(bos: bool = False, chat: str | None = None, **special):
    """A byte-level BPE tokenizer; with `bos`, it adds a BOS by itself."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[EOS, BOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
        special = {"bos_token": BOS, **special}
    special = {"eos_token": EOS, **special}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = chat
    return tokenizer


PLAIN = make_tokenizer(pad_token=EOS)  # pad == eos, as in Pythia
WITH_BOS = make_tokenizer(bos=True)
CHATTING = make_tokenizer(bos=True, chat=CHAT)


def parse(*values, **options):
    return list(rows.parse(enumerate(values, 1), **options))


QA = {"question": "hello world", "response": "the answer"}
SYSTEM = {**QA, "system": "Be brief."}
ALPACA = {"instruction": "Add.", "input": "1 1", "output": "2"}
TURNS = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
PAIR = {"prompt": "hello", "chosen": "fine", "rejected": "the world"}
HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
INPUT_HEADER = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


@pytest.mark.parametrize(
    ("value", "template", "text"),
    [
        (QA, "human", "Human: hello world\n\nAssistant: "),
        (SYSTEM, "human", "Be brief.\n\nHuman: hello world\n\nAssistant: "),
        (TURNS, "human", "S\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "),
        (ALPACA, "human", "Human: Add.\n1 1\n\nAssistant: "),
        (ALPACA, "alpaca", INPUT_HEADER + "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:"),
        ({**ALPACA, "input": ""}, "alpaca", HEADER + "### Instruction:\nAdd.\n\n### Response:"),
        (QA, "alpaca", HEADER + "### Instruction:\nhello world\n\n### Response:"),
        (SYSTEM, "alpaca", "Be brief.\n\n" + HEADER + "### Instruction:\nhello world\n\n### Response:"),
        (SYSTEM, "none", "hello world"),
        ({**QA, "question": " a\n"}, "none", " a\n"),
        (ALPACA, "none", "Add.\n1 1"),
        (TURNS, "none", "a\n\nb\n\nc"),
        (SYSTEM, "chat", "<s><|system|>\nBe brief.\n<|user|>\nhello world\n<|assistant|>\n"),
        (TURNS, "chat", "<s><|system|>\nS\n<|user|>\na\n<|assistant|>\nb\n<|user|>\nc\n<|assistant|>\n"),
    ],
)
def test_render(value, template, text):
    (row,) = parse(value)
    assert templates.render(row, CHATTING, template) == text


@pytest.mark.parametrize(
    ("template", "tokenizer", "resolved"),
    [
        (None, PLAIN, "human"),
        ("auto", PLAIN, "human"),
        (None, CHATTING, "chat"),
        ("auto", CHATTING, "chat"),
        ("none", CHATTING, "none"),
        ("human", CHATTING, "human"),
        ("alpaca", PLAIN, "alpaca"),
    ],
)
def test_resolve(template, tokenizer, resolved):
    assert templates.resolve(template, tokenizer) == resolved


def test_chat_prompts_match_transformers():
    values = [QA, SYSTEM, TURNS]
    for example, row in zip(templates.encode(parse(*values), CHATTING, template=None), parse(*values), strict=True):
        turns = ([("system", row.system)] if row.system else []) + list(row.messages)
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = CHATTING.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert example.prompt.tolist() == expected
        assert example.prompt.tolist().count(CHATTING.bos_token_id) == 1  # the template's BOS is not added twice


@pytest.mark.parametrize(
    ("tokenizer", "template", "bos"),
    [
        (PLAIN, "human", False),
        (PLAIN, "none", False),
        (WITH_BOS, "human", True),
        (WITH_BOS, "alpaca", True),
        (WITH_BOS, "none", False),
        (make_tokenizer(bos_token=BOS), "human", False),  # has a BOS but does not add it
    ],
)
def test_bos_is_added_if_the_tokenizer_adds_one(tokenizer, template, bos):
    (row,) = parse(QA)
    (example,) = templates.encode([row], tokenizer, template=template)
    text = templates.render(row, tokenizer, template)
    assert example.prompt.tolist() == tokenizer(text, add_special_tokens=template != "none")["input_ids"]
    assert (example.prompt.tolist()[:1] == [1]) == bos and 1 not in example.response


@pytest.mark.parametrize("eos", [True, False])
def test_none_is_verbatim(eos):
    (example,) = templates.encode(parse(QA), WITH_BOS, template="none", eos=eos)
    assert example.prompt.tolist() == WITH_BOS("hello world", add_special_tokens=False)["input_ids"]
    assert example.response.tolist() == WITH_BOS("the answer", add_special_tokens=False)["input_ids"] + [0] * eos
    assert example.prompt.dtype == example.response.dtype == np.int32 and example.rejected is None


def test_eos_is_kept_if_it_is_the_pad_token():
    assert PLAIN.pad_token_id == PLAIN.eos_token_id == 0
    (example,) = templates.encode(parse(QA), PLAIN, template="human")
    assert example.response[-1] == 0 and PLAIN.decode(example.response) == "the answer" + EOS


def test_final_space_of_the_prompt_is_not_merged_into_the_response():
    """In one text the space merges into " the"; tokenizing separately avoids this."""
    (row,) = parse(QA)
    (example,) = templates.encode([row], PLAIN, template="human", eos=False)
    prompt = templates.render(row, PLAIN, "human")
    joint = PLAIN(prompt + row.response)["input_ids"]
    assert PLAIN.decode(joint[len(example.prompt) :]) != row.response  # this tokenizer does merge them
    assert PLAIN.decode(example.prompt) == prompt and PLAIN.decode(example.response) == row.response


def test_pairs_and_questions():
    (pair,) = templates.encode(parse(PAIR, preference=True), PLAIN, template="none")
    assert PLAIN.decode(pair.response) == "fine" + EOS and PLAIN.decode(pair.rejected) == "the world" + EOS
    (question,) = templates.encode(parse({"question": "hello"}, questions_only=True), PLAIN, template="none")
    assert len(question.response) == 0 and PLAIN.decode(question.prompt) == "hello"


def test_batches_match_single_rows(monkeypatch):
    monkeypatch.setattr(templates, "CHUNK", 4)
    values = [{"prompt": f"hello {i} " * (i + 1), "chosen": "fine " * i + "é", "rejected": f"{i}"} for i in range(11)]
    parsed = parse(*values, preference=True)
    batched = templates.encode(parsed, CHATTING, template=None)
    for row, example in zip(parsed, batched, strict=True):
        (single,) = templates.encode([row], CHATTING, template=None)
        for name in ("prompt", "response", "rejected"):
            np.testing.assert_array_equal(getattr(example, name), getattr(single, name))
    assert templates.encode([], CHATTING, template=None) == []


@pytest.mark.parametrize(
    ("options", "tokenizer", "message"),
    [
        ({"template": "vicuna"}, PLAIN, "unknown template 'vicuna'; choose one of auto, chat, human, alpaca, none"),
        ({"template": "chat"}, PLAIN, "template 'chat': the tokenizer '' has no chat template"),
        ({"template": "human"}, make_tokenizer(eos_token=None), "the tokenizer '' has no EOS token"),
    ],
)
def test_refusals(options, tokenizer, message):
    with pytest.raises(ValueError) as error:
        templates.encode(parse(QA), tokenizer, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_eos_is_only_needed_if_requested():
    (example,) = templates.encode(parse(QA), make_tokenizer(eos_token=None), template="none", eos=False)
    assert PLAIN.decode(example.response) == "the answer"


def test_chat_template_with_half_a_surrogate_pair():
    with pytest.raises(ValueError, match=r"refuses the row of line \d+ \(id [0-9a-f]{16}\): 'utf-8' codec can't encode"):
        templates.encode(parse(QA), make_tokenizer(chat="\ud83d"), template="chat")


def test_chat_template_rejects_a_row():
    strict = make_tokenizer(chat="{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    with pytest.raises(ValueError, match=r"refuses the row of line 2 \(id [0-9a-f]{16}\): no system$"):
        templates.encode(parse(QA, SYSTEM), strict, template="chat")


# ---- fit ----


def example(prompt: int, response: int, rejected: int | None = None):
    ids = [None if n is None else np.arange(n, dtype=np.int32) for n in (prompt, response, rejected)]
    return templates.Example(*ids)


@pytest.mark.parametrize(
    ("lengths", "response", "note"),
    [
        ((4, 6), 6, None),
        ((4, 7), 6, "response cut to 10 tokens"),
        ((9, 5), 1, "response cut to 10 tokens"),
        ((10, 5), None, "question over 10 tokens"),
        ((30, 1), None, "question over 10 tokens"),
        ((0, 5), None, "question or response without a token"),
        ((5, 0), None, "question or response without a token"),
        ((2, 3, 3), 3, None),
        ((2, 3, 4), None, "pair over 10 tokens"),
        ((2, 3, 0), None, "question or response without a token"),
    ],
)
def test_fit(lengths, response, note):
    (row,) = parse(QA)
    kept, fitted, counts = templates.fit([example(*lengths)], [row], 10)
    assert kept == ([] if response is None else [0])
    assert [len(e.response) for e in fitted] == ([] if response is None else [response])
    assert counts == ({} if note is None else {note: (1, 1)})


def test_fit_keeps_order_and_counts():
    parsed = parse(*({**QA, "question": str(i)} for i in range(5)))
    examples = [example(2, 2), example(20, 2), example(2, 20), example(2, 3), example(10, 1)]
    kept, fitted, counts = templates.fit(examples, parsed, 10)
    assert kept == [0, 2, 3]
    assert [len(e.response) for e in fitted] == [2, 8, 3]
    np.testing.assert_array_equal(fitted[1].response, np.arange(8))  # truncated, without EOS
    assert counts == {"question over 10 tokens": (2, 2), "response cut to 10 tokens": (1, 3)}


# ---- loading ----


def test_load_tokenizer_round_trip_without_noise(tmp_path):
    """In a separate process, since transformers logs the advice on PyTorch only on its first import."""
    CHATTING.save_pretrained(tmp_path)
    program = f"""if True:
        from bilevel_jax.data import rows, templates
        tokenizer = templates.load_tokenizer({str(tmp_path)!r})
        tokenizer.model_max_length = 4  # would warn about longer texts
        (example,) = templates.encode(list(rows.parse([(1, {QA!r})])), tokenizer, template=None)
        print(example.prompt.tolist())
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    (expected,) = templates.encode(parse(QA), CHATTING, template=None)
    assert (done.stdout, done.stderr) == (f"{expected.prompt.tolist()}\n", "")


def test_a_model_without_tokenizer_files(tmp_path):
    """transformers makes an empty tokenizer of the type of the model, which turns all texts into nothing."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(
        ValueError, match="^no usable tokenizer at .*: it has no tokens but special ones; is tokenizer.json missing"
    ):
        templates.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_load_tokenizer_fails_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no usable tokenizer at") as error:
        templates.load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_response_offsets():
    """The characters at a token's offsets are its text, up to a leading space; EOS has an empty span at the end."""
    parsed = parse(QA, {**QA, "response": "fine, the world is fine", "question": "a"})
    examples = templates.encode(parsed, PLAIN, template="human")
    _, examples, _ = templates.fit(examples, parsed, 2 + max(len(one.prompt) for one in examples))  # both are truncated
    full = templates.encode(parsed, PLAIN, template="human")
    for row, example, offsets in zip(parsed, full, templates.response_offsets(parsed, full, PLAIN), strict=True):
        assert len(offsets) == len(example.response) and list(offsets[-1]) == [len(row.response)] * 2
        texts = [PLAIN.decode([token]).strip() for token in example.response[:-1]]
        assert [row.response[start:stop].strip() for start, stop in offsets[:-1]] == texts
    for example, offsets in zip(examples, templates.response_offsets(parsed, examples, PLAIN), strict=True):
        assert len(offsets) == len(example.response)


def test_response_offsets_need_a_fast_tokenizer():
    class Slow:
        is_fast, name_or_path = False, "old"

    with pytest.raises(ValueError, match="'old' has no character offsets"):
        templates.response_offsets(parse(QA), [], Slow())


# ---- tools ----

TOOLS = (  # after the template that Qwen 2.5 publishes, without its default system text
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}<tools>"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for call in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = make_tokenizer(chat=TOOLS, eos_token="<|im_end|>")
ASK = {"role": "user", "content": "Weather?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get", "arguments": '{"city": "Paris"}'}}]}
RESULT, SUNNY = {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "Sunny."}
TOOL = {"type": "function", "function": {"name": "get"}}
RENDERED_CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris"}}\n</tool_call>'
RENDERED_TOOLS = '<|im_start|>system\n<tools>\n{"type": "function", "function": {"name": "get"}}\n</tools><|im_end|>\n'


@pytest.mark.parametrize(
    ("value", "prompt", "response"),
    [
        (
            {"messages": [ASK, CALL, RESULT, SUNNY], "tools": [TOOL]},
            f"{RENDERED_TOOLS}<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n{RENDERED_CALL}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            "Sunny.",
        ),
        (
            {"messages": [ASK, CALL], "system": "S"},
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
            RENDERED_CALL,
        ),
    ],
)
def test_tools_are_rendered_by_the_chat_template(value, prompt, response):
    """The learned text of a call is what the template writes, up to the EOS, which is learned too."""
    (row,) = parse(value)
    (example,) = templates.encode([row], WITH_TOOLS, template="auto")
    assert WITH_TOOLS.decode(example.prompt) == prompt
    assert WITH_TOOLS.decode(example.response) == f"{response}<|im_end|>" and example.reason is None
    (offsets,) = templates.response_offsets([row], [example], WITH_TOOLS)
    assert len(offsets) == len(example.response) and offsets[-1].tolist() == [len(response)] * 2


@pytest.mark.parametrize(
    ("value", "tokenizer", "template", "reason"),
    [
        ({"messages": [ASK, CALL]}, PLAIN, "auto", "tools, which need a chat template; the template here is 'human'"),
        ({"messages": [ASK, CALL]}, WITH_TOOLS, "none", "tools, which need a chat template; the template here is 'none'"),
        ({"messages": [ASK, CALL]}, CHATTING, "auto", "tool calls, which the chat template does not render"),
        ({"messages": [ASK, SUNNY], "tools": [TOOL]}, CHATTING, "auto", "tools, which the chat template does not render"),
        (
            {"messages": [ASK, RESULT, SUNNY]},
            make_tokenizer(chat=CHAT + "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no') }}{% endfor %}"),
            "auto",
            "tool calls or results that the chat template refuses",
        ),
        (
            {"messages": [ASK, CALL]},
            make_tokenizer(chat=TOOLS + "{{ '<think>' if add_generation_prompt }}", eos_token="<|im_end|>"),
            "auto",
            "a tool call that the chat template does not put after the prompt",
        ),
    ],
)
def test_tools_that_cannot_be_rendered_are_counted(value, tokenizer, template, reason):
    parsed = parse(QA, value, QA)
    examples = templates.encode(parsed, tokenizer, template=template)
    assert [example.reason for example in examples] == [None, reason, None]
    kept, _, counts = templates.fit(examples, parsed, 100)
    assert kept == [0, 2] and counts == {reason: (1, 2)}
