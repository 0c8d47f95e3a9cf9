"""What ``accelpass kv-map`` does: mistakes are found before a model is loaded, and the picture is written at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelpass.api.generation import changes_cache, prompt_tokens
from accelpass.caches.kv_map import KVMap, pick_layers, record
from accelpass.cli.terminal import UsageMistake
from accelpass.ir.errors import AccelpassError
from accelpass.passes.core.registry import registered
from accelpass.view import text
from accelpass.view.pictures import kv_map_picture as picture

DEFAULT = Path("kv-map.png")


def check(options: dict[str, Any]) -> None:
    """Refuse passes none of which changes a cache."""
    if not changes_cache(options):
        known = ", ".join(sorted(p.name for p in registered().values() if p.phase == "cache"))
        raise UsageMistake(f"no pass was given that changes the key/value cache; give one with --pass: {known}")


def layers_from(typed: str | None) -> list[int] | None:
    """The layers of ``0,15,29``."""
    if typed is None:
        return None
    try:
        return [int(n) for n in typed.split(",")]
    except ValueError:
        raise UsageMistake(f"--layers {typed}: it takes numbers parted by commas, for example 0,15,29") from None


def target(out: Path | None, as_json: bool) -> Path | None:
    """Where the picture goes; nowhere if only JSON was asked for."""
    if out is None and as_json:
        return None
    try:
        return picture.check_target(out or DEFAULT)
    except AccelpassError as mistake:
        raise UsageMistake(f"--out {mistake}" if out else str(mistake)) from None


def recorded(
    model: Any,
    tokenizer: Any,
    prompt: str,
    options: dict[str, Any],
    tokens: int,
    layers: list[int] | None,
    update: Callable[[str | int], None],
) -> KVMap:
    """Compile the model, let it answer, and look at its cache after each token."""
    import accelpass

    ids = prompt_tokens(tokenizer, prompt).to(next(model.parameters()).device)
    cache = accelpass.KVCache(model, capacity=ids.shape[1] + tokens)
    try:
        chosen = pick_layers(len(cache.layers), layers)
    except AccelpassError as mistake:
        raise UsageMistake(f"--layers: {mistake}") from None
    fast = accelpass.compile(model, **options)

    def on_token(made: int) -> None:
        if made <= 2:
            update(
                "Compiling the graph of one token"
                if made == 1
                else "Answering, with a look at the cache after each token"
            )
        update(made)

    return record(fast, ids, cache, tokens, chosen, on_token)


def written(made: KVMap, target: Path | None, title: str, head: int | None) -> Path | None:
    """Draw, if there is where to."""
    return picture.draw(made, target, title, head) if target is not None else None


def told(made: KVMap) -> None:
    """The figures of the picture in a few lines."""
    sizes, last = made.sizes(), made.steps[-1]
    for name, what in made.passes.items():
        print(f"{name}: {what}")
    least, most = min(k for k, _ in last.counts), max(k for k, _ in last.counts)
    spread = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    few = max(f for _, f in last.counts)
    print(f"kept at the end: {spread} of {last.seen} tokens a head" + (f", up to {few:.4g} in few bits" if few else ""))
    print(
        f"allocated: {text.size(sizes.bytes)}, dense {text.size(sizes.dense_bytes)}"
        + text.ratio(sizes.dense_bytes, sizes.bytes)
    )
    for note in made.notes:
        print(f"note: {note}")
