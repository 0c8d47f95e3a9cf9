"""The way of a model into a package: capture, passes, compilation, checks, and a file that appears whole or not at all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from accelpass.backends.export.capture import Captured, bound, captured
from accelpass.backends.export.decoder import cache_of, decoding, refuse_kept
from accelpass.backends.export.errors import ExportError
from accelpass.backends.export.files import staged, writable
from accelpass.backends.export.passes import after_prompt
from accelpass.backends.export.refusals import refuse_left_out
from accelpass.backends.export.stepped import Schedule, step_graphs, step_pass, with_plan, with_state
from accelpass.backends.package.checking import checked
from accelpass.backends.package.compiling import Compiled, Rewritten, compiled, rewritten
from accelpass.backends.package.file import manifest as about
from accelpass.backends.package.file.manifest import Decoder, Manifest, Member, State
from accelpass.backends.package.file.processor import instructions, machine
from accelpass.backends.package.file.weights import Weights
from accelpass.backends.package.report import PackageReport, described
from accelpass.ir.torch_private import archive_writer
from accelpass.ir.transform.steps import LATENTS, TIMESTEP
from accelpass.passes.core.options import Options, parse
from accelpass.passes.core.plan import describe
from accelpass.passes.step_cache.base import StepPass
from accelpass.version import __version__

Update = Callable[[str], None]


def wanted(
    passes: Sequence[Any] | None, plan: Any, skip_sites: Mapping[str, Sequence[str]] | None, debug: bool
) -> Options:
    """Check what can be checked without the model.

    Raises:
        OptionError: a pass or option that does not exist.
        ExportError: two passes that choose by denoising step, or one that still searches.
    """
    chosen = parse(
        {
            "passes": passes if passes is None else list(passes),
            "plan": plan,
            "skip_sites": dict(skip_sites or {}),
            "debug": debug,
        }
    )
    step_pass(chosen.passes)
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
    steps: int | None = None,
    tokenizer: Any = None,
) -> PackageReport:
    """See :func:`accelpass.package`."""
    target = writable(path, ".pt2")
    words = None if tokenizer is None else _as_json(tokenizer)
    given = _bound(model, example, cache)
    place = cache_of(given)
    if place is None:
        refuse_kept(model)
        if words is not None:
            raise ExportError(
                "a tokenizer is packaged with a decoder, and there is no cache; give cache=, or leave it out"
            )
    refuse_left_out(chosen.passes, place)
    asked = [p.name for p in chosen.passes if p.name in chosen.asked]
    who = "the pass " + " and ".join(map(repr, asked)) if asked else "the model"
    if any(t.device.type != "cpu" for t in [*model.parameters(), *model.buffers()]):
        raise ExportError("packages are compiled for the CPU; type: model.cpu()")
    graphs: dict[str, Compiled] = {}
    schedule: Schedule[Rewritten] | None = None
    by = step_pass(chosen.passes)
    if by is not None and place is not None:
        raise ExportError(f"{by.name} works across denoising steps, and a key/value cache is no part of those")
    if steps is not None and by is None:
        raise ExportError("steps= is for passes that work across denoising steps, and there is none; leave it out")
    with tempfile.TemporaryDirectory(prefix="accelpass-") as folder:

        def compile_as(name: str, one: Rewritten) -> None:
            update(f"Compiling the graph {name!r}")
            graphs[name] = compiled(one, Path(folder) / name, dict(inductor or {}))

        if by is not None:
            update("Capturing the model")
            schedule = _schedule(captured(model, given, dynamic_shapes), by, chosen, who, steps, update)
            for name, one in schedule.graphs.items():
                compile_as(name, one)
        for name, (call, shapes) in _calls(given, place, dynamic_shapes, decode).items() if by is None else ():
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
            compile_as(name, one)
    _refuse_other_state(graphs)
    report = PackageReport(target.absolute())
    if verify:
        update("Comparing the compiled graphs with torch")
        report.difference, report.notes = checked(graphs, schedule)
    decoder = None if place is None else _decoder(model, given, place[1], graphs, chosen)
    with staged(target) as folder_:
        update("Writing")
        report.weights_after = _written(folder_ / target.name, graphs, chosen, decoder, schedule, words)
        report.bytes = (folder_ / target.name).stat().st_size
    report.weights_before = next(iter(graphs.values())).rewritten.weights_before
    for name, graph in graphs.items():
        report.records[name], report.seconds[name] = graph.rewritten.records, graph.seconds
        report.notes += [note for note in graph.rewritten.notes if note not in report.notes]
    return report


def _calls(
    given: Mapping[str, Any], place: tuple[str, Any] | None, dynamic_shapes: Any, decode: Mapping[str, Any] | None
) -> dict[str, tuple[Mapping[str, Any], Any]]:
    """By name of a graph, the call that it is traced from, and its dynamic dimensions."""
    if place is None:
        return {"model": (given, dynamic_shapes)}
    shapes = dynamic_shapes or {_ids(given): {1: "tokens"}}
    return {"prompt": (given, shapes), "decode": (decoding(given, place[0], decode), None)}


def _schedule(
    dense: Captured, by: StepPass, chosen: Options, who: str, steps: int | None, update: Update
) -> Schedule[Rewritten]:
    """The model rewritten once for each different step."""
    _clock(dense.inputs)
    passes, bound_ = with_plan(chosen, chosen.passes, by)
    now = replace(chosen, passes=passes)

    def finish(found: Captured) -> Rewritten:
        return rewritten(found, now, who, lambda: with_state(found, bound_))

    return step_graphs(bound_, lambda number: f"step{number}", dense, steps, finish, update)


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


def _as_json(tokenizer: Any) -> bytes:
    """A tokenizer as the ``tokenizers`` package writes it."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of transformers' fast tokenizers
    if isinstance(tokenizer, str | Path):
        try:
            content = Path(tokenizer).expanduser().read_bytes()
            held = msgspec.json.decode(content)
        except (OSError, msgspec.DecodeError) as cause:
            raise ExportError(f"{tokenizer} cannot be read as a tokenizer.json: {cause}") from None
        if not isinstance(held, dict) or "model" not in held:
            raise ExportError(f"{tokenizer} is no tokenizer.json: it says nothing of a model")
        return content
    if not callable(getattr(inner, "to_str", None)):
        raise ExportError(
            f"a {type(tokenizer).__name__} cannot be packaged; give a fast tokenizer of transformers, a tokenizers.Tokenizer, or the "
            "path of a tokenizer.json"
        )
    return str(inner.to_str()).encode()


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


def _clock(inputs: Mapping[str, Tensor]) -> tuple[str, str]:
    """Names of the inputs that tell a run and its step: the latents and the timestep."""
    latents, time = (next((n for n in names if n in inputs), None) for names in (LATENTS, TIMESTEP))
    if latents is None or time is None:
        missing = "latents" if latents is None else "timestep"
        raise ExportError(
            f"the model takes no {missing} ({', '.join(inputs)}), by which a package would tell the step of a run"
        )
    return latents, time


def _described(schedule: Schedule[Rewritten], weights: Weights) -> about.Schedule:
    """The schedule, as the manifest has it; the plan's tensors are weights."""
    latents, time = _clock(schedule.graphs[schedule.calls[0][0]].made.inputs)
    sources = {
        g: {n: about.Source(s.kind, s.name, s.first) for n, s in of.items()} for g, of in schedule.sources.items()
    }
    by = schedule.by
    operands = weights.add(schedule.operands())
    return about.Schedule(latents, time, list(by.timesteps), schedule.calls, by.calls, by.exact_age, sources, operands)


def _written(
    file: Path,
    graphs: Mapping[str, Compiled],
    chosen: Options,
    decoder: Decoder | None,
    schedule: Schedule[Rewritten] | None = None,
    tokenizer: bytes | None = None,
) -> int:
    """Write the package; returns the bytes of its weights.

    Raises:
        ExportError: there is no room.
    """
    weights = Weights()
    described_graphs = {
        name: msgspec.structs.replace(g.graph, constants=weights.add(g.constants)) for name, g in graphs.items()
    }
    run = None if schedule is None else _described(schedule, weights)
    first = next(iter(graphs.values()))
    states = [
        State(s.name, str(s.start.dtype).removeprefix("torch."), list(s.start.shape), s.fill)
        for s in first.rewritten.made.states
    ]
    members = {about.WEIGHTS: weights.content()}
    if tokenizer is not None:
        members[about.TOKENIZER] = tokenizer
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
        schedule=run,
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
