"""CSKV: few channels of the keys and values of older tokens, all of the newest (arXiv 2409.10593)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.derived import Recipe
from accelpass.ir.core.graph import aten, call, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, PassError
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite, kv_sites
from accelpass.ir.torch_private import FakeTensor
from accelpass.passes.core.base import Calibrated, Run, Skip
from accelpass.passes.kv_cache.base import KVPass, cannot_store
from accelpass.passes.kv_cache.storage.key_path import Projected, keys_and_values, replays
from accelpass.passes.kv_cache.storage.low_rank import BLOCK, LowRank

FORMAT = 1


@dataclass(frozen=True)
class CSKV(KVPass, Calibrated):
    """Store ``x A`` for each token, with ``W^T`` about ``A B``, and exact keys and values of the last ``window`` tokens.

    Prompts attend to exact keys and values. Keys are reconstructed before the rotary embedding; a norm between projection
    and rotation is applied anew (inferred). Without calibration ``A B`` is the truncated singular value decomposition of the
    weight. ``accelpass.calibrate`` makes the paper's layer-wise loss, the squared error of keys and values, least: the paper
    trains for that (Adam from a decomposition weighed by the activations' size), here the least is computed
    (:class:`Moments`). With ``bits=4`` latent keys are rounded by channel over 32 tokens, latent values by token; there is no
    quantization-aware training (the paper's has).

    Attributes:
        keep_k, keep_v: share of the channels of all key (value) heads together that is kept; 1 equals the dense model.
            Ranks are multiples of 8. 0.2 is the paper's headline of 80 % less memory (inferred).
        window: newest tokens kept exactly.
        bits: of the latents: 16 (the model's dtype), 8 or 4.
        first_token: how many tokens the first of each calibration sequence counts as in the loss. 1 is the paper's loss.
            Models that send much attention to the first token suffer most from an error there: try 1000 (ours).

    Raises:
        OptionError: a share outside (0, 1], other bits, a window below 1 or, rounded, below 32, a weight below 1.
    """

    name: ClassVar[str] = "cskv"
    summary: ClassVar[str] = "few channels of older tokens' keys and values in a KVCache, all of the newest"
    paper: ClassVar[str] = "CSKV, arXiv 2409.10593"
    identity: ClassVar[dict[str, Any] | None] = {"keep_k": 1.0, "keep_v": 1.0}
    edits: ClassVar[frozenset[str]] = frozenset({"attention.rows", "attention.format"})
    keep_k: float = 0.2
    keep_v: float = 0.2
    window: int = 32
    bits: int = 16
    first_token: float = 1.0

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
        if not 1 <= self.first_token < math.inf:
            raise self.fail("first_token", "a number of tokens, 1 or more")
        self.check_sites()

    def rank(self, share: float, channels: int) -> int:
        """How many numbers stand for ``channels`` of a token."""
        return min(channels, max(8, round(share * channels / 8) * 8))

    def calibrate(self, program: Program, run: Run) -> dict[str, Tensor]:
        """The factors of least squared error over all tokens of the data; see the class.

        Raises:
            PassError: no layer has keys and values to fit, or keys or values on the data are not finite; names it.
        """
        fits: dict[str, tuple[Moments, int]] = {}
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
                fits[path] = Moments(weight.detach(), self.first_token), self.rank(share, weight.shape[0])
        if not fits:
            raise PassError(
                f"cskv found no layer to calibrate: {'; '.join(reasons[:2]) or 'no attention reads a KVCache'}"
            )
        run({path: moments.see for path, (moments, _) in fits.items()}, "keys and values")
        parts = ("down", "up", "loss")
        return {
            artefact(path, part): t
            for path, (moments, rank) in fits.items()
            for part, t in zip(parts, moments.factors(path, rank), strict=True)
        }

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        found = keys_and_values(program, site)
        if isinstance(found, str):
            return Skip(found)
        k, v = found
        heads, width = value(site.new[0]).shape[1], value(site.new[0]).shape[3]
        why = replays(k, heads, width, site.capacity)
        if why is not None:
            return Skip(why)
        sides = {"k": (k, self.keep_k), "v": (v, self.keep_v)}
        given: dict[str, fx.Node] = {}
        ranks = []
        for letter, (side, share) in sides.items():
            rank = self.rank(share, value(side.weight).shape[0])
            ranks.append(rank)
            down, up = self._factors(program, side, rank, [f"cskv_down_{letter}", f"cskv_up_{letter}"])
            with program.graph.inserting_before(side.linear):
                given[f"latent_{letter}"] = call(program.graph, side.linear, aten.linear.default, side.x, down)
            given[f"factor_{letter}"] = up
            if side.bias is not None:
                given[f"bias_{letter}"] = side.bias
        tables = [
            (f"rotation{i}", value(t).shape[3], str(value(t).dtype).split(".")[1]) for i, t in enumerate(k.tables)
        ]
        given |= {name: node for (name, *_), node in zip(tables, k.tables, strict=True)}
        along = {"latent_k": 1, "latent_v": 1} | {name: 2 for name, *_ in tables}
        give(site.append, given, {"rotate": k.function()}, along)
        store = LowRank(ranks[0], ranks[1], self.window, self.bits, tuple(tables))
        channels = value(k.weight).shape[0] + value(v.weight).shape[0]
        rounded = "" if self.bits == 16 else f" in {self.bits} bits"
        return spec.edited(
            by=self.name, store=store
        ), f"{sum(ranks)} of {channels} channels{rounded}, {self.window} tokens exact"

    def _factors(self, program: Program, side: Projected, rank: int, names: list[str]) -> list[fx.Node]:
        """``down`` and ``up`` of a projection: calibrated, or of its weight's decomposition."""
        path = program.tensors.path(side.weight)
        down, up = (program.artefacts.get(artefact(path, part)) for part in ("down", "up"))
        if down is None or up is None:
            recipe = Recipe(("cskv", FORMAT, rank), lambda w: factorise(w, rank))
            return program.tensors.derive([side.weight], recipe, names)
        if down.shape[0] != rank:
            raise OptionError(
                f"cskv: {path} was calibrated for rank {down.shape[0]}, and these options mean {rank}; calibrate again "
                "with the options that you use"
            )
        return program.tensors.artefact(side.weight, (down, up), names)


class Moments:
    """The second moments of one projection's outputs, which are all that its best factors depend on.

    Of all ``A B`` of a rank, ``|X W^T - X A B|^2`` is least where the outputs ``X W^T`` are projected on the leading
    eigenvectors of their moments: reduced-rank regression, by the Eckart-Young theorem.
    """

    def __init__(self, weight: Tensor, first_token: float) -> None:
        self.weight, self.first_token = weight.float(), first_token
        self._sum = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
        self._rows = 0.0

    def see(self, x: Tensor) -> None:
        """Take in the projection's input ``(batch, tokens, in)``."""
        y = x.float() @ self.weight.t()
        for rows, weight in ((y.flatten(0, 1), 1.0), (y[:, 0], self.first_token - 1)):
            self._sum += weight * (rows.t() @ rows).double()
            self._rows += weight * len(rows)

    def factors(self, path: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``down`` (rank, in), ``up`` (rank, out), and the squared errors of the weight's own decomposition and of these,
        relative to the squared outputs.

        Latents have a size of about 1 each, so that rounding a token's together costs each of them alike.
        """
        if not self._sum.isfinite().all():
            raise PassError(f"cskv: {path} gives values that are not finite on the calibration data")
        size, directions = torch.linalg.eigh(self._sum / max(1.0, self._rows))
        size, directions = size.flip(0)[:rank], directions.flip(1)[:, :rank]
        scale = size.clamp_min(1e-8 * float(size[0]) or 1.0).sqrt()  # directions that the data never took have none
        down = directions.t() @ self.weight.double() / scale[:, None]
        up = directions.t() * scale[:, None]
        plain = torch.linalg.svd(self.weight.double(), full_matrices=False).U[:, :rank]
        return (
            down.float().contiguous(),
            up.float().contiguous(),
            torch.stack([self._lost(plain), self._lost(directions)]),
        )

    def _lost(self, directions: Tensor) -> Tensor:
        kept = torch.einsum("ij,ir,jr->", self._sum, directions, directions)
        return (1 - kept / self._sum.trace().clamp_min(1e-30)).clamp_min(0)


def artefact(path: str | None, part: str) -> str:
    """The name of a calibrated factor in a plan."""
    return f"cskv/{path}/{part}"


def factorise(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``down`` (rank, in) and ``up`` (rank, out) of a weight ``(out, in)``, so that ``x W^T`` is about ``(x down^T) up``.

    Singular values are split evenly. Computed in float64: the decomposition of half precision is unstable.
    """
    if isinstance(weight, FakeTensor):
        return weight.new_empty((rank, weight.shape[1])), weight.new_empty((rank, weight.shape[0]))
    u, sigma, vt = torch.linalg.svd(weight.double().t(), full_matrices=False)
    root = sigma[:rank].sqrt()
    down, up = (u[:, :rank] * root).t(), root[:, None] * vt[:rank]
    missing = rank - len(root)  # a weight with fewer inputs than outputs has no more directions
    if missing > 0:
        down, up = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (down, up))
    return down.contiguous().to(weight.dtype), up.contiguous().to(weight.dtype)
