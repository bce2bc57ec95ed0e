"""What torch's own layers do with an `nn.MultiheadAttention` past its forward, and what a rewritten one answers.

In eval without gradients `nn.TransformerEncoderLayer` computes attention itself, from the weights that it reads off the
module, and `nn.TransformerEncoder` hands padded sequences on as nested tensors, which the module's own forward does not
take.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import SpecializationError

__all__ = ["answers_of", "reset_parameters", "taking_nested"]


def answers_of(host: type[nn.Module]) -> dict[str, Any]:
    """Members for the class of a rewritten attention of this class."""
    if not issubclass(host, nn.MultiheadAttention):
        return {}
    # To torch this flag says that in_proj_weight is q, k and v of one width, [3E, E], which it is no more: the layer
    # then calls the module. Torch keeps it on the instance, and only a property goes before that.
    return {"_qkv_same_embed_dim": property(lambda self: False), "_reset_parameters": reset_parameters}


def reset_parameters(self: nn.MultiheadAttention) -> None:
    """Draw the weights anew as torch does, those that there are; trainers and transformers call it."""
    for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
        if weight is not None:
            nn.init.xavier_uniform_(weight)
    if self.in_proj_bias is not None:
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)
    for bias in (self.bias_k, self.bias_v):
        if bias is not None:
            nn.init.xavier_normal_(bias)


def taking_nested(forward: Callable[..., Any], host: type[nn.Module]) -> Callable[..., Any]:
    """A generated forward that pads nested tensors, where the host's class may be given some."""
    if not issubclass(host, nn.MultiheadAttention):
        return forward

    @functools.wraps(forward)
    def padded_forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (query.is_nested or key.is_nested or value.is_nested):
            return forward(self, query, key, value, *args, **kwargs)
        masked = bool(args) or any(kwargs.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        if masked or not (query is key is value) or not self.batch_first:
            raise SpecializationError(
                f"{type(self).__name__} takes nested tensors in self-attention with batch_first and without a mask, as "
                "nn.TransformerEncoder hands them on; pass a padded tensor and its key_padding_mask"
            )
        lengths = [len(sequence) for sequence in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(-1)
        output, weights = forward(self, padded, padded, padded, **{**kwargs, "key_padding_mask": padding})
        sequences = [sequence[:length] for sequence, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(sequences, layout=query.layout), weights

    return padded_forward
