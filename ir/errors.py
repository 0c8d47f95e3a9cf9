"""Errors a user may see. Each message says what was seen, what was needed and what to do next."""


class AccelpassError(Exception):
    """Base of every error that accelpass raises on purpose."""


class OptionError(AccelpassError, ValueError):
    """An option, pass name or pass field that does not exist or is out of range."""


class GraphError(AccelpassError):
    """A graph that breaks a rule of the IR; names the pass after which it was found."""


class SpecConflict(AccelpassError):
    """Two passes want incompatible things of one attention."""


class PassError(AccelpassError):
    """A pass failed; names the pass and, where known, the site."""


class DefaultPassFailed(PassError):
    """A pass that nobody asked for failed; the graph is compiled without it.

    Attributes:
        pass_name: the pass.
    """

    def __init__(self, message: str, pass_name: str) -> None:
        super().__init__(message)
        self.pass_name = pass_name


class PlanError(AccelpassError, ValueError):
    """A plan or a packed model that is damaged or belongs to another model."""


class ReleasedWeightError(AccelpassError, RuntimeError):
    """A weight whose memory was released by ``free_weights`` is needed again; uncompiled, torch would raise a RuntimeError."""


class CompilerMissingError(AccelpassError):
    """Inductor found no C++ compiler that works."""


class CacheError(AccelpassError, ValueError):
    """A key/value cache is used for what it cannot hold: too many tokens, another model, another form."""
