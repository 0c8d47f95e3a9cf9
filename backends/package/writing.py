"""The way of a model into a package: capture, passes, compilation, checks, and a file that appears whole or not at all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from accelpass.backends.export.capture import bound, captured
from accelpass.backends.export.decoder import cache_of, decoding, refuse_kept
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.files import staged, writable
from accelpass.backends.export.passes import after_prompt
from accelpass.backends.export.refusals import refuse_left_out
from accelpass.backends.package.checking import checked
from accelpass.backends.package.compiling import Compiled, compiled, rewritten
from accelpass.backends.package.file import manifest as about
from accelpass.backends.package.file.manifest import Decoder, Manifest, Member, State
from accelpass.backends.package.file.processor import instructions, machine
from accelpass.backends.package.file.weights import Weights
from accelpass.backends.package.report import PackageReport, described
from accelpass.ir.torch_private import archive_writer
from accelpass.passes.core.options import Options, parse
from accelpass.passes.core.plan import describe
from accelpass.version import __version__

Update = Callable[[str], None]


def wanted(
    passes: Sequence[Any] | None, plan: Any, skip_sites: Mapping[str, Sequence[str]] | None, debug: bool
) -> Options:
    """Check what can be checked without the model.

    Raises:
        OptionError: a pass or option that does not exist.
        ExportError: a pass that chooses on the host, between denoising steps.
    """
    chosen = parse(
        {
            "passes": passes if passes is None else list(passes),
            "plan": plan,
            "skip_sites": dict(skip_sites or {}),
            "debug": debug,
        }
    )
    for p in chosen.passes:
        if p.by_step:
            raise ExportError(
                f"{p.name} chooses on the host, at each denoising step, which graph runs, and a package has one graph. Leave it out, "
                "or write a file for each graph: accelpass.export_onnx"
            )
    return chosen


def package(
    model: torch.nn.Module,
    example: Any,
    path: Any,
    chosen: Options,
    cache: Any = None,
    dynamic_shapes: Any = None,
    decode: Mapping[str, Any] | None = None,
    inductor: Mapping[str, Any] | None = None,
    verify: bool = True,
    update: Update = lambda news: None,
) -> PackageReport:
    """See :func:`accelpass.package`."""
    target = writable(path, ".pt2")
    given = _bound(model, example, cache)
    place = cache_of(given)
    if place is None:
        refuse_kept(model)
    refuse_left_out(chosen.passes, place)
    asked = [p.name for p in chosen.passes if p.name in chosen.asked]
    who = "the pass " + " and ".join(map(repr, asked)) if asked else "the model"
    if any(t.device.type != "cpu" for t in [*model.parameters(), *model.buffers()]):
        raise ExportError("packages are compiled for the CPU; type: model.cpu()")
    calls: dict[str, tuple[Mapping[str, Any], Any]] = {"model": (given, dynamic_shapes)}
    if place is not None:
        shapes = dynamic_shapes or {_ids(given): {1: "tokens"}}
        calls = {"prompt": (given, shapes), "decode": (decoding(given, place[0], decode), None)}
    graphs: dict[str, Compiled] = {}
    with tempfile.TemporaryDirectory(prefix="accelpass-") as folder:
        for name, (call, shapes) in calls.items():
            update(f"Capturing and rewriting the graph {name!r}")
            found = captured(model, call, shapes, None if place is None else place[1], name == "prompt")
            now, aside = (
                after_prompt(chosen, prompt.rewritten.records) if (prompt := graphs.get("prompt")) else (chosen, [])
            )
            one = rewritten(found, now, who)
            one.records.extend(aside)
            if place is None and one.made.states:
                raise ExportError(
                    f"{who} remembers something between calls ({one.made.states[0].name}), which a package does for a decoder's "
                    "cache alone; give cache=..., or leave the pass out"
                )
            update(f"Compiling the graph {name!r}")
            graphs[name] = compiled(one, Path(folder) / name, dict(inductor or {}))
    _refuse_other_state(graphs)
    report = PackageReport(target.absolute())
    if verify:
        update("Comparing the compiled graphs with torch")
        report.difference, report.notes = checked(graphs)
    decoder = None if place is None else _decoder(model, given, place[1], graphs, chosen)
    with staged(target) as folder_:
        update("Writing")
        report.weights_after = _written(folder_ / target.name, graphs, chosen, decoder)
        report.bytes = (folder_ / target.name).stat().st_size
    report.weights_before = next(iter(graphs.values())).rewritten.weights_before
    for name, graph in graphs.items():
        report.records[name], report.seconds[name] = graph.rewritten.records, graph.seconds
        report.notes += [note for note in graph.rewritten.notes if note not in report.notes]
    return report


def _bound(model: torch.nn.Module, example: Any, cache: Any) -> dict[str, Any]:
    """The example call's arguments by name, with the cache among them."""
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (example, {})
    if isinstance(args, Tensor):
        args = (args,)
    if cache is not None:
        if isinstance(cache, int):
            from accelpass.caches.kv_cache import KVCache

            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if first is None:
                raise ExportError("example holds no tensor; give a prompt: torch.tensor([[1, 2, 3]])")
            cache = KVCache(model, capacity=cache, batch_size=first.shape[0])
        kwargs.setdefault("past_key_values", cache)
    return bound(model, args, kwargs)


def _ids(given: Mapping[str, Any]) -> str:
    name = next((n for n in ("input_ids", *given) if isinstance(given.get(n), Tensor)), None)
    if name is None or given[name].dtype != torch.int64 or given[name].dim() != 2:
        raise ExportError("a decoder is packaged with a prompt, int64 (batch, tokens), as its first argument")
    if any(isinstance(held, Tensor) for n, held in given.items() if n != name):
        others = ", ".join(n for n, held in given.items() if isinstance(held, Tensor) and n != name)
        raise ExportError(f"a packaged decoder takes tokens alone, and the example gives {others}, too; leave that out")
    if given[name].shape[1] < 2:
        raise ExportError("the example's prompt has one token; give two or more, so that its length can be dynamic")
    return name


def _decoder(
    model: torch.nn.Module, given: Mapping[str, Any], cache: Any, graphs: Mapping[str, Compiled], chosen: Options
) -> Decoder:
    settings = getattr(model, "generation_config", None) or getattr(model, "config", None)
    eos, pad = getattr(settings, "eos_token_id", None), getattr(settings, "pad_token_id", None)
    outputs = graphs["decode"].graph.outputs
    logits = next((n for n in ("logits", "output") if n in outputs), None)
    if logits is None:
        raise ExportError(f"the model returns {', '.join(outputs)}, and no logits to choose tokens from")
    ends = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    took = {r.name for g in graphs.values() for r in g.rewritten.records if r.took}
    keeps_all = not any(p.phase == "cache" and p.name in took for p in chosen.passes)
    table = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    batch = cache.layers[0].batch_size
    return Decoder(cache.capacity, batch, _ids(given), logits, ends, pad, table, keeps_all)


def _refuse_other_state(graphs: Mapping[str, Compiled]) -> None:
    """Raise :class:`ExportError` if the prompt's graph and the decoding step's keep different state, a fault of the passes."""
    kept = [[(s.name, tuple(s.start.shape), s.start.dtype) for s in g.rewritten.made.states] for g in graphs.values()]
    if any(some != kept[0] for some in kept):
        odd = sorted({name for name, *_ in set(kept[0]) ^ set(kept[-1])}) or ["their order"]
        raise ExportError(f"the prompt's graph and the decoding step's keep different state: {', '.join(odd[:3])}")


def _written(file: Path, graphs: Mapping[str, Compiled], chosen: Options, decoder: Decoder | None) -> int:
    """Write the package; returns the bytes of its weights.

    Raises:
        ExportError: there is no room.
    """
    weights = Weights()
    described_graphs = {
        name: msgspec.structs.replace(g.graph, constants=weights.add(g.constants)) for name, g in graphs.items()
    }
    first = next(iter(graphs.values()))
    states = [
        State(s.name, str(s.start.dtype).removeprefix("torch."), list(s.start.shape), s.fill)
        for s in first.rewritten.made.states
    ]
    members = {about.WEIGHTS: weights.content()}
    for name, graph in graphs.items():
        members |= {f"{about.LIBRARIES}{name}/{file}": content for file, content in graph.files.items()}
    made = Manifest(
        format=about.FORMAT,
        accelpass=__version__,
        torch=str(torch.__version__),
        machine=machine(),
        instructions=instructions(),
        passes=[describe(p) for p in chosen.passes if p.name in chosen.asked],
        graphs=described_graphs,
        states=states,
        weights=weights.found,
        members={n: Member(len(content), hashlib.sha256(content).hexdigest()) for n, content in members.items()},
        decoder=decoder,
        report=described({name: g.rewritten.records for name, g in graphs.items()}),
    )
    if decoder is not None:
        content = about.layout(made).encode()
        members[about.LAYOUT] = content
        made.members[about.LAYOUT] = Member(len(content), hashlib.sha256(content).hexdigest())
    text = msgspec.json.format(msgspec.json.encode(made), indent=1)
    members |= {about.MANIFEST: text, about.DIGEST: hashlib.sha256(text).hexdigest().encode()}
    try:
        with archive_writer(str(file)) as writer:
            for name, content in members.items():
                writer.write_bytes(name, content)
    except RuntimeError as cause:  # torch's writer, when the disk is full
        raise ExportError(
            f"{file.name} cannot be written: {cause}; free some space or choose another folder"
        ) from cause
    return len(members[about.WEIGHTS])
