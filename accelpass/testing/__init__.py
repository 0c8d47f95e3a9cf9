"""The conformance kit for passes: ``accelpass.testing.check_pass(MyPass, oracle=...)`` in a test of your own.

Nothing is imported before it is used; hypothesis is needed by the oracle check alone, and pytest not at all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelpass.testing.conformance import Conformance, check_pass
    from accelpass.testing.eager_cache import TURNS, EagerAttention, attended, attending, mixed, probabilities
    from accelpass.testing.exports import check_export
    from accelpass.testing.findings import Finding, NotConforming
    from accelpass.testing.graphs import check_graph, check_report
    from accelpass.testing.numbers import check_causality, check_identity, check_oracle
    from accelpass.testing.pairs import check_composition
    from accelpass.testing.runtime import check_gradients, check_leakage, check_recompiles
    from accelpass.testing.subjects import SUBJECTS, Shape, Subject
    from accelpass.testing.trial import Trial

_HOMES = {
    "EagerAttention": "eager_cache",
    "TURNS": "eager_cache",
    "attended": "eager_cache",
    "attending": "eager_cache",
    "mixed": "eager_cache",
    "probabilities": "eager_cache",
    "SUBJECTS": "subjects",
    "Conformance": "conformance",
    "Finding": "findings",
    "NotConforming": "findings",
    "Shape": "subjects",
    "Subject": "subjects",
    "Trial": "trial",
    "check_causality": "numbers",
    "check_composition": "pairs",
    "check_export": "exports",
    "check_gradients": "runtime",
    "check_graph": "graphs",
    "check_identity": "numbers",
    "check_leakage": "runtime",
    "check_oracle": "numbers",
    "check_pass": "conformance",
    "check_recompiles": "runtime",
    "check_report": "graphs",
}

__all__ = [
    "SUBJECTS",
    "TURNS",
    "Conformance",
    "EagerAttention",
    "Finding",
    "NotConforming",
    "Shape",
    "Subject",
    "Trial",
    "attended",
    "attending",
    "check_causality",
    "check_composition",
    "check_export",
    "check_gradients",
    "check_graph",
    "check_identity",
    "check_leakage",
    "check_oracle",
    "check_pass",
    "check_recompiles",
    "check_report",
    "mixed",
    "probabilities",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'accelpass.testing' has no attribute {name!r}")
    return getattr(import_module(f"accelpass.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
