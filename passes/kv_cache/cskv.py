"""CSKV: few channels of the keys and values of older tokens, all of the newest (arXiv 2409.10593)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from accelpass.ir.attention.spec import AttentionSpec
from accelpass.ir.derived import Recipe
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.graph import aten, call, value
from accelpass.ir.kv.lower import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.program import Program
from accelpass.passes.base import Calibrated, Run, Skip
from accelpass.passes.kv_cache.base import KVPass, cannot_store, refuse
from accelpass.passes.kv_cache.key_path import Projected, keys_and_values, replays
from accelpass.passes.kv_cache.low_rank import BLOCK, LowRank

FORMAT = 1
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class CSKV(KVPass, Calibrated):
    """Store ``x A`` for each token, with ``W^T`` about ``A B``, and exact keys and values of the last ``window`` tokens.

    Prompts attend to exact keys and values. Keys are reconstructed before the rotary embedding; a norm between projection
    and rotation is applied anew (inferred). Without calibration ``A B`` is the truncated singular value decomposition of the
    weight; ``accelpass.calibrate`` weighs it by the size of the activations and trains it to reconstruct keys and values
    (section "ASVD init" and the layer-wise loss of the paper's code). With ``bits=4`` latent keys are rounded by channel over
    32 tokens, latent values by token; there is no quantization-aware training (the paper's has).

    Attributes:
        keep_k, keep_v: share of the channels of all key (value) heads together that is kept; 1 equals the dense model.
            Ranks are multiples of 8. 0.2 is the paper's headline of 80 % less memory (inferred).
        window: newest tokens kept exactly.
        bits: of the latents: 16 (the model's dtype), 8 or 4.

    Raises:
        OptionError: a share outside (0, 1], other bits, a window below 1 or, rounded, below 32.
    """

    name: ClassVar[str] = "cskv"
    summary: ClassVar[str] = "few channels of older tokens' keys and values in a KVCache, all of the newest"
    paper: ClassVar[str] = "CSKV, arXiv 2409.10593"
    identity: ClassVar[dict[str, Any] | None] = {"keep_k": 1.0, "keep_v": 1.0}
    after: ClassVar[tuple[str, ...]] = ("h2o", "kv_quant", "kv_window", "mikv")
    keep_k: float = 0.2
    keep_v: float = 0.2
    window: int = 32
    bits: int = 16

    def __post_init__(self) -> None:
        for name in ("keep_k", "keep_v"):
            if not 0 < getattr(self, name) <= 1:
                raise self.fail(name, "a share of the channels above 0, at most 1")
        if self.bits not in (16, 8, 4):
            raise self.fail("bits", "16, 8 or 4")
        if self.window < (1 if self.bits == 16 else BLOCK):
            raise self.fail(
                "window", f"1 token or more, {BLOCK} or more with bits=4 or 8, which are rounded {BLOCK} at a time"
            )
        self.check_sites()

    def rank(self, share: float, channels: int) -> int:
        """How many numbers stand for ``channels`` of a token."""
        return min(channels, max(8, round(share * channels / 8) * 8))

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        """ASVD's start, then one epoch of Adam on each factor pair's own reconstruction loss; see the class."""
        pairs: dict[str, Factors] = {}
        reasons = []
        for site in kv_sites(program):
            found = cannot_store(site) or keys_and_values(program, site)
            if isinstance(found, str):
                reasons.append(f"{site.path}: {found}")
                continue
            if isinstance(self.wanted(site.path), Skip):
                continue
            for side, share in zip(found, (self.at([site.path]).keep_k, self.at([site.path]).keep_v), strict=True):
                path, weight = program.tensors.path(side.weight), program.tensors.value(side.weight)
                assert path is not None and weight is not None
                pairs[path] = Factors(weight.detach(), self.rank(share, weight.shape[0]))
        if not pairs:
            raise PassError(
                f"cskv found no layer to calibrate: {'; '.join(reasons[:2]) or 'no attention reads a KVCache'}"
            )
        run({path: pair.see for path, pair in pairs.items()}, "size of activations")
        for pair in pairs.values():
            pair.start()
        run({path: pair.learn for path, pair in pairs.items()}, "reconstruction of keys and values")
        parts = ("down", "up", "loss")
        return {artefact(path, part): t for path, p in pairs.items() for part, t in zip(parts, p.result(), strict=True)}

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | str:
        found = keys_and_values(program, site)
        if isinstance(found, str):
            return found
        k, v = found
        heads, width = value(site.new[0]).shape[1], value(site.new[0]).shape[3]
        why = replays(k, heads, width, site.capacity)
        if why is not None:
            return why
        refuse(spec, "select", self.name, "one chooses rows by position in a full cache, the other stores no rows")
        refuse(spec, "format", self.name, "its latents are rounded in a way of their own (bits=4)")
        sides = {"k": (k, self.keep_k), "v": (v, self.keep_v)}
        given: dict[str, fx.Node] = {}
        ranks = []
        for letter, (side, share) in sides.items():
            rank = self.rank(share, value(side.weight).shape[0])
            ranks.append(rank)
            down, up = program.tensors.derive(
                [side.weight], self._recipe(program, side, rank), [f"cskv_down_{letter}", f"cskv_up_{letter}"]
            )
            with program.graph.inserting_before(side.linear):
                given[f"latent_{letter}"] = call(program.graph, side.linear, aten.linear.default, side.x, down)
            given[f"factor_{letter}"] = up
            if side.bias is not None:
                given[f"bias_{letter}"] = side.bias
        tables = [
            (f"rotation{i}", value(t).shape[3], str(value(t).dtype).split(".")[1]) for i, t in enumerate(k.tables)
        ]
        given |= {name: node for (name, *_), node in zip(tables, k.tables, strict=True)}
        give(site.append, given, {"rotate": k.function()})
        store = LowRank(ranks[0], ranks[1], self.window, self.bits, tuple(tables))
        channels = value(k.weight).shape[0] + value(v.weight).shape[0]
        rounded = "" if self.bits == 16 else f" in {self.bits} bits"
        return spec.edited(
            by=self.name, store=store
        ), f"{sum(ranks)} of {channels} channels{rounded}, {self.window} tokens exact"

    def _recipe(self, program: Program, side: Projected, rank: int) -> Recipe:
        path = program.tensors.path(side.weight)
        down, up = (program.artefacts.get(artefact(path, part)) for part in ("down", "up"))
        if down is not None and up is not None:
            if down.shape[0] != rank:
                raise OptionError(
                    f"cskv: {path} was calibrated for rank {down.shape[0]}, and these options mean {rank}; calibrate again "
                    "with the options that you use"
                )
            digest = hashlib.sha1(down.float().cpu().numpy().tobytes()).hexdigest()
            fitted = (down, up)

            def calibrated(w: Tensor) -> tuple[Tensor, ...]:
                if isinstance(w, FakeTensor):
                    return tuple(w.new_empty(t.shape) for t in fitted)
                return tuple(t.to(w.device, w.dtype) for t in fitted)

            return Recipe(("cskv", FORMAT, "calibrated", rank, digest), calibrated)
        return Recipe(("cskv", FORMAT, rank), lambda w: factorise(w, rank))


class Factors:
    """One weight's factors while they are fitted."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        self.weight, self.rank = weight, rank
        self._sum, self._rows = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device), 0

    def see(self, x: Tensor) -> None:
        flat = x.flatten(0, -2)
        self._sum += flat.abs().double().sum(0)
        self._rows += flat.shape[0]

    def start(self) -> None:
        scale = (self._sum / max(1, self._rows) + 1e-6).sqrt()
        self._begin = factorise(self.weight.float(), self.rank, scale)
        self._pair = [t.clone().requires_grad_() for t in self._begin]
        self._adam = torch.optim.Adam(self._pair, lr=LEARNING_RATE)

    def learn(self, x: Tensor) -> None:
        flat = x.flatten(0, -2).float()
        with torch.enable_grad():
            loss = self._loss(flat, *self._pair)
            self._adam.zero_grad()
            loss.backward()
        self._adam.step()
        self._last = flat

    def _loss(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(x @ down.t() @ up, x @ self.weight.float().t())

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both factors, and the squared error on the last batch of the start and of these, relative to the squared keys or
        values."""
        down, up = (t.detach().contiguous() for t in self._pair)
        size = (self._last @ self.weight.float().t()).square().mean()
        return down, up, torch.stack([self._loss(self._last, *pair) / size for pair in (self._begin, (down, up))])


def artefact(path: str | None, part: str) -> str:
    """The name of a calibrated factor in a plan."""
    return f"cskv/{path}/{part}"


def factorise(weight: Tensor, rank: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``down`` (rank, in) and ``up`` (rank, out), so that ``x W^T`` is about ``(x down^T) up``.

    Args:
        weight: ``(out, in)``.
        scale: how much each input channel counts, ``(in,)``; None for the plain decomposition.

    Singular values are split evenly. Computed in float64: the decomposition of half precision is unstable.
    """
    if isinstance(weight, FakeTensor):
        return weight.new_empty((rank, weight.shape[1])), weight.new_empty((rank, weight.shape[0]))
    m = weight.double().t()
    s = torch.ones(m.shape[0], dtype=m.dtype, device=m.device) if scale is None else scale.double()
    u, sigma, vt = torch.linalg.svd(s[:, None] * m, full_matrices=False)
    root = sigma[:rank].sqrt()
    down, up = ((u[:, :rank] * root) / s[:, None]).t(), root[:, None] * vt[:rank]
    missing = rank - len(root)  # a weight with fewer inputs than outputs has no more directions
    if missing > 0:
        down, up = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (down, up))
    return down.contiguous().to(weight.dtype), up.contiguous().to(weight.dtype)
