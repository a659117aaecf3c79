"""The records: the one that docs/adding_a_model.md shows, and what holds for all."""

import dataclasses
import json
import pathlib
import re

import pytest

from bilevel_jax.models import architectures, huggingface
from tests.models import models
from tests.models.test_decoder import VARIANTS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_model.md"


def code_of_page(start: str) -> str:
    return next(
        block for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if block.strip().startswith(start)
    )


def test_the_record_of_the_page_is_the_record():
    namespace = vars(architectures).copy()
    exec(code_of_page("STABLELM ="), namespace)
    assert namespace["STABLELM"] == architectures.ARCHITECTURES["stablelm"]


def test_the_factors_of_the_page_are_those_of_the_record():
    factors = eval(f"dict({code_of_page('attention_scale=')})", vars(architectures).copy())
    names = {"model_type": "granite", "class_name": "GraniteForCausalLM"}
    assert dataclasses.replace(architectures.LLAMA, **names, **factors) == architectures.ARCHITECTURES["granite"]


def test_the_variants_of_the_page_are_the_variants():
    file = (models.FIXTURES / "make.py").read_text()
    assert "".join(code_of_page('"stablelm":').split()) in "".join(file.split())


@pytest.mark.parametrize("key", architectures.ARCHITECTURES["stablelm"].unsupported)
def test_unsupported_keys_are_refused(tmp_path, key):
    settings = json.loads((models.FIXTURES / "stablelm" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {key: True}))
    with pytest.raises(huggingface.ModelError, match=f"config.json: {key}=True is not supported"):
        huggingface.read_config(tmp_path)


def test_every_architecture_has_a_reference():
    assert {models.load(variant)[0].architecture for variant in VARIANTS} == architectures.ARCHITECTURES.keys()


@pytest.mark.parametrize("record", architectures.ARCHITECTURES.values(), ids=architectures.ARCHITECTURES)
def test_names_of_projections_are_unique(record):
    assert len(record.projections) == len(record.qkv) + len(record.mlp_inputs) + 2


def test_one_name_with_two_shardings_is_refused(monkeypatch):
    output = architectures.Linear("o_proj", "mlp", "hidden", False)
    other = dataclasses.replace(architectures.LLAMA, model_type="other", mlp_output=output)
    monkeypatch.setitem(architectures.ARCHITECTURES, "other", other)
    with pytest.raises(ValueError, match="other: o_proj"):
        architectures.sharding_axes()
