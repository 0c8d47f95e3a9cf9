"""A step of decoding as one compiled graph: the model, its guesses' mask, logits processors, acceptance and the next token."""

from accelpass.decoding.one_graph.processors import Processors as Processors
from accelpass.decoding.one_graph.step import Step as Step
