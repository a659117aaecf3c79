"""The page of the GPU measurements, from numbers by hand."""

import pytest

from experiments.benchmarks import gpu


@pytest.fixture(autouse=True)
def flags():
    gpu.FLAGS(["gpu"])


SECTIONS = {
    "step pythia-1b": {
        "tokens": 10,
        "mixing": {"s": 1.0, "tokens_per_s": 10.0, "of_peak": 0.5},
        "offline, current": {"s": 1.1, "tokens_per_s": 9.1, "of_peak": 0.45},
        "offline, influence": {"s": 1.2, "tokens_per_s": 8.3, "of_peak": 0.42},
    },
    "pytorch pythia-1b": {"published": {"s": 4.4}, "packed": {"s": 1.65, "attention": "sdpa"}},
    "decoding pythia-1b": {"s": 2.0, "tokens_per_s": 4096.0, "of_bandwidth": 0.6},
    "generate pythia-1b": {"s": 9.0, "tokens_per_s": 512.0},
    "step llama3-8b": {"skipped": "12 s were left, 75 are needed"},
}


def test_comparisons():
    """A tenth of 32 rows with 128 new tokens each is 409.6 tokens, 0.1 s at 4096 a second: (1.2 + 0.1) / 1.0."""
    assert gpu.comparisons(SECTIONS) == [
        "published PyTorch over ours (offline, current): 4.00",
        "packed PyTorch over ours (offline, current): 1.50",
        "selection over mixing: 1.10 (costs of losses at θ^k), 1.20 (influence)",
        "online over mixing: 1.30, with R = 10% of 32 rows a step answered in 128 tokens each at the measured rate of decoding",
        "decoding over `generate`: 8.00",
    ]


def test_page():
    text = gpu.page({"toy": False, "hardware": "1 x NVIDIA H200", "sections": SECTIONS})
    assert "| step pythia-1b | offline, current | 1.1 | 9.1 | 45% |" in text
    assert "| decoding pythia-1b |  | 2 | 4096 | 60% |" in text
    assert "- step llama3-8b: 12 s were left, 75 are needed" in text and "rehearsal" not in text


def test_lengths_of_rows():
    """Every row fits a sequence, and the batch holds all rows of both levels."""
    of = gpu.shape("pythia-1b")
    sizes = [len(prompt) + len(response) for prompt, response in gpu.rows(of, 0)]
    assert len(sizes) == 64 and max(sizes) <= of.length
    packed = gpu.batch(of, 0, True).packed
    assert int((packed.segment_ids > 0).sum()) == sum(sizes)
