"""What must work right after ``pip install accelpass``; ``make smoke`` runs it in an empty environment."""

import subprocess
import sys
from pathlib import Path

import torch

model, x = (
    torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)).eval(),
    torch.ones(2, 64),
)
fast = torch.compile(model, backend="accelpass", options={"passes": ["int8_weights"], "lowering": "eager"})
with torch.no_grad():
    assert torch.allclose(fast(x), model(x), atol=0.02), "packed weights are wrong"

import accelpass  # noqa: E402  # only now: the backend must be found without it

report = accelpass.explain(fast)
assert len(report.passes["int8_weights"].took) == 2, report
assert report.to_html("report.html").read_text().startswith("<!doctype html>"), "the report's template is missing"
command = Path(sys.prefix) / "bin" / "accelpass"
listed = subprocess.run([command, "passes"], capture_output=True, text=True, check=True)
assert "int4_weights" in listed.stdout
print("accelpass", accelpass.__version__, "works; imported from", accelpass.__file__)
