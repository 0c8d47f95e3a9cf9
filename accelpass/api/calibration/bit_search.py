"""``search_bits``: how many bits each linear and convolution of a model needs, by what rounding it alone does to what the model makes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from accelpass.api.calibration.rounded_parts import KINDS, Parts
from accelpass.ir.errors import OptionError
from accelpass.passes.quantization.bases.allocation import least_cost

Metric = Callable[[Tensor, Tensor], float]
"""How alike what a rounded model made and what the model made are; larger is better."""
_SLACK = 0.02
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sqnr(made: Tensor, wanted: Tensor) -> float:
    """Signal to rounding noise in decibels, ``10 log10(sum wanted^2 / sum (wanted - made)^2)``."""
    noise = (wanted - made).double().square().sum().clamp_min(1e-30)
    return float(10 * (wanted.double().square().sum() / noise).log10())


def ssim(made: Tensor, wanted: Tensor, window: int = 511) -> float:
    """Structural similarity of images ``(batch, channels, height, width)``, mean over windows.

    Wang et al. 2004, Image Quality Assessment, equation 13, with a flat window of ``window`` pixels or the image's size.
    """
    if made.dim() != 4:
        raise OptionError(f"ssim compares images (batch, channels, height, width); it was given {list(made.shape)}")
    a, b = made.double(), wanted.double()
    size = min(window, a.shape[2], a.shape[3])
    spread = (b.amax() - b.amin()).clamp_min(1e-12)
    mean = lambda x: F.avg_pool2d(x, size, 1)  # noqa: E731
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    first, second = (0.01 * spread) ** 2, (0.03 * spread) ** 2
    top = (2 * mean_a * mean_b + first) * (2 * both + second)
    return float((top / ((mean_a**2 + mean_b**2 + first) * (var_a + var_b + second))).mean())


@dataclass(frozen=True)
class Group:
    """Linears and convolutions whose rounding is judged by one metric.

    Attributes:
        sites: shell patterns of module paths; a module belongs to the first group that names it.
        metric: larger is better.
    """

    name: str
    sites: tuple[str, ...]
    metric: Metric


MIXDQ = (Group("content", ("*attn2*", "*.ff.*"), ssim), Group("quality", ("*",), sqnr))
"""Cross-attention and feed-forward layers change what is shown, all others how well (MixDQ, section 3.3)."""


@dataclass(frozen=True)
class BitSearch:
    """Bits by site.

    Attributes:
        bits: by module path.
        scores: by module path, the metric for each of the choices.
        groups: by module path, the group.
        average: bits of an entry.
        error: mean squared error of what the model then makes, with these parts rounded, and those of ``beside``.
        option: what a pass calls the bits.
        beside: what was found before, and is rounded meanwhile.
    """

    choices: tuple[int, ...]
    bits: Mapping[str, int]
    scores: Mapping[str, tuple[float, ...]]
    groups: Mapping[str, str]
    average: float
    error: float
    option: str = "bits"
    beside: BitSearch | None = None

    @property
    def sites(self) -> dict[str, dict[str, int]]:
        """For a pass's option of this name: ``{"name": "mixdq", "sites": found.sites}``."""
        made: dict[str, dict[str, int]] = {} if self.beside is None else self.beside.sites
        for path, bits in self.bits.items():
            made.setdefault(path, {})[self.option] = bits
        return made


def search_bits(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    average: float,
    *,
    choices: Sequence[int] = (4, 8),
    groups: Sequence[Group] = MIXDQ,
    exclude: Sequence[str] = (),
    of: str = "weights",
    beside: BitSearch | None = None,
    progress: bool = True,
) -> BitSearch:
    """Bits for each linear and convolution within an average, with sensitivities that are measured apart and split by metric.

    One weight at a time is rounded to each of the choices, with a symmetric scale for each row (of a convolution: all that one output
    channel is made with), all others as they are; a metric of
    its group compares what the model makes then with what it makes. In each group an integer program finds the bits with the largest
    sum of scores. Two groups share the bits in several ways, and the one that comes nearest to the model is taken. Activations are not
    rounded meanwhile; they are searched for afterwards (``of="activations"``, 4 or 8 bits in one symmetric range for each input),
    with the weights as they were found: the model is chosen as a whole, and sensitivities are measured of one input alone. Zhao et al. 2024, MixDQ, arXiv 2405.17873, section 3.3, and ViDiT-Q, arXiv 2406.02540, section 3.4, whose groups
    and metrics are given as ``groups``.

    Args:
        model: as it is, not compiled; it is called with weights exchanged for a while.
        run: what is judged: runs the model at fixed inputs, or a whole sampling at a fixed seed, and returns the image or output.
        average: bits of a weight, to within 0.02.
        choices: of 2, 3, 4, 6 and 8.
        groups: whose sites are ``nn.Linear`` modules, and ``nn.Conv1d`` to ``nn.Conv3d``.
        exclude: patterns of modules that are left alone, and not counted. Of activations the authors leave out the most sensitive 1 %.
        of: ``weights``, or ``activations``: what linears and convolutions read.
        beside: what a search of the other kind found; its parts are rounded where whole allocations are compared.
        progress: show a bar.

    Raises:
        OptionError: a choice or a group that there is not, or no module of theirs.
        PassError: no bits are within the average; names the least that would be.
    """
    if of not in KINDS:
        raise OptionError(f"of={of!r} is not supported; use {' or '.join(map(repr, KINDS))}")
    offered = tuple(sorted(set(choices)))
    modules, named = _sites(model, groups, exclude)
    parts = KINDS[of](modules)
    parts.check(offered)
    with torch.no_grad(), Progress(disable=not progress) as bar:
        wanted = parts.look(model, run)
        scores: dict[str, tuple[float, ...]] = {}
        for path in bar.track(list(modules), description=f"sensitivity of {of}"):
            found = list[float]()
            for number in offered:
                if not parts.fits(path, number):
                    found.append(float("-inf"))
                    continue
                with parts.rounded({path: number}):
                    found.append(named[path].metric(run(model), wanted))
            scores[path] = tuple(found)
        best: tuple[float, dict[str, int]] | None = None
        before = nullcontext() if beside is None else _as_found(model, beside, run)
        with before:
            for budgets in _budgets(average, groups, named, parts, offered):
                bits = _allocated(budgets, scores, named, parts, offered)
                with parts.rounded(bits):
                    error = float((run(model) - wanted).double().square().mean())
                if best is None or error < best[0]:
                    best = error, bits
    assert best is not None
    error, bits = best
    entries = sum(map(parts.entries, modules))
    reached = sum(bits[p] * parts.entries(p) for p in modules) / entries
    return BitSearch(offered, bits, scores, {p: g.name for p, g in named.items()}, reached, error, parts.option, beside)


@contextmanager
def _as_found(model: nn.Module, search: BitSearch, run: Callable[[nn.Module], Tensor]) -> Iterator[None]:
    """The model with what an earlier search found."""
    with nullcontext() if search.beside is None else _as_found(model, search.beside, run):
        kind = next(k for k in KINDS.values() if k.option == search.option)
        parts = kind({path: model.get_submodule(path) for path in search.bits})
        parts.look(model, run)
        with parts.rounded(search.bits):
            yield


def _sites(
    model: nn.Module, groups: Sequence[Group], exclude: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, Group]]:
    modules, named = dict[str, nn.Module](), dict[str, Group]()
    for path, module in model.named_modules():
        if not isinstance(module, _KINDS) or any(fnmatch.fnmatchcase(path, p) for p in exclude):
            continue
        for group in groups:
            if any(fnmatch.fnmatchcase(path, p) for p in group.sites):
                modules[path], named[path] = module, group
                break
    if not modules:
        raise OptionError(
            "no nn.Linear is named by groups, nor a convolution; Group('all', ('*',), metric) takes all of them"
        )
    return modules, named


def _budgets(
    average: float,
    groups: Sequence[Group],
    named: Mapping[str, Group],
    parts: Parts,
    offered: tuple[int, ...],
) -> list[dict[str, float]]:
    """Average bits of each group, in all ways that are tried; of two groups the whole keeps its average."""
    sizes = {g.name: sum(parts.entries(p) for p, of in named.items() if of.name == g.name) for g in groups}
    held = [name for name, size in sizes.items() if size]
    same = [dict.fromkeys(held, average)]
    if len(held) != 2:
        return same
    first, second = held
    share, tried = sizes[first] / sizes[second], []
    for split in parts.splits:
        others = average * (1 + share) / (split * share + 1)
        if all(offered[0] <= bits <= offered[-1] for bits in (others, split * others)):
            tried.append({first: split * others, second: others})
    return tried or same


def _allocated(
    budgets: Mapping[str, float],
    scores: Mapping[str, tuple[float, ...]],
    named: Mapping[str, Group],
    parts: Parts,
    offered: tuple[int, ...],
) -> dict[str, int]:
    bits: dict[str, int] = {}
    for group, average in budgets.items():
        paths = [p for p in scores if named[p].name == group]
        entries = sum(map(parts.entries, paths))
        costs = {p: -torch.tensor(scores[p], dtype=torch.float64) for p in paths}
        sizes = {p: torch.tensor([float(b * parts.entries(p)) for b in offered], dtype=torch.float64) for p in paths}
        tables = {p: torch.stack([costs[p], sizes[p]]) for p in paths}
        chosen = least_cost("search_bits", tables, (average + _SLACK) * entries, entries)
        bits |= {p: offered[i] for p, i in chosen.items()}
    return bits
