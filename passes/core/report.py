"""What was done to each graph, as data. Rendering is the public face's business."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from accelpass.ir.core.program import Program
from accelpass.passes.core.base import Record

_NUMBERS = itertools.count(1)


@dataclass
class Measured:
    """Counts and costs of one graph.

    Attributes:
        found: sites by kind, counted before the passes alone: ``attention``, ``linear``, ``embedding``, ``norm``, ...
        flops: multiply-adds count as two; one call at the compiled sizes.
        weight_bytes: constants that the graph reads, each counted once.
        failed: sentences about kinds that could not be counted.
        refused: what looks like an attention and stays as the model wrote it: where, and why.
    """

    found: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    weight_bytes: int = 0
    failed: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What is done at each denoising step, of passes that choose by step.

    Attributes:
        sites: in the order in which the model runs them.
        actions: by model call, for each site.
        timesteps: of each model call; their numbers if the schedule is for any.
        flops: of each model call; ``dense`` of one that is computed in full.
        parts, compiled: ways of computing a block over all blocks, and how many of them needed code of their own.
        attention, dense_attention: as ``flops`` and ``dense``, of the products of queries, keys and values alone.
        variants: how many of these calls differ in what they run; what one keeps for a later one is such a difference.
    """

    sites: tuple[str, ...]
    actions: tuple[tuple[str, ...], ...]
    flops: tuple[int, ...]
    timesteps: tuple[float, ...]
    dense: int
    parts: int
    compiled: int
    attention: tuple[int, ...] = ()
    dense_attention: int = 0
    variants: int = 0


@dataclass
class GraphReport:
    """One graph: what was found, what each pass did, and what it cost to compile.

    Attributes:
        seconds: all that the backend took; ``seconds_compiling`` of them Inductor.
        parts, parts_compiled: calls of compiled code that make up the graph, and how many different ones there are;
            0 if it was compiled as one.
        steps: what is done at each denoising step, if some pass chooses by step.
    """

    number: int
    before: Measured = field(default_factory=Measured)
    after: Measured = field(default_factory=Measured)
    records: list[Record] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0
    seconds_compiling: float = 0.0
    derived_bytes: int = 0
    parts: int = 0
    parts_compiled: int = 0
    steps: StepReport | None = None

    @property
    def seconds_in_passes(self) -> float:
        """Of :attr:`seconds`, those before and after the compiler's work."""
        return max(self.seconds - self.seconds_compiling, 0.0)

    def add_note(self, *said: str) -> None:
        """Append to :attr:`note`; empty ones count for nothing."""
        self.note = "; ".join(filter(None, (self.note, *said)))

    def anew(self, note: str) -> GraphReport:
        """The report of the same graph, when it is compiled once more in another way."""
        return GraphReport(self.number, note=note)

    @classmethod
    def start(cls) -> GraphReport:
        return cls(next(_NUMBERS))


def costs(program: Program) -> Measured:
    """What one call of the graph costs as it is now."""
    from accelpass.ir.analyses.structure.cost import at_compiled_sizes, total, weight_bytes

    try:
        return Measured(flops=at_compiled_sizes(program, total(program).flops), weight_bytes=weight_bytes(program))
    except Exception as cause:  # as below: a report of fewer figures, not a model that does not compile
        return Measured(failed=(f"costs not counted: {type(cause).__name__}: {cause}",))


def measure(program: Program) -> Measured:
    """The same, and how many sites of each kind the graph has."""
    from accelpass.ir.analyses.structure.block import blocks
    from accelpass.ir.analyses.structure.kv_cache import kv_caches
    from accelpass.ir.analyses.structure.linear import embeddings, expert_stacks, linears
    from accelpass.ir.analyses.structure.mlp import mlps
    from accelpass.ir.analyses.structure.moe import moes
    from accelpass.ir.analyses.structure.norm import norms
    from accelpass.ir.analyses.structure.output_head import output_heads
    from accelpass.ir.attention import detect

    measured = costs(program)
    counted = {
        "attention": detect,
        "linear": linears,
        "embedding": embeddings,
        "expert_stack": expert_stacks,
        "norm": norms,
        "mlp": mlps,
        "moe": moes,
        "kv_cache": kv_caches,
        "block": blocks,
        "output_head": output_heads,
    }
    for kind, analysis in counted.items():
        try:
            records = program.analysis(analysis)
            if kind == "attention":
                _refused(program, measured)
        except Exception as cause:  # an unforeseen graph must not stop a model that compiles without these counts
            measured.failed += (f"{kind} not counted: {type(cause).__name__}: {cause}",)
            continue
        if kind == "mlp":
            gated = sum(mlp.kind == "gated_mlp" for mlp in records)
            measured.found.update(mlp=len(records) - gated, gated_mlp=gated)
        else:
            measured.found[kind] = len(records)
    return measured


def _refused(program: Program, measured: Measured) -> None:
    """Attentions that were recognised and are left as the model wrote them."""
    from accelpass.ir.attention import near_misses

    for miss in (m for m in program.analysis(near_misses) if m.like):
        into, place = measured.refused, miss.path or miss.node
        into[place] = "; ".join(dict.fromkeys(filter(None, (into.get(place), miss.why))))
