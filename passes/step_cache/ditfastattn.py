"""DiTFastAttn: for each denoising step and attention, the cheapest variant that changes the model's output little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from accelpass.ir.analyses.axes.axes import axes
from accelpass.ir.attention.spec.op import ATTENTION, set_spec, spec_of
from accelpass.ir.attention.spec.spec import Band
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize, Resizer
from accelpass.ir.transform.steps import StepBlock, StepError, recall
from accelpass.passes.core.staged import FULL, Site, appending, put
from accelpass.passes.step_cache.base import (
    Searched,
    StepPass,
    StepSearch,
    keep,
    kept,
    of_first_branch,
    refuse_edited,
    state_name,
    why_no_window,
)

SHARE, WINDOW_HALF, WINDOW, HALF, TWIN = "share", "window+half", "window", "half", "twin"
METHODS = (SHARE, WINDOW_HALF, WINDOW, HALF)
"""Cheapest first, as the search tries them: AST, WA-RS+ASC, WA-RS and ASC of the paper."""
LETTERS = {"F": FULL, "A": SHARE, "X": WINDOW_HALF, "W": WINDOW, "C": HALF}
_OUTPUT, _RESIDUAL = "+output", "+residual"


@dataclass(frozen=True)
class DiTFastAttn(StepPass, Searched):
    """Attention shared across steps, in a window plus a cached residual, or for one guidance half alone.

    Yuan et al., "DiTFastAttn: Attention Compression for Diffusion Transformer Models", NeurIPS 2024, section 3. Only
    self-attention (and joint attention, for sharing) is compressed, as in the authors' code. The residual is that of
    full against window attention before the out-projection; what is shared is the module's output after it.

    Attributes:
        methods: by attention module, one letter for each model call: F full, A shared with the last step, W window plus
            residual, C one guidance half for both, X window plus residual for one half. ``accelpass.search_steps`` finds them.
        window: tokens to either side that a query sees along the flattened grid; None for an eighth of the tokens,
            as in the paper's 128 of 1024 and 512 of 4096.
        threshold: the paper's delta: how much all changes of a step together may change the model's output
            (:func:`ditfastattn_search.relative_difference`) when the methods are searched; it tried 0.025 to 0.15.
        cond_first: which half of the batch is computed where one stands for both: the first, or the second.
        guidance: how the run does classifier-free guidance: as one ``batch`` of two halves, as two ``calls``, or ``none``.
            With two calls, C and X mean that the second takes the output of the first.
    """

    methods: dict[str, str] = field(default_factory=dict)
    window: int | None = None
    threshold: float = 0.05
    cond_first: bool = True
    guidance: Literal["batch", "calls", "none"] = "batch"

    name: ClassVar[str] = "ditfastattn"
    summary: ClassVar[str] = "attention shared across denoising steps and guidance halves, or in a window"
    paper: ClassVar[str] = "arXiv:2406.08552"
    identity: ClassVar[dict[str, Any] | None] = {"methods": {}}

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 10:
            raise self.fail("threshold", "a number from 0, which changes nothing, to 10")
        if self.window is not None and self.window < 0:
            raise self.fail("window", "a number of tokens, 0 or more, or None for an eighth of them")
        lengths = {len(letters) for letters in self.methods.values()}
        if len(lengths) > 1 or (lengths and self.timesteps and lengths != {len(self.timesteps)}):
            raise self.fail("methods", f"one letter for each model call ({len(self.timesteps) or 'the same for all'})")
        for path, letters in self.methods.items():
            if set(letters) - set(LETTERS) or letters[:1] not in ("F", ""):
                raise self.fail(
                    "methods", f"letters of {''.join(LETTERS)}, F at the first step; {path} has {letters!r}"
                )

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(m.path, b, m) for b in blocks for m in b.modules]

    def action(self, step: int, site: str, branch: int = 0) -> str:
        letters = self.methods.get(site, "")
        if not letters:
            return FULL
        if step >= len(letters):
            raise StepError(f"the plan of ditfastattn has {len(letters)} model calls, and this is number {step + 1}")
        method, by_calls = LETTERS[letters[step]], self.guidance == "calls"
        if method == SHARE:
            return SHARE
        if by_calls and method in (HALF, WINDOW_HALF):
            method = TWIN if branch else {HALF: FULL, WINDOW_HALF: WINDOW}[method]
        # Kept only if it is read: by a window before the next full attention, by a shared step anywhere.
        if letters[step] in "FC" and _next_of(letters, step, "WX", "FC"):
            method += _RESIDUAL
        return method + _OUTPUT if set(letters) & set("ACX" if by_calls else "A") else method

    @property
    def calls(self) -> int | None:
        return self.branches if self.methods else None

    def shown(self, action: str) -> str:
        return "reuse" if action == SHARE else super().shown(action)

    @property
    def ends(self) -> int | None:
        return super().ends or self.horizon() or None

    def horizon(self) -> int:
        return max(map(len, self.methods.values()), default=0)

    @property
    def branches(self) -> int:
        return 2 if self.guidance == "calls" else 1

    def acted(self, program: Program, site: Site, action: str) -> str:
        method, output, residual = parsed(action)
        assert site.module is not None and site.module.attention.node is not None
        like, attention = site.results, site.module.attention.node
        if method == SHARE:
            put(site, kept(program, site, "output", like))
            return "the output of an earlier step"
        if method == TWIN:
            names = [of_first_branch(state_name(site.path, "output", n)) for n in range(len(like))]
            made = [recall(program, name, node) for name, node in zip(names, like, strict=True)]
            put(site, made)
            keep(program, site, "output", made, like)
            if residual:
                name = of_first_branch(state_name(site.path, "residual"))
                keep(program, site, "residual", [recall(program, name, attention)], [attention])
            return "the output of this step's first call"
        if method in (WINDOW, WINDOW_HALF) or residual:
            why = why_no_window(program, site)
            if why is not None:
                raise CannotResize(why)
        node = attention
        if method != FULL or residual:
            refuse_edited(spec_of(node), self.name)
        window = self._window(node)
        if method in (HALF, WINDOW_HALF):
            node, made = self._half(program, site)
        else:
            made = list(like)
        graph = program.graph
        if method in (WINDOW, WINDOW_HALF):
            set_spec(node, spec_of(node).edited(by=self.name, select=Band(window)))
            (rest,) = kept(program, site, "residual", [attention])
            with graph.inserting_after(node):
                mine = self._own(rest, node) if method == WINDOW_HALF else rest
            with graph.inserting_after(max(node, mine)):
                whole = call(graph, node, aten.add.Tensor, node, mine)
            node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        elif residual:
            spec = spec_of(node).edited(by=self.name, select=Band(window))
            with graph.inserting_after(node):
                near = call(graph, node, ATTENTION, *node.args[:-1], spec.to_json())
            with graph.inserting_after(near):
                rest = call(graph, node, aten.sub.Tensor, node, near)
            if method == HALF:
                with graph.inserting_after(rest):
                    rest = call(graph, node, aten.cat.default, [rest, rest])
            keep(program, site, "residual", [rest], [attention])
        if method in (HALF, WINDOW_HALF):
            made = self._doubled(program, made)
            put(site, made)
        if output:
            keep(program, site, "output", made, like)
        return _SAID[method].format(window=window)

    def _window(self, node: fx.Node) -> int:
        tokens = int(value(node).shape[-2])
        return max(1, tokens // 8) if self.window is None else self.window

    def _half(self, program: Program, site: Site) -> tuple[fx.Node, list[fx.Node]]:
        """The module for one half of the batch: its attention and its results."""
        assert site.module is not None and site.module.attention.node is not None
        batch = int(value(site.streams[0]).shape[0])
        if batch % 2:
            raise CannotResize(f"a batch of {batch} has no two guidance halves")
        graph, found = program.graph, program.analysis(axes)
        start = 0 if self.cond_first else batch // 2

        def take(node: fx.Node, dim: int) -> fx.Node:
            half = int(value(node).shape[dim]) // 2
            low = 0 if start == 0 else half
            return call(graph, node, aten.slice.Tensor, node, dim, low, low + half)

        with appending(max(site.results)):
            resizer = Resizer(graph, found, found.of(site.streams[0])[0], batch // 2, take)
            made = resizer.copy(site.module.region, site.results)
        return resizer.copied(site.module.attention.node), made

    def _own(self, whole: fx.Node, like: fx.Node) -> fx.Node:
        half = int(value(like).shape[0])
        low = 0 if self.cond_first else half
        return call(whole.graph, like, aten.slice.Tensor, whole, 0, low, low + half)

    @staticmethod
    def _doubled(program: Program, halves: Sequence[fx.Node]) -> list[fx.Node]:
        made = []
        last = max(halves)
        for half in halves:
            with program.graph.inserting_after(last):
                last = call(program.graph, half, aten.cat.default, [half, half])
            made.append(last)
        return made

    def search(self, tell: Callable[[str], None]) -> StepSearch:
        from accelpass.passes.step_cache.ditfastattn_search import DiTFastAttnSearch

        return DiTFastAttnSearch(self, tell)

    def check_call(self, latents: Tensor) -> None:
        if self.guidance == "calls" or not any(set(letters) & {"C", "X"} for letters in self.methods.values()):
            return
        halves = latents.chunk(2)
        if len(latents) % 2 == 0 and torch.equal(*halves):
            return
        seen = "holds different latents in its two halves" if len(latents) % 2 == 0 else f"is odd ({len(latents)})"
        raise StepError(
            f"the plan of ditfastattn computes attention for one guidance half alone, and the batch {seen}. "
            "Use guidance as the plan was made with, or make a plan without it (accelpass.search_steps)."
        )


_SAID = {
    FULL: "full attention",
    HALF: "full attention of one guidance half",
    WINDOW: "a window of {window} tokens to either side, and the rest of an earlier step",
    WINDOW_HALF: "a window of {window} tokens to either side of one guidance half, and the rest of an earlier step",
}


def parsed(action: str) -> tuple[str, bool, bool]:
    """(method, whether its output is kept, whether the residual is)."""
    output, residual = action.endswith(_OUTPUT), _RESIDUAL in action
    return action.removesuffix(_OUTPUT).removesuffix(_RESIDUAL), output, residual


def _next_of(letters: str, step: int, wanted: str, ends: str) -> bool:
    """Whether one of ``wanted`` comes after ``step`` before one of ``ends``."""
    for letter in letters[step + 1 :]:
        if letter in wanted:
            return True
        if letter in ends:
            return False
    return False
