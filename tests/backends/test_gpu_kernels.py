"""Kernels compiled for GPUs that are not here: every case of the file beside this one. `triton_children` says why."""

from tests.backends.triton_children import suite

children, test_case, test_slow_case = suite("gpu_kernels_compiled")
