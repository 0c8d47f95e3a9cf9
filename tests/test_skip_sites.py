"""``skip_sites`` leaves a site alone in every registered pass, or the pass says that it cannot."""

from __future__ import annotations

import pytest
import torch

import accelpass
from accelpass.ir.errors import PassError
from accelpass.passes.core.plan import Plan
from accelpass.testing import SUBJECTS
from accelpass.testing.trial import run
from tests.pass_settings import names, setting

WHOLE = ("lazyllm",)
"""It drops tokens from the model as a whole."""


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_named_site_is_left_alone(name):
    given = setting(name)
    subject = SUBJECTS[given.models[0]]
    model = subject.build(0)

    def done(**more):
        torch._dynamo.reset()
        options = {"passes": [{"name": name, **given.options}], "lowering": "eager", **more}
        if given.tensors:
            options["plan"] = Plan.of(model, [], dict(given.tensors))
        fast = torch.compile(model, backend="accelpass", options=options)
        run(subject, fast, model)
        return accelpass.explain(fast).passes[name]

    took = list(done().took)
    assert took, f"{name} takes nothing on {subject.name}"
    if name in WHOLE:
        with pytest.raises(Exception, match="cannot leave single sites alone") as raised:
            done(skip_sites={name: took[:1]})
        assert isinstance(getattr(raised.value, "inner_exception", raised.value), PassError)
        return
    left = done(skip_sites={name: took[:1]})
    assert took[0] not in left.took and any("skip_sites" in why for why in left.skipped.values())
    assert set(left.took) <= set(took)
