"""What tests look up in an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from accelpass.backends.onnx import runtime


def ran(path: Path, inputs: Mapping[str, Tensor], optimised: bool = False) -> list[Tensor]:
    """The file's outputs, computed by ONNX Runtime."""
    return runtime.run(runtime.session(path, optimised), inputs)


def stored(path: Path) -> dict[str, np.ndarray]:
    """The file's initializers by name."""
    return {t.name: numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}


def dtypes(path: Path) -> set[str]:
    """Types of the initializers with more than one dimension."""
    held = onnx.load(path, load_external_data=False).graph.initializer
    return {onnx.TensorProto.DataType.Name(t.data_type) for t in held if len(t.dims) > 1}


def far(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def eager(model: torch.nn.Module, passes: list, ids: Tensor) -> Tensor:
    """What the model compiled with the passes computes, uncompiled."""
    fast = torch.compile(model, backend="accelpass", options={"passes": passes, "lowering": "eager"})
    with torch.no_grad():
        made = fast(ids)
    return made if isinstance(made, Tensor) else made.logits
