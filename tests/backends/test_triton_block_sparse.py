"""Block-sparse attention in Triton: every case of two files beside this one. `triton_children` says why."""

from tests.backends.triton_children import suite

children, test_case, test_slow_case = suite("block_sparse_interpreted", "block_sparse_compiled")
