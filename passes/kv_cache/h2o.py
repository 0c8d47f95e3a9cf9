"""H2O: keep the newest tokens and those that attention went to most (arXiv 2306.14048, NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from accelpass.ir.attention.spec.spec import AttentionMass, ScoreTap
from accelpass.passes.kv_cache.budget import Evicting
from accelpass.passes.kv_cache.storage.heavy_hitters import HeavyHitters
from accelpass.passes.kv_cache.storage.rotation import Tables
from accelpass.passes.kv_cache.storage.slots import Amount


@dataclass(frozen=True)
class H2O(Evicting):
    """Evict all but heavy hitters and recent tokens, for each key/value head on its own.

    The prompt's own attention is exact and dense; its probabilities, summed over queries, are the first scores. Each later
    token attends over what is left and itself, adds its probabilities, and one token leaves. Budgets are shares of the
    prompt's length and are fixed at its end, or ``tokens``, as the authors' code has it too: a cache, and a time for each
    token, that do not grow with the prompt. The paper gives heavy hitters and the newest a tenth of the prompt each. Recent tokens
    are told by their position (inferred); at least one is kept (inferred).

    Attributes:
        score: heavy hitters have the largest ``"sum"`` of attention, as in the paper, which early tokens had more time to
            collect, or the largest ``"mean"`` over the tokens that could attend to them (the ranking of ZipVL, arXiv
            2410.08584).
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "keep the newest tokens of a KVCache and those that attention went to most; evict the rest"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
    identity: ClassVar[dict[str, Any] | None] = {"budget": 1.0}
    score: Literal["sum", "mean"] = "sum"

    @property
    def tap(self) -> ScoreTap:
        return AttentionMass()

    def storage(self, heavy: Amount, recent: Amount, tables: Tables | None) -> HeavyHitters:
        return replace(super().storage(heavy, recent, tables), mean=self.score == "mean")
