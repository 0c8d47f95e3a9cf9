"""Reasoning in hidden states: loops of tied blocks that a model has, and a decode step that is given its own last state."""

from accelpass.decoding.latent.feedback import Thinker as Thinker
from accelpass.decoding.latent.report import recurrence as recurrence
