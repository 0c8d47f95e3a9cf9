"""int8 and int4 weight-only linears in Triton: every case of two files beside this one. `triton_children` says why."""

import subprocess
import sys

from tests.backends.triton_children import suite

children, test_case, test_slow_case = suite("weight_only_interpreted", "weight_only_compiled")


def test_without_triton_the_extra_is_named() -> None:
    code = "import sys; sys.modules['triton'] = None; import accelpass.backends.kernels.triton.weight_only"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert got.returncode == 1
    assert "pip install 'accelpass[triton]'" in got.stderr.splitlines()[-1]
