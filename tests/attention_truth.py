"""How many attentions one forward really executes, found without any of our compiler.

Two ways that share nothing:

- ``count_attentions`` watches the torch functions that are called. An attention is a fused call, or a softmax over the
  last dimension *of a product of two activations* whose result multiplies activations again. A router's softmax comes
  from a linear layer, a pooling's result does not multiply; neither counts.
- ``count_modules`` watches which modules run: those called attention, with their own query, key and value projections.

They disagree for a reason or one of them is wrong; ``REASONS`` has the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FUSED = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "flex_attention",
}
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm", "baddbmm_", "addbmm", "mm"}
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
# What may stand between a product and its softmax, or between a softmax and the values: layout, type, mask, scale.
_PASSES = {
    *(
        "view",
        "reshape",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "contiguous",
        "flatten",
        "unflatten",
    ),
    *(
        "clone",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "__getitem__",
        "__get__",
        "narrow",
        "slice",
        "pad",
    ),
    *("split", "chunk", "unbind", "tensor_split", "cat", "concat", "stack", "as_strided", "repeat", "swapaxes", "roll"),
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__isub__", "sub_", "mul", "mul_", "__mul__"),
    *("__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__", "tanh", "masked_fill", "masked_fill_"),
    *(
        "where",
        "nan_to_num",
        "clamp",
        "clamp_",
        "dropout",
        "dropout_",
        "masked_fill__",
        "detach",
        "movedim",
        "__rsub__",
    ),
    *("view_as", "expand_as", "maximum", "minimum", "max", "alpha_dropout", "_unsafe_view", "unfold", "logical_not"),
    *(
        "gather",
        "scatter",
        "index_select",
        "rearrange",
        "sigmoid",
        "relu",
        "neg",
        "__neg__",
        "t",
        "true_divide",
        "cast",
    ),
    *("_pad", "constant_pad_nd", "truediv", "double"),
}
_WRITES = {"__setitem__", "copy_"}


class _Watch(TorchFunctionMode):
    """Follows products of activations (scores) and softmaxes of those (weights) from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0
        self.by_hand: set[int] = set()
        self._softmaxes = 0
        # By id, with the tensor itself, so that no id is used again while it is followed.
        self._scores: dict[int, torch.Tensor] = {}
        self._weights: dict[int, tuple[torch.Tensor, frozenset[int]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        inputs = list(_tensors((args, kwargs)))
        if name in FUSED:
            self.fused += 1
        elif name in _PRODUCTS:
            self._product(inputs, out)
        elif name in _SOFTMAX:
            self._softmax(args, kwargs, inputs, out)
        elif name in _PASSES or name in _WRITES:
            self._pass(inputs, args[0] if name in _WRITES else out)
        return out

    def _product(self, inputs: list[torch.Tensor], out: Any) -> None:
        if sum(not isinstance(tensor, torch.nn.Parameter) for tensor in inputs) < 2:
            return
        found = [self._weights[id(tensor)][1] for tensor in inputs if id(tensor) in self._weights]
        if found:
            self.by_hand |= frozenset().union(*found)
        for tensor in _tensors(out):
            self._scores[id(tensor)] = tensor

    def _softmax(self, args: tuple, kwargs: dict[str, Any], inputs: list[torch.Tensor], out: torch.Tensor) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        last = dim in (-1, out.dim() - 1)
        if last and id(inputs[0]) in self._scores:
            self._weights[id(out)] = (out, frozenset([self._softmaxes]))
            self._softmaxes += 1

    def _pass(self, inputs: list[torch.Tensor], out: Any) -> None:
        weights = [self._weights[id(tensor)][1] for tensor in inputs if id(tensor) in self._weights]
        scores = any(id(tensor) in self._scores for tensor in inputs)
        for tensor in _tensors(out):
            if weights:
                self._weights[id(tensor)] = (tensor, frozenset().union(*weights))
            elif scores:
                self._scores[id(tensor)] = tensor


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def count_attentions(model: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """Attentions that one eager forward executes, as torch functions."""
    with torch.no_grad(), _Watch() as watch:
        model(**kwargs)
    return watch.fused + len(watch.by_hand)


# Where the two counts differ, why. What executes is the truth; the modules are the check.
REASONS: dict[str, str] = {
    "causal_lm/diffllama": "one module subtracts two attentions, so it executes two",
    "causal_lm/prophetnet": "one module attends for the main stream and for the predicted one",
    "causal_lm/reformer": "attends by exp(x - logsumexp(x)) within chunks or hash buckets: no softmax is called",
    "masked_lm/mra": "approximates attention with block averages: no softmax over keys",
    "masked_lm/reformer": "attends by exp(x - logsumexp(x)) within chunks or hash buckets: no softmax is called",
    "masked_lm/yoso": "samples attention by hashing: no softmax over keys",
}

_NAMED = re.compile(r"(?i:atten|attn|mha|selfat)|MLA")
# Families named after the other mixer they have.
_MISLEADING = re.compile(r"^(KimiLinear|RecurrentGemma)")
# Mixers that are called attention and have no softmax over keys.
_OTHER = re.compile(
    r"Linear|Mamba|Delta|Recurrent|Lightning|ShortConv|KDA|RWKV|Rwkv|Index|Additive|Pool|Retention|SSM|Fourier",
    re.ASCII,
)
_PROJECTION = {
    "query": re.compile(
        r"^(q|q_proj|query|q_lin|to_q|wq|q_a_proj|q_b_proj|queries|q_net|query_proj|proj_q|query_self|q_attn"
        r"|linear_q|q_head|query_layer|project_q)$",
        re.IGNORECASE,
    ),
    "fused": re.compile(
        r"^(qkv|qkv_proj|query_key_value|c_attn|w?_?qkv|in_proj|to_qkv|queries_keys_values|query_key|qkv_linear|kqv"
        r"|query_key_value_proj|kv_proj|att_proj_linear|in_proj_weight|q_k_v|convolution_projection_query)$",
        re.IGNORECASE,
    ),
}


def is_attention(module: torch.nn.Module) -> bool:
    """Called attention, not one of the linear kind, and with projections of its own."""
    kind = _MISLEADING.sub("", type(module).__name__)
    if not _NAMED.search(kind) or _OTHER.search(kind):
        return False
    own = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    return any(pattern.match(name) for name in own for pattern in _PROJECTION.values())


def count_modules(model: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """Forward calls of attention modules, innermost only (an attention may hold the module that does the work)."""
    calls = 0

    def called(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [
        module.register_forward_pre_hook(called)
        for module in model.modules()
        if is_attention(module) and not any(is_attention(child) for child in module.modules() if child is not module)
    ]
    try:
        with torch.no_grad():
            model(**kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
