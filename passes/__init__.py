"""Passes: their base, registry, manager, options and plans; one folder for each redundancy that is exploited."""

from accelpass.passes.core.base import Done, Pass, Record, SitePatterns, Skip, Take, Verdict
from accelpass.passes.core.registry import make, registered
from accelpass.passes.core.site_pass import ASPECTS, Edits, Site, SitePass

__all__ = [
    "ASPECTS",
    "Done",
    "Edits",
    "Pass",
    "Record",
    "Site",
    "SitePass",
    "SitePatterns",
    "Skip",
    "Take",
    "Verdict",
    "make",
    "registered",
]
