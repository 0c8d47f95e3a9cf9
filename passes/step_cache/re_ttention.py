"""Re-ttention: attention in a narrow window, whose softmax is corrected by what an earlier denoising step saw (arXiv 2505.22918)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.lowering.frame_band import frame_band, why_no_frames
from accelpass.ir.attention.spec.block_select import changed_scores
from accelpass.ir.attention.spec.op import ATTENTION, spec_of, want
from accelpass.ir.attention.spec.spec import Band
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.transform.resize import CannotResize
from accelpass.ir.transform.splice import inserted
from accelpass.ir.transform.steps import StepBlock, recall_new
from accelpass.passes.core.staged import FULL, Site, appending
from accelpass.passes.step_cache.base import StepPass, keep, kept, refuse_edited, why_no_window

_REFRESH, _WINDOW = "full+ratio", "window"
_GROWN = ":grown"


@dataclass(frozen=True)
class ReTtention(StepPass):
    """Between dense steps a query sees a few keys beside it, weighted as if it saw them all, plus what the others gave.

    Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", NeurIPS 2025. A dense step remembers,
    for each query, which share ``rho`` of its softmax falls on the window, and the difference of full and window attention. A
    step between computes the window alone, scales it by ``rho``, which grows by ``growth`` at each such step and is not clamped,
    and adds the difference. ``rho`` is ``exp(lse_window - lse_full)``; the difference is kept before the out-projection, which is
    linear, as the paper's is after it. Defaults are those of the authors' code for PixArt (20 steps); for CogVideoX it has
    ``start=15`` of 50 steps and a band in each frame: ``frame=1350, text=226``, where a token sees those near its own place in all
    frames, and text sees and is seen by all. Cross attention stays dense.

    Attributes:
        keep: width of the band in shares of the tokens: ``|i - j| <= int(tokens * keep) // 2`` along the flattened grid; 2 sees all.
        start: dense steps before the first that remembers.
        interval: every how many steps after that is dense; 1 equals the dense model.
        growth: lambda of the paper.
        frame: tokens of a frame of a video; 0 for a band along all tokens. ``keep`` is then of a frame.
        text: tokens of text in front of the frames, where both attend jointly.

    Raises:
        OptionError: a number out of range.
    """

    keep: float = 0.03125
    start: int = 5
    interval: int = 5
    growth: float = 0.04
    frame: int = 0
    text: int = 0

    name: ClassVar[str] = "re_ttention"
    summary: ClassVar[str] = "attention in a narrow window, corrected by the softmax of an earlier denoising step"
    paper: ClassVar[str] = "Re-ttention, arXiv:2505.22918"
    identity: ClassVar[dict[str, Any] | None] = {"interval": 1}

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 2:
            raise self.fail("keep", "a share of the tokens above 0, at most 2, at which all see all")
        if self.start < 0:
            raise self.fail("start", "a number of steps, 0 or more")
        if self.interval < 1:
            raise self.fail("interval", "a number of steps, 1 or more")
        if not 0 <= self.growth <= 1:
            raise self.fail("growth", "a number from 0, which keeps the ratio as it was, to 1")
        if self.frame < 0:
            raise self.fail("frame", "tokens of a frame, or 0 for a band along all tokens")
        if self.text < 0 or (self.text and not self.frame):
            raise self.fail("text", "tokens of text in front of frames, 0 or more; with frame=")

    def places(self, blocks: Sequence[StepBlock]) -> list[Site]:
        return [Site(m.path, b, m) for b in blocks for m in b.modules]

    def horizon(self) -> int:
        return self.start + self.interval + 1

    def action(self, step: int, site: str, branch: int = 0) -> str:
        if step < self.start or self.interval == 1:
            return FULL
        return _WINDOW if (step - self.start) % self.interval else _REFRESH

    def operand(self, name: str, step: int) -> Tensor | None:
        """By how much the ratio has grown; the first step after a dense one takes it as it is (the authors' code)."""
        if not name.endswith(_GROWN):
            return None
        return torch.tensor(self.growth * max(0, (step - self.start) % self.interval - 1))

    def acted(self, program: Program, site: Site, action: str) -> str:
        assert site.module is not None and site.module.attention.node is not None
        attention = site.module.attention.node
        spec, tokens = spec_of(attention), int(value(attention).shape[-2])
        why = why_no_window(program, site) if not self.frame else self._why_no_frames(site, tokens)
        if why is not None:
            raise CannotResize(why)
        refuse_edited(spec, self.name)
        reach = int((self.frame or tokens) * self.keep) // 2
        rows = value(attention).shape[:-1]
        if action == _REFRESH:
            near, of_window = self._window(program, attention, reach, True)
            full, of_all = self._with_normaliser(attention)
            with appending(max(near, of_window, full, of_all)) as build:
                ratio = build(aten.exp.default, build(aten.sub.Tensor, of_window, of_all))
                rest = build(aten.sub.Tensor, full, self._scaled(build, near, ratio))
            keep(program, site, "ratio", [ratio], [of_all])
            keep(program, site, "rest", [rest], [full])
            return "full attention, and what a window of it misses"
        ratio = recall_new(program, f"{site.path}:ratio", tuple(int(n) for n in rows), torch.float32)
        grown = recall_new(program, site.path + _GROWN, (), torch.float32)
        (rest,) = kept(program, site, "rest", [attention])
        near, _ = self._window(program, attention, reach, False)
        with appending(max(near, ratio, grown, rest)) as build:
            whole = build(aten.add.Tensor, self._scaled(build, near, build(aten.add.Tensor, ratio, grown)), rest)
        attention.replace_all_uses_with(whole)
        where = "in each frame" if self.frame else "to either side"
        return f"a window of {reach} tokens {where}, scaled, and the rest of an earlier step"

    def _why_no_frames(self, site: Site, tokens: int) -> str | None:
        assert site.module is not None
        spec = site.module.attention.spec
        if spec.bias != "none" or spec.causal or (why := changed_scores(spec)):
            return "the model's own mask is not combined with a window" if spec.bias != "none" or spec.causal else why
        return why_no_frames(tokens, self.frame, self.text)

    def _window(self, program: Program, attention: fx.Node, reach: int, normalised: bool) -> tuple[fx.Node, fx.Node]:
        """The attention in the window, and what :meth:`_with_normaliser` gives, or any node if not ``normalised``."""
        spec, graph = spec_of(attention), program.graph
        if self.frame:
            scale, frame, text = spec.scale, self.frame, self.text

            def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                return frame_band(q, k, v, scale, frame, text, reach)

            out, lse = inserted(program, attention, run, *attention.args[:3])
            return out, lse
        with graph.inserting_after(attention):
            near = call(
                graph,
                attention,
                ATTENTION,
                *attention.args[:-1],
                spec.edited(by=self.name, select=Band(reach)).to_json(),
            )
        return self._with_normaliser(near) if normalised else (near, near)

    def _with_normaliser(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What an attention gives, and the logarithm of each query's sum of exponentials; ``node`` is replaced."""
        lse = want(node, "lse", by=self.name)
        many = lse.args[0]
        assert isinstance(many, fx.Node)
        (out,) = [n for n in many.users if n.args[1] == 0]
        return out, lse

    @staticmethod
    def _scaled(build: Any, near: fx.Node, ratio: fx.Node) -> fx.Node:
        made: fx.Node = build(aten.mul.Tensor, near, build(aten.unsqueeze.default, ratio, -1))
        dtype = value(near).dtype
        return made if value(made).dtype == dtype else build(aten.to.dtype, made, dtype)
