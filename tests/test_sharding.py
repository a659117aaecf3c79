"""The rule that maps dimensions to mesh axes, shardings of weights, and invalid meshes."""

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from bilevel_jax import sharding
from bilevel_jax.models import architectures, lora, model_config


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    "mesh, shape, names, part",
    [
        ((2, 3, 4), (12, 5), ("rows",), (2, 5)),
        ((2, 3, 4), (8, 5), ("rows",), (8, 5)),  # 6 does not divide 8; 2 alone would
        ((2, 3, 4), (300, 18), ("vocab", "hidden"), (75, 6)),
        ((2, 3, 4), (300, 16), ("vocab", "hidden"), (75, 16)),
        ((2, 3, 4), (302, 18), ("vocab", "hidden"), (302, 6)),
        ((2, 3, 4), (6, 7, 8, 9), ("rows", None, "heads"), (1, 7, 2, 9)),
        ((2, 3, 4), (6, 18), ("stripes", "hidden"), (3, 6)),
        ((1, 1, 1), (7, 5), ("rows", "mlp"), (7, 5)),
    ],
)
def test_a_dimension_is_split_if_its_axes_divide_it(mesh, shape, names, part):
    mesh = abstract_mesh(*mesh)
    result = jax.sharding.NamedSharding(mesh, sharding.spec(mesh, shape, names))
    assert result.shard_shape(shape) == part


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        (("embed_tokens",), (8, 8), P(("tensor",), ("fsdp",))),
        (("layers", "self_attn", "q_proj", "kernel"), (2, 8, 8), P(None, ("fsdp",), ("tensor",))),
        (("layers", "", "self_attn", "q_proj", "kernel"), (8, 8), P(("fsdp",), ("tensor",))),  # a single layer
        (("layers", "self_attn", "o_proj", "kernel"), (2, 8, 8), P(None, ("tensor",), ("fsdp",))),
        (("layers", "mlp", "down_proj", "kernel"), (2, 8, 8), P(None, ("tensor",), ("fsdp",))),
        (("layers", "mlp", "dense_h_to_4h", "bias"), (2, 8), P(None, ("tensor",))),
        (("layers", "mlp", "dense_4h_to_h", "bias"), (2, 8), P(None, ("fsdp",))),
        (("layers", "self_attn", "qkv_proj", "kernel"), (2, 8, 16), P(None, ("fsdp",), ("tensor",))),
        (("layers", "mlp", "gate_up_proj", "kernel"), (2, 8, 16), P(None, ("fsdp",), ("tensor",))),
        (("layers", "self_attn", "q_norm", "scale"), (2, 8), P(None, None)),
        (("layers", "input_layernorm", "bias"), (2, 8), P(None, None)),
        (("norm", "scale"), (8,), P(None)),
    ],
)
def test_weights_by_name(path, shape, expected):
    assert sharding.weight_sharding(abstract_mesh(2, 2, 2), path, shape).spec == expected


@pytest.mark.parametrize(
    "axes, devices, shape",
    [((0, 1, 1), 8, (8, 1, 1)), ((0, 2, 2), 8, (2, 2, 2)), ((3, 1, 2), 8, (3, 1, 2)), ((0, 8, 1), 8, (1, 8, 1))],
)
def test_data_takes_the_remaining_devices(monkeypatch, axes, devices, shape):
    monkeypatch.setattr(jax, "devices", lambda: list(range(devices)))
    monkeypatch.setattr(jax, "make_mesh", lambda shape, names, axis_types, devices: (shape, len(devices)))
    actual, used = sharding.make_mesh(*axes)
    assert actual == shape and used == shape[0] * shape[1] * shape[2]


@pytest.mark.parametrize("axes, reason", [((0, 3, 1), "3 does not divide"), ((9, 1, 1), "8 devices"), ((0, 8, 2), "8 devices")])
def test_invalid_meshes(monkeypatch, axes, reason):
    monkeypatch.setattr(jax, "devices", lambda: list(range(8)))
    with pytest.raises(ValueError, match=f"mesh.data={axes[0]}, mesh.fsdp={axes[1]}, mesh.tensor={axes[2]}.*{reason}"):
        sharding.make_mesh(*axes)


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_hidden_names_the_dimensions_of_hidden_width(architecture):
    """Hidden 64, heads 8·16 = 128, feed-forward 96."""
    config = model_config.ModelConfig(architecture, 32, 64, 96, 1, 8, 8, 16, 16, 64, "silu", 1e-5, 1e4)
    for name, (_, *widths) in lora.projections(config).items():
        assert [dimension == "hidden" for dimension in sharding.WEIGHTS[name]] == [width == 64 for width in widths]
