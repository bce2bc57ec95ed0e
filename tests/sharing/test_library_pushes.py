"""transformers' own `push_to_hub` on a converted model, and its way back, against the hub on this machine."""

import pytest
import torch
import transformers
from hub_stand_in import Hub
from saved_models import armour


# What huggingface_hub says of the client below it, where it sends raw bytes.
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_transformers_pushes_a_converted_model_and_loads_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers keeps its client, which asks the hub that was known when it was first needed.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    model = armour("hf-vit")
    with pytest.warns(UserWarning, match="there could be more"):  # the hub's word on a card without a license
        model.push_to_hub("someone/small")  # type: ignore[operator]
    assert {"config.json", "model.safetensors"} <= set(hub.repos["someone/small"].files())
    loaded = transformers.AutoModelForImageClassification.from_pretrained("someone/small")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model.eval()(images).logits)
