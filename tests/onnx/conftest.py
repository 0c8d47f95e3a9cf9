"""Without the packages of the ``onnx`` extra there is nothing to test here."""

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
