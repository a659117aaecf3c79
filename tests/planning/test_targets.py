"""Names of targets, and the errors for those that are none."""

import pytest

from bilevel_jax.planning import targets


@pytest.mark.parametrize(
    "text, target",
    [
        ("tpu-v5e:2x2", targets.Target("tpu", "v5e", (2, 2))),
        ("tpu-v5p:2x2x1", targets.Target("tpu", "v5p", (2, 2, 1))),
        ("tpu-v6e:4x4", targets.Target("tpu", "v6e", (4, 4))),
        ("gpu-h100", targets.Target("gpu", "h100", (1,))),
        ("gpu-rtx4090:8", targets.Target("gpu", "rtx4090", (8,))),
    ],
)
def test_names(text, target):
    assert targets.parse(text) == target
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize(
    "text, message",
    [
        ("tpu-v5r:2x2", r"^--compile='tpu-v5r:2x2' is no known target.*; names are tpu-v5e, tpu-v5p, .*, gpu-rtx4090$"),
        ("gpu-h10", r"did you mean gpu-h100\?"),
        ("", "is no known target"),
        ("tpu-v5e", "not arranged as tpu-v5e, for example --compile=tpu-v5e:2x2$"),
        ("tpu-v5p:2x2", "for example --compile=tpu-v5p:2x2x1$"),
        ("gpu-a100:2x2", "for example --compile=gpu-a100:8$"),
        ("gpu-a100:0", "has no devices"),
    ],
)
def test_no_targets(text, message):
    with pytest.raises(ValueError, match=message):
        targets.parse(text)


def test_description_of_a_gpu():
    """The text that XLA's own H100 target has, of which these are some lines."""
    description = targets.GPUS["h100"].description("h100")
    for line in (
        "shared_memory_per_core: 233472",
        "shared_memory_per_block_optin: 232448",
        "core_count: 132",
        "l2_cache_size: 52428800",
        "cuda_compute_capability { major: 9 minor: 0 }",
    ):
        assert line in description
