"""Ready a model for inference: passes that keep what it computes within rounding and make it faster.

Each pass is one file and can be run alone; it leaves a place as it is where it does not apply or does not pay, and
says why on `model.deployment`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.calls import run
from armour_surgery.copies import floating_weight, full_copy, has_weights
from armour_surgery.deployment.attention import AttentionPass, deploy_attention
from armour_surgery.deployment.channels_last_pass import channels_last
from armour_surgery.deployment.drop_dead_tokens_pass import drop_dead_tokens
from armour_surgery.deployment.drop_key_bias_pass import drop_key_bias
from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.fold_batch_norm_pass import fold_batch_norm
from armour_surgery.deployment.fold_layer_norm_pass import fold_layer_norm
from armour_surgery.deployment.fold_layer_scale_pass import fold_layer_scale
from armour_surgery.deployment.fold_scale_pass import fold_scale
from armour_surgery.deployment.fuse_attention_pass import fuse_attention
from armour_surgery.deployment.precompute_pass import precompute
from armour_surgery.deployment.records import DeployedPlace, Deployment, KeptPlace
from armour_surgery.deployment.remove_idle_modules_pass import remove_idle_modules
from armour_surgery.discover.dataflow import follow_model, tensors_in
from armour_surgery.errors import NothingToDeployError, PostconditionError, UsageError
from armour_surgery.measure.difference import largest_difference
from armour_surgery.patching import on_cpu_by_default
from armour_surgery.surgery.targets import Example, plain_example_of, refuse_deployed

__all__ = ["PASSES", "RUNTIMES", "deploy"]

ModelPass = Callable[[nn.Module, dict[str, Tensor], Findings], None]

_MODEL_PASSES: dict[str, ModelPass] = {
    "fold-batch-norm": fold_batch_norm,
    "fold-layer-scale": fold_layer_scale,
    "fold-layer-norm": fold_layer_norm,
    "remove-idle-modules": remove_idle_modules,
    "channels-last": channels_last,
}
_ATTENTION_PASSES: dict[str, AttentionPass] = {
    "fuse-attention": fuse_attention,
    "fold-scale": fold_scale,
    "precompute": precompute,
    "drop-key-bias": drop_key_bias,
}
_LAST_PASSES: dict[str, ModelPass] = {"drop-dead-tokens": drop_dead_tokens}
PASSES = (*_MODEL_PASSES, *_ATTENTION_PASSES, *_LAST_PASSES)
# The kernel of LayerNorm scales and shifts in the pass over memory that it makes anyway: nothing was won on a DeiT-Ti
# (0.98 times as fast where the model against itself came out at 0.99), so that one runs only when it is asked for.
_ONLY_WHEN_ASKED = ("fold-layer-norm",)

# Where a deployed model can run: a pass may pay in one and not in another.
RUNTIMES = ("torch", "compile", "onnx", "openvino")

# The largest relative difference of outputs that is rounding, by type.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@on_cpu_by_default
def deploy(
    model: nn.Module,
    *,
    passes: Iterable[str] | None = None,
    compiled: bool = False,
    example_input: Example | None = None,
    inplace: bool = False,
    runtime: str = "torch",
) -> nn.Module:
    """Ready a model for inference, converted or not: the same function within rounding, with less work.

    Returns a new model of the same class (the same object with `inplace`), in eval mode, whose attentions may be
    instances of subclasses of their own class. It does not train: a forward in training mode is refused. What was
    done, and what was left alone for which reason, is on `.deployment`. Its outputs were compared with the original's
    on noise.

    Args:
        passes: names from `PASSES`, to run these only, also where they do not pay. None runs all that pay.
        compiled: whether the model will go through torch.compile: some passes then do not pay.
        example_input: what to run the (weightless) model on, if it is of no known library; as for `convert`.
        inplace: change the model itself, and need no memory for another one.
        runtime: where it will run: `torch`, `compile` (as `compiled`), or exported to `onnx` (ONNX Runtime) or
            `openvino`. Passes leave alone what does not pay there.

    Raises:
        UsageError: there is no pass or runtime of that name, or a wrapper is around the model.
        AlreadyDeployedError: the model is deployed already.
        NothingToDeployError: no pass found anything to do; the message says what they left alone and why.
        ExampleInputError: the model's input is not known, or it did not run on it.
        DiscoveryError: it cannot be followed, because something was done to its modules; the message says how to go on.
        PostconditionError: the outputs differ by more than rounding. This is a bug of ours.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime {runtime!r} is none; choose {', '.join(RUNTIMES)}")
    if compiled:
        runtime = "compile"
    names = _chosen(passes)
    refuse_deployed(model)
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not count their changes
        example = plain_example_of(model, example_input)
        follow_model(model, example)  # tells a user in their words when the example does not fit
        result = model if inplace else full_copy(model)
        result.eval()
        noise = _noise(result, example)
        expected = _run(result, noise)
        findings = {name: Findings(name) for name in names}
        for name in names:
            if name in _MODEL_PASSES:
                _MODEL_PASSES[name](result, example, findings[name])
        attention = [(_ATTENTION_PASSES[name], findings[name]) for name in names if name in _ATTENTION_PASSES]
        if attention:
            deploy_attention(result, example, attention, runtime=runtime, forced=passes is not None)
        for name in names:
            if name in _LAST_PASSES:
                _LAST_PASSES[name](result, example, findings[name])
        error = _compare(type(model).__name__, expected, _run(result, noise))
    done: list[DeployedPlace] = []
    kept: list[KeptPlace] = []
    for notes in findings.values():
        done += notes.done
        kept += notes.kept
    report = Deployment(names, runtime == "compile", tuple(done), tuple(kept), error, runtime)
    _refuse_if_nothing_done(report, type(model).__name__)
    result.deployment = report  # type: ignore[assignment]
    result.register_forward_pre_hook(_refuse_training)
    return result


def _refuse_if_nothing_done(report: Deployment, model: str) -> None:
    if report.done:
        return
    # The same reason holds at many sites and in many blocks: three different ones say enough.
    reasons = list(dict.fromkeys(f"{place.fqn}: {place.reason} ({place.name})" for place in report.kept))
    listed = f": {'; '.join(reasons[:3])}" if reasons else ""
    raise NothingToDeployError(
        f"none of the passes {', '.join(report.passes)} found anything to do in {model}{listed}. Use the model as it is"
    )


def _chosen(passes: Iterable[str] | None) -> tuple[str, ...]:
    if passes is None:
        return tuple(name for name in PASSES if name not in _ONLY_WHEN_ASKED)
    # A string is an iterable of letters, and no letter is a pass.
    given = [passes] if isinstance(passes, str) else list(passes)
    unknown = [name for name in given if name not in PASSES]
    if unknown or not given:
        what = f"there is no pass {unknown[0]!r}" if unknown else "passes is empty"
        raise UsageError(f"{what}; choose from {', '.join(PASSES)}")
    return tuple(name for name in PASSES if name in given)


def _noise(model: nn.Module, example: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Numbers in the shapes of the example; None where the model has no weights to try them with."""
    like = floating_weight(model)
    if like is None or not has_weights(model):
        return None
    generator = torch.Generator().manual_seed(0)
    noise: dict[str, Tensor] = {}
    for name, value in example.items():
        if value.is_floating_point():
            noise[name] = torch.randn(value.shape, generator=generator).to(like.device, like.dtype)
        elif not value.is_meta:
            noise[name] = value.to(like.device)
        else:
            # Indices and masks: what is valid is not known, and ones nearly always are.
            noise[name] = torch.ones_like(value, device=like.device)
    return noise


def _run(model: nn.Module, noise: dict[str, Tensor] | None) -> list[Tensor]:
    if noise is None:
        return []
    # Some draw random numbers in eval mode too (ViT-MAE masks patches): both models the same ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Clones: a host may return a buffer, and with `inplace` the passes change the very model that this came from.
        return [tensor.detach().clone() for tensor in tensors_in(run(model, noise))]


def _compare(name: str, expected: list[Tensor], got: list[Tensor]) -> float | None:
    """The largest difference, relative to the largest value.

    Raises:
        PostconditionError: it is more than rounding.
    """
    if not any(before.is_floating_point() and before.numel() for before in expected):
        return None
    error = largest_difference(expected, got)
    limit = _TOLERANCE.get(expected[0].dtype)
    # `not <=`, since NaN is neither above nor below.
    if limit is not None and not error <= limit:
        raise PostconditionError(
            f"the deployed {name} differs from the original by {error:.1e} of its largest output, and rounding "
            f"explains {limit:.0e}. Leave out passes one by one to find which (`passes=`), and report it"
        )
    return error


def _refuse_training(model: nn.Module, _: Any) -> None:
    if model.training:
        raise UsageError(
            f"this {type(model).__name__} is deployed: its norms and scales are folded away, and it does not train. "
            "Call .eval(), or train the model that deploy() was given"
        )
