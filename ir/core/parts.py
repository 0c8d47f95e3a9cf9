"""Parts of a semantic op's spec: registered by name, written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

_PARTS: dict[str, type[Part]] = {}


@dataclass(frozen=True)
class Part:
    """An editable part of a spec. A pass adds its own by subclassing with a ``part`` name; fields are JSON values, or parts."""

    part: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.part:
            _PARTS[cls.part] = cls

    def to_json(self) -> dict[str, Any]:
        return {"part": self.part, **{f.name: _json(getattr(self, f.name)) for f in fields(self)}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Any:
        given = dict(data)
        cls = _PARTS[given.pop("part")]
        return cls(**{k: Part.from_json(v) if isinstance(v, dict) else tuples(v) for k, v in given.items()})


def _json(value: Any) -> Any:
    return value.to_json() if isinstance(value, Part) else value


def tuples(found: Any) -> Any:
    """JSON has no tuples; a frozen spec holds nothing else."""
    return tuple(tuples(v) for v in found) if isinstance(found, list) else found
