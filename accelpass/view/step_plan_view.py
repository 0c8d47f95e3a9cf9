"""What a plan of steps does, as plain values to draw: which action each layer takes at each step, and what steps cost."""

from __future__ import annotations

import colorsys
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits

from accelpass.ir.errors import AccelpassError

FULL = "full"
_COLOURS = {
    FULL: "#e2e4e9",  # neutral: nothing was done
    "window": "#f3b854",
    "half": "#d98c9b",
    "reuse": "#004582",
}
_TOKENS = ("#bfe3d3", "#176a58")
"""Of ``tokens 100%`` and ``tokens 0%``."""
_OTHERS = ("#b39bd6", "#8fb8de", "#a3a04c", "#7d5ba6", "#4f8f8b")
"""For actions that were not known when this was written, in the order in which they come."""
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
_MARKS = {FULL: "·", "window": "w", "half": "h", "reuse": "r"}


@dataclass(frozen=True)
class StepPlanView:
    """A plan of steps.

    Attributes:
        title: whose plan it is.
        sites: layers, by the names a user would give them.
        steps: how many calls of the model make an image.
        actions: ``actions[step][site]``: "full", "window", "half", "reuse", "tokens 50%", with "+" between two that
            are done together.
        flops: of each step, as a share of the dense step's.
        timesteps: the noise level that each step is called with.

    Raises:
        AccelpassError: there is nothing to show, or the parts do not fit each other.
    """

    title: str
    sites: tuple[str, ...]
    steps: int
    actions: tuple[tuple[str, ...], ...]
    flops: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.sites:
            raise AccelpassError(
                f"the plan {self.title!r} has {self.steps} steps and {len(self.sites)} layers; there is nothing to show. "
                "A plan covers at least one step of one layer"
            )
        for what, held in (("actions", self.actions), ("flops", self.flops), ("timesteps", self.timesteps)):
            if len(held) != self.steps:
                raise AccelpassError(f"the plan {self.title!r} has {self.steps} steps and {what} of {len(held)}")
        for step, taken in enumerate(self.actions):
            if len(taken) != len(self.sites):
                raise AccelpassError(
                    f"step {step} of the plan {self.title!r} has {len(taken)} actions for {len(self.sites)} layers"
                )
            if not all(action.strip() for action in taken):
                site = self.sites[[bool(action.strip()) for action in taken].index(False)]
                raise AccelpassError(f"step {step} of the plan {self.title!r} says nothing of {site}")
        for step, share in enumerate(self.flops):
            if not (math.isfinite(share) and share >= 0):
                raise AccelpassError(
                    f"step {step} of the plan {self.title!r} takes {share} of the dense step's FLOPs; a share is 0 or more"
                )

    @property
    def share(self) -> float:
        """FLOPs of all steps, as a share of the dense ones': every dense step costs the same."""
        return sum(self.flops) / self.steps

    @property
    def said(self) -> str:
        """The figures in one line."""
        layers = "layer" if len(self.sites) == 1 else "layers"
        steps = "step" if self.steps == 1 else "steps"
        return f"{self.steps} {steps} of {len(self.sites)} {layers}; {self.share:.1%} of the dense FLOPs"

    def counts(self) -> dict[str, int]:
        """Cells of each action, in the order of the legend: "full" first, then from light to dark."""
        found = Counter(action for taken in self.actions for action in taken)
        colours = _colours(list(found))
        order = sorted(found, key=lambda action: (action != FULL, -lightness(colours[action]), action))
        return {action: found[action] for action in order}


@dataclass(frozen=True)
class Look:
    """How an action is shown: a colour ``#rrggbb``, the ink that is read on it, and a mark for those who see no colours."""

    colour: str
    ink: str
    mark: str


def looks(view: StepPlanView) -> dict[str, Look]:
    """Action -> how it is shown, in the order of the legend. Cheaper ones are darker."""
    actions = list(view.counts())
    colours, marks = _colours(actions), _marks(actions)
    ink = {action: "#ffffff" if lightness(colours[action]) < 0.2 else "#1a1f2b" for action in actions}
    return {action: Look(colours[action], ink[action], marks[action]) for action in actions}


def labels(sites: Sequence[str]) -> tuple[str, list[str]]:
    """What all names have in common, with ``*`` for the rest, and that rest of each: ``blocks.*.attn``, ``["0", "1"]``."""
    names = [site.split(".") for site in sites]
    if len(names) < 2:
        return "", list(sites)
    least = min(len(name) for name in names)
    front = next((n for n in range(least) if len({name[n] for name in names}) > 1), least - 1)
    room = least - front - 1
    back = next((n for n in range(room) if len({name[-1 - n] for name in names}) > 1), room)
    rest = [".".join(name[front : len(name) - back]) for name in names]
    if not front and not back:
        return "", rest
    return ".".join([*names[0][:front], "*", *names[0][len(names[0]) - back :]]), rest


def lightness(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 (black) to 1, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _colours(actions: Sequence[str]) -> dict[str, str]:
    """A colour for each. Two that are done together lie over each other like filters: darker than either."""
    parts = {action: [part.strip() for part in action.split("+")] for action in actions}
    others: dict[str, str] = {}
    made = {}
    for action, names in parts.items():
        mixed = (1.0, 1.0, 1.0)
        for name in names:
            colour = _rgb(_colour(name, others))
            mixed = (mixed[0] * colour[0], mixed[1] * colour[1], mixed[2] * colour[2])
        made[action] = _hex(mixed)
    return made


def _colour(name: str, others: dict[str, str]) -> str:
    if name in _COLOURS:
        return _COLOURS[name]
    share = _SHARE.search(name)
    if name.startswith("tokens") and share:
        kept = min(1.0, float(share[1]) / 100)
        most, least = (_rgb(colour) for colour in _TOKENS)
        return _hex((_mix(most[0], least[0], kept), _mix(most[1], least[1], kept), _mix(most[2], least[2], kept)))
    if name not in others:
        turn, number = divmod(len(others), len(_OTHERS))
        hue, light, full = colorsys.rgb_to_hls(*_rgb(_OTHERS[number]))
        # A sixth unknown action is a darker first one, and so on.
        others[name] = _hex(colorsys.hls_to_rgb(hue, light * 0.7**turn, full))
    return others[name]


def _marks(actions: Sequence[str]) -> dict[str, str]:
    """A character for each, another one for every action: the tens of a percentage, a capital for two at once, a letter."""
    taken: dict[str, str] = {}
    for action in sorted(actions, key=lambda action: action not in _MARKS):
        letters = [c for c in action.lower() if c in ascii_lowercase]
        share = _SHARE.search(action)
        if action in _MARKS:
            wanted = [_MARKS[action]]
        elif "+" in action:
            wanted = [c.upper() for c in letters]
        else:
            wanted = [share[1][0] if share and len(share[1]) == 2 else "", *letters]
        used = {"", *taken.values(), *(() if action in _MARKS else _MARKS.values())}
        free = (c for c in (*wanted, *ascii_lowercase, *ascii_lowercase.upper(), *digits) if c not in used)
        taken[action] = next(free, "?")
    return {action: taken[action] for action in actions}


def _mix(most: float, least: float, share: float) -> float:
    return share * most + (1 - share) * least


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
