"""Modules that predict the tokens after the next one from the model's last hidden state (multi-token prediction)."""

from accelpass.decoding.heads.drafter import MultiToken as MultiToken
from accelpass.decoding.heads.drafter import mtp_heads as mtp_heads
from accelpass.decoding.heads.drafter import unverified as unverified
from accelpass.decoding.heads.modules import MTPHeads as MTPHeads
from accelpass.decoding.heads.training import distil as distil
