"""Classification models as rewards against `transformers`, one response at a time: `make parity`."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tokenizers
import transformers

from bilevel_jax import online, rewards, sampling
from bilevel_jax.data import rows as data_rows
from tests.conftest import make_model

pytestmark = pytest.mark.parity
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = ["It is six.", "No", "A far longer answer, which says the same again and again and again.", "Grüße ☃"] * 6


@pytest.fixture(scope="module", params=["gpt_neox", "bert"])
def directory(request, tmp_path_factory):
    """A random reward model: a decoder with a chat template that reads the last token, or an encoder of a pair of texts."""
    out = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    if request.param == "gpt_neox":
        make_model(out, "gpt_neox")
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        tokenizer.chat_template = CHAT
        config = transformers.GPTNeoXConfig(vocab_size=300, max_position_embeddings=128, rotary_pct=0.5, **shape)
        model = transformers.GPTNeoXForSequenceClassification(config)
    else:
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "It": 2, "six": 3, "No": 4}, "[UNK]"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=5, **shape))
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_rewards_are_the_logits_of_single_responses(directory):
    """Padding to the length of longer responses has no effect."""
    row, _ = data_rows.collect(data_rows.parse([(1, {"question": "3 + 3?", "response": "r"})]), "test")
    generations = [
        online.Generation(0, g, text, sampling.Response(np.zeros(1, np.int32), None, None, None, "stop"))
        for g, text in enumerate(TEXTS)
    ]
    values = rewards.make_reward_fn(str(directory), row, [None])(generations, np.zeros(len(generations)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for text, value in zip(TEXTS, values):
        if tokenizer.chat_template:
            tokens = tokenizer(f"<user>3 + 3?<assistant>{text}", return_tensors="pt")
        else:
            tokens = tokenizer("3 + 3?", text, return_tensors="pt")
        with torch.no_grad():
            if not tokenizer.chat_template:
                expected = model(**tokens).logits
            else:  # the score head on the state of the last token
                expected = model.score(model.gpt_neox(**tokens).last_hidden_state[:, -1])
        assert value == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert np.ptp(values) > 0.1
