"""Decode attention over stored keys and values in Triton: every case of two files beside this one. `triton_children` says why."""

from tests.backends.triton_children import suite

children, test_case, test_slow_case = suite("kv_attention_interpreted", "kv_attention_compiled")
