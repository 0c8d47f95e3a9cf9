"""Paths as a user would write them."""

import pytest

from accelpass.ir.core.graph import clean_path


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("L['self'].model.layers.slice(None, 2, None)[1].mlp", "model.layers.1.mlp"),
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("L['model'].encoder[0].q", "encoder.0.q"),
        ("__dict__._modules.blocks.0.attn.weight", "blocks.0.attn.weight"),
        ("L['self'].__dict__['_modules']['blocks']['0']", "blocks.0"),
        ("my_modules.weight", "my_modules.weight"),
    ],
)
def test_clean_path(given: str, wanted: str) -> None:
    assert clean_path(given) == wanted
