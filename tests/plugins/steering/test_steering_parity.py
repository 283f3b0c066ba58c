"""steer and ablate_direction do what hooks written for TransformerLens 3.9.0 do there."""

import pytest
import torch
from model.parity import TOKENS, fill, transformer_lens_model
from recorded_steering import LOGITS

from hooklens.plugins.steering.steering_edit import ablate_direction, point_shape, steer


@pytest.mark.parametrize(("name", "site"), LOGITS)
def test_steered_logits_are_those_of_transformer_lens(name, site):
    model = transformer_lens_model(name)
    if site == "ablated":
        edit = ablate_direction(model, fill(f"steer.{name}.ablated", (model.cfg.d_model,)))
    else:
        (point,) = model.resolve((site, 1))
        vector = fill(f"steer.{name}.{site}", point_shape(model, point.name, "steer"))
        edit = steer(model, vector, 1.5, site=(site, 1), positions=slice(2, None))
    with edit, torch.no_grad():
        logits = model(TOKENS)[:, -1]
    torch.testing.assert_close(logits, torch.tensor(LOGITS[name, site]), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (logits - model(TOKENS)[:, -1]).abs().max() > 0.01
