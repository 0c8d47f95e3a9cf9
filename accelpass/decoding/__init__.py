"""Several tokens a step: guesses that the model verifies in one call (``model.generate(..., custom_generate=...)``)."""

from accelpass.decoding.acceptance import exact as exact
from accelpass.decoding.approval import Approval as Approval
from accelpass.decoding.approval import rsd as rsd
from accelpass.decoding.drafts import DraftModel as DraftModel
from accelpass.decoding.drafts import draft_model as draft_model
from accelpass.decoding.drafts import self_draft as self_draft
from accelpass.decoding.driver import Decoder as Decoder
from accelpass.decoding.driver import Statistics as Statistics
from accelpass.decoding.guidance import Guidance as Guidance
from accelpass.decoding.interfaces import Acceptance as Acceptance
from accelpass.decoding.interfaces import DecodingError as DecodingError
from accelpass.decoding.interfaces import Drafter as Drafter
from accelpass.decoding.interfaces import Proposal as Proposal
from accelpass.decoding.interfaces import Proposer as Proposer
from accelpass.decoding.interfaces import Request as Request
from accelpass.decoding.interfaces import Verified as Verified
from accelpass.decoding.lookup import PromptLookup as PromptLookup
from accelpass.decoding.lookup import prompt_lookup as prompt_lookup
from accelpass.decoding.recycling import TokenRecycling as TokenRecycling
from accelpass.decoding.recycling import token_recycling as token_recycling
from accelpass.decoding.windows import Jacobi as Jacobi
from accelpass.decoding.windows import SpeculativeJacobi as SpeculativeJacobi
from accelpass.decoding.windows import jacobi as jacobi
from accelpass.decoding.windows import sjd as sjd
