"""Semantic attention: every way of writing attention becomes one node with a spec that passes edit.

``detect`` finds, ``insert`` replaces, passes call ``set_spec(node, spec_of(node).edited(by=...))``, ``lower`` gives
operators back: the model's own where nothing was edited.
"""

from accelpass.ir.attention.lowering import blocks as blocks  # registers its lowering
from accelpass.ir.attention.lowering import fused as fused  # registers its lowerings
from accelpass.ir.attention.lowering.lower import Lowering, Lowerings, NoLowering, lower, register_lowering
from accelpass.ir.attention.lowering.sdpa import SdpaCall, sdpa_call
from accelpass.ir.attention.recognition.detect import Attention, NearMiss, Survey, detect, near_misses, survey
from accelpass.ir.attention.recognition.insert import captured, insert
from accelpass.ir.attention.spec.block_select import Blocks, BlockSelect
from accelpass.ir.attention.spec.op import attend, is_attention, set_spec, spec_of, want
from accelpass.ir.attention.spec.spec import (
    All,
    AttentionSpec,
    Band,
    BlockList,
    Dense,
    Format,
    Native,
    Part,
    Select,
    SinksAndWindow,
    Step,
    Store,
)

__all__ = [
    "All",
    "Attention",
    "AttentionSpec",
    "Band",
    "BlockList",
    "BlockSelect",
    "Blocks",
    "Dense",
    "Format",
    "Lowering",
    "Lowerings",
    "Native",
    "NearMiss",
    "NoLowering",
    "Part",
    "SdpaCall",
    "Select",
    "SinksAndWindow",
    "Step",
    "Store",
    "Survey",
    "attend",
    "captured",
    "detect",
    "insert",
    "is_attention",
    "lower",
    "near_misses",
    "register_lowering",
    "sdpa_call",
    "set_spec",
    "spec_of",
    "survey",
    "want",
]
