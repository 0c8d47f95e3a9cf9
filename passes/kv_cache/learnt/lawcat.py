"""LAWCAT: linear attention behind a causal convolution, taught by the softmax that it replaces (arXiv 2509.18467)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from accelpass.ir.attention.recognition.masks import constant
from accelpass.ir.attention.spec.block_select import MASKS, not_a_prompt
from accelpass.ir.attention.spec.spec import AttentionSpec
from accelpass.ir.core.graph import known, value
from accelpass.ir.core.program import Program
from accelpass.ir.errors import OptionError, PassError, PlanError
from accelpass.ir.kv.layer import give
from accelpass.ir.kv.sites import KVSite
from accelpass.passes.core.base import CalibratedOnLoss, Done, Skip, Study
from accelpass.passes.core.site_pass import Edits
from accelpass.passes.kv_cache.base import KVPass
from accelpass.passes.kv_cache.learnt.low_rank_tuning import LowRank, change_projections
from accelpass.passes.kv_cache.storage.recurrence import WEIGHTS, Recurrence, attended

_OPEN = 4.0
"""A gate begins at sigmoid(4) = 0.98 a token (inferred)."""
_TRIED = 11
"""Tokens for which a mask is looked at whose size is not known."""


@dataclass(frozen=True)
class LAWCAT(KVPass, CalibratedOnLoss):
    """Attention as a recurrence over tokens, in prompts and after them: the cache has one size, whatever the text's length.

    Queries and keys go, after the rotary embedding, through a causal convolution of each channel over ``taps`` tokens and a learned feature
    map, none of whose features is below 0 (softmax of a linear map and of its negative, LoLCATs'). A gate of each key/value head, the sigmoid
    of a linear map of the key (inferred; the authors' may read the layer's input), says how much of the sum lasts. Heads that share a key
    share the sum.

    ``accelpass.calibrate(model, batches, passes=["lawcat"])`` is the authors' first stage: for each layer, what softmax attention makes of
    the data is the target of the mean squared error, all layers at once, on texts without padding (theirs have 1,024 tokens). Their
    second stage, of the whole model, follows: low-rank changes of the projections of queries, keys, values and output learn from the loss
    of the next token (``tuning``); changed weights are held beside the model's. ``lawcat/perplexity`` of the plan says how much worse
    answers get, of the model and of what it became, and ``lawcat/first_stage`` what they were between, on batches that are held back.

    Attributes:
        features: of a linear map; the sum has twice as many rows. 32 is the authors'.
        taps: tokens of the convolution: the current one, and 3 before it.
        rate: Adam's learning rate; the authors' 1e-2.
        epochs: how often the data are gone through; 2 is LoLCATs' (inferred).
        tuning: how often the data are gone through in the second stage; 2 is LoLCATs' (inferred), 0 leaves it out.
        rank: of the low-rank changes; 8 is LoLCATs' (inferred).
        tuning_rate: their learning rate; 1e-4 is LoLCATs' (inferred).
        seed: of the maps' beginnings.

    Raises:
        OptionError: an option out of range; there is no plan, or one that was made with other options.
    """

    name: ClassVar[str] = "lawcat"
    summary: ClassVar[str] = "linear attention with a convolution, distilled from softmax: a KVCache of constant size"
    paper: ClassVar[str] = "LAWCAT, arXiv 2509.18467"
    edits: ClassVar[frozenset[str]] = frozenset(
        {"attention.rows", "attention.format", "attention.blocks", "attention.kernel"}
    )
    features: int = 32
    taps: int = 4
    rate: float = 1e-2
    epochs: int = 2
    tuning: int = 2
    rank: int = 8
    tuning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("features", "taps", "epochs", "rank"):
            if getattr(self, name) < 1:
                raise self.fail(name, "1 or more")
        if self.tuning < 0:
            raise self.fail("tuning", "0 or more")
        for name in ("rate", "tuning_rate"):
            if not getattr(self, name) > 0:
                raise self.fail(name, "a number above 0")
        self.check_sites()

    def edited(
        self, program: Program, site: KVSite, spec: AttentionSpec, number: int
    ) -> tuple[AttentionSpec, str] | Skip:
        why = not_causal(site, spec)
        if why is not None:
            return Skip(why)
        q, (k, v) = value(site.attention.args[0]), map(value, site.new)  # type: ignore[union-attr]
        found = {name: program.artefacts.get(artefact(site.path, name)) for name in WEIGHTS}
        if any(t is None for t in found.values()):
            if any(name.startswith("lawcat/") for name in program.artefacts):
                return Skip("no calibration saw it: the plan has no weights for it")
            raise OptionError(
                "lawcat needs weights that imitate the model's attention, and there is no plan. Calibrate once with plan = "
                "accelpass.calibrate(model, texts, passes=['lawcat']), and compile with options={'plan': plan}"
            )
        sizes = self._sizes(q.shape[1], k.shape[1], k.shape[3])
        for name, t in found.items():
            if tuple(t.shape) != sizes[name]:  # type: ignore[union-attr]
                raise PlanError(
                    f"lawcat: {name} of {site.path} is {tuple(t.shape)} in the plan, and these options and this model "  # type: ignore[union-attr]
                    f"need {sizes[name]}; calibrate again with what you use"
                )
        anchor = _weight(program, site.path)
        names = [f"lawcat_{name}" for name in WEIGHTS]
        nodes = program.tensors.artefact(anchor, [found[name] for name in WEIGHTS], names)  # type: ignore[misc]
        give(site.append, dict(zip(WEIGHTS, nodes, strict=True)), {})
        whole = 2 * self.features * (v.shape[3] + 1) * k.shape[1]
        what = f"a sum of {whole} numbers for all tokens, and {self.taps - 1} queries and keys"
        return spec.edited(by=self.name, store=Recurrence(self.features, self.taps)), what

    def rewrite(self, site: KVSite, edit: Edits) -> Done | Skip:
        done = super().rewrite(site, edit)
        if isinstance(done, Skip) or site.attention is None:
            return done
        count = change_projections(edit.program, site.attention, self.name)
        return replace(done, what=f"{done.what}; {count} projections tuned") if count else done

    def _sizes(self, heads: int, kv_heads: int, width: int) -> dict[str, tuple[int, ...]]:
        of = ((kernel, n, last) for kernel, last in (("conv", self.taps), ("map", self.features)) for n in "qk")
        made: dict[str, tuple[int, ...]] = {
            f"{kind}_{side}": (heads if side == "q" else kv_heads, width, last) for kind, side, last in of
        }
        return made | {"gate": (kv_heads, width), "bias": (kv_heads,)}

    def calibrate_on_loss(self, study: Study) -> dict[str, Tensor]:
        """Weights of each layer; ``lawcat/error``, its squared error relative to the target's squares in the last epoch, by layer; and
        ``lawcat/perplexity``, of the model and of the model with them.

        Raises:
            PassError: an attention is not a plain causal one of a prompt over itself, or an error is not finite; names it.
        """
        pupils: dict[str, Pupil] = {}

        def teach(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            if isinstance(self.wanted(spec.site), Skip):
                return None
            why = not_a_prompt(spec, q, k)
            if why is not None:
                raise PassError(f"lawcat: {spec.site}: {why}; exclude it, or calibrate on texts without padding")
            target = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True)
            if spec.site not in pupils:
                pupils[spec.site] = Pupil(self._begun(q, k, len(pupils)), self.rate)
            pupils[spec.site].learn(q, k, v, target)
            return target

        for epoch in range(self.epochs):
            for pupil in pupils.values():
                pupil.lost.clear()
            study.observed(teach, f"epoch {epoch + 1} of {self.epochs}")
        if not pupils:
            raise PassError("lawcat found no attention to learn from: include and exclude leave none")
        for site, pupil in pupils.items():
            if not all(t.isfinite().all() for t in (*pupil.weights.values(), torch.stack(pupil.lost))):
                raise PassError(
                    f"lawcat: {site}: the error is not finite; check model and texts, or give a smaller rate"
                )
        before = study.perplexity(lambda spec, q, k, v: None, "the model")

        def imitate(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            pupil = pupils.get(spec.site)
            return None if pupil is None else pupil.attend(q, k, v).to(q.dtype)

        after = first = study.perplexity(imitate, "the model with linear attention")
        weights = {path: w for site in pupils for path, w in study.projections(site).items()}
        tuned = LowRank(weights, self.rank, self.tuning_rate, self.seed) if weights and self.tuning else None
        if tuned is not None:
            for number in range(self.tuning):
                study.trained(imitate, tuned.changes, tuned.step, f"tuning {number + 1} of {self.tuning}")
            if not tuned.finite:
                raise PassError("lawcat: the second stage is not finite; give a smaller tuning_rate, or tuning=0")
            after = study.perplexity(imitate, "the model after the second stage", tuned.changes)
        made = {artefact(site, name): t.detach() for site, p in pupils.items() for name, t in p.weights.items()}
        return made | {
            "lawcat/error": torch.stack([torch.stack(p.lost).mean() for p in pupils.values()]),
            "lawcat/perplexity": torch.tensor([before, after], dtype=torch.float64),
            "lawcat/first_stage": torch.tensor(first, dtype=torch.float64),
            **(tuned.artefacts(self.name) if tuned is not None else {}),
        }

    def _begun(self, q: Tensor, k: Tensor, number: int) -> dict[str, Tensor]:
        """Weights before learning: convolutions that do nothing, random maps, open gates."""
        draw = torch.Generator().manual_seed(self.seed * 100_003 + number)
        width, made = k.shape[3], dict[str, Tensor]()
        for name, size in self._sizes(q.shape[1], k.shape[1], width).items():
            made[name] = torch.zeros(size)
            if name.startswith("conv"):
                made[name][..., 0] = 1
            if name.startswith("map"):
                made[name] = torch.randn(size, generator=draw) * width**-0.5
        made["bias"].fill_(_OPEN)
        return {name: made[name].to(q.device).requires_grad_() for name in WEIGHTS}


class Pupil:
    """One layer's weights while they learn.

    Attributes:
        lost: of each text, the squared error relative to the target's squares.
    """

    def __init__(self, weights: dict[str, Tensor], rate: float) -> None:
        self.weights, self.lost = weights, list[Tensor]()
        self._optimizer = torch.optim.Adam(weights.values(), rate)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of whole texts, from an empty layer."""
        past = self.weights["conv_q"].shape[2] - 1
        rows = 2 * self.weights["map_k"].shape[2]
        held = {
            "sum": v.new_zeros((*k.shape[:2], rows, v.shape[3] + 1), dtype=torch.float32),
            "last_q": q.new_zeros((*q.shape[:2], past, q.shape[3])),
            "last_k": k.new_zeros((*k.shape[:2], past, k.shape[3])),
        }
        return attended(self.weights, q, k, v, held)[0]

    def learn(self, q: Tensor, k: Tensor, v: Tensor, target: Tensor) -> None:
        """One step towards ``target``."""
        with torch.enable_grad():
            error = (self.attend(q.detach(), k.detach(), v.detach()) - target.detach().float()).square()
            grads = torch.autograd.grad(1000 * error.mean(), list(self.weights.values()))
        for weight, grad in zip(self.weights.values(), grads, strict=True):
            weight.grad = grad
        self._optimizer.step()
        self.lost.append((error.sum() / target.float().square().sum().clamp_min(1e-30)).detach())


def artefact(site: str, part: str) -> str:
    """The name of a weight in a plan."""
    return f"lawcat/{site}/{part}"


def not_causal(site: KVSite, spec: AttentionSpec) -> str | None:
    """Why an attention cannot be a recurrence over tokens, or None. Masks may hide padding besides."""
    changes = [s.kind for s in (*spec.before, *spec.after) if s.kind not in MASKS and s.kind != "cast"]
    if changes:
        return f"its scores go through {changes[0]!r}, which a recurrence does not have"
    assert site.attention is not None
    q = value(site.attention.args[0])
    if not site.is_prompt or spec.causal or spec.bias == "causal" or known(q.shape[2] == 1):
        return None
    if spec.bias != "tensor":
        return f"it is not causal (its mask is {spec.bias})"
    # The mask depends on what the caller says of padding: it must be causal where there is none. One that the caller has made, as generate
    # does, is looked at when it is there.
    seen = _without_padding(site, spec)
    return "it is not causal: a token sees later ones" if seen is not None and bool(seen.triu(1).any()) else None


def _without_padding(site: KVSite, spec: AttentionSpec) -> Tensor | None:
    """What each token sees, ``(tokens, tokens)``, where all that a caller passes is 1; None where that cannot be computed.

    Sizes that are not known are all one number.
    """
    assert site.attention is not None
    masks, extras = [s for s in spec.before if s.kind in MASKS], site.attention.args[3]
    if len(masks) != 1 or not isinstance(mask := extras[masks[0].extra], fx.Node):
        return None
    callers = [n for n in mask.graph.find_nodes(op="placeholder") if isinstance(value(n), Tensor)]
    whole = {n: value(n) for n in callers if value(n).dim() == 2 and not value(n).is_floating_point()}
    unknown = [n for t in (value(mask), *whole.values()) for n in t.shape if isinstance(n, torch.SymInt)]
    sizes = {symbol: _TRIED for n in unknown for symbol in n.node.expr.free_symbols}

    def of(shape: torch.Size) -> list[int]:
        return [int(n.node.expr.subs(sizes)) if isinstance(n, torch.SymInt) else n for n in shape]

    given = {n: torch.ones(of(t.shape), dtype=t.dtype) for n, t in whole.items()}
    found = constant(mask, sizes, given)
    if found is None or found.shape[-1] != found.shape[-2]:
        return None
    kind = masks[0].kind
    seen = found if kind == "keep" else found.logical_not() if kind == "fill" else found > -1e4
    return seen.bool().flatten(0, -3).any(0)


def _weight(program: Program, site: str) -> fx.Node:
    """A weight of the model with which what is learnt lives, of the layer if there is one."""
    held = [(path, n) for n in program.graph.nodes if (path := program.tensors.path(n)) is not None]
    floats = [(name, n) for name, n in held if isinstance(value(n), Tensor) and value(n).is_floating_point()]
    if not floats:
        raise PassError(f"lawcat: {site}: the graph has no weight in floats")
    return next((n for name, n in floats if str(name).startswith(f"{site}.")), floats[0][1])
