"""Masked-diffusion language models: all masked tokens are guessed at each step, and the certain ones become text."""

from accelpass.decoding.masked.dparallel import EntropyThreshold as EntropyThreshold
from accelpass.decoding.masked.dparallel import dparallel as dparallel
from accelpass.decoding.masked.loop import MaskedDecoder as MaskedDecoder
from accelpass.decoding.masked.loop import Rule as Rule
from accelpass.decoding.masked.loop import Step as Step
from accelpass.decoding.masked.loop import StepStatistics as StepStatistics
