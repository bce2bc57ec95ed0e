"""The exactness oracle on every host: where the merged projections are equal already, surgery changes nothing.

`qk-diag` has no such case; it is compared with attention written out here.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import merge, outputs, randomize, relative_error
from shared_hosts import built, converted_host, merged
from timm.layers import Attention, set_fused_attn, use_fused_attn
from timm.models.levit import Attention as LevitAttention
from tiny_hosts import CASES, EVEN, HostCase
from torch import nn
from torch.overrides import TorchFunctionMode

from armour_surgery.modes import MODES
from armour_surgery.surgery.conversion import convert, inspect

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
EXACT = [(name, mode) for name, one in CASES.items() for mode in one.modes if mode != "qk-diag"]


def error(
    one: HostCase,
    model: nn.Module,
    converted: nn.Module,
    dtype: torch.dtype,
    training: bool = False,
    around: AbstractContextManager[Any] | None = None,
) -> float:
    """The worst relative error over a host's batches; the original runs inside `around`."""
    worst = 0.0
    a, b = (copy.deepcopy(module).to(dtype).train(training) for module in (model, converted))
    for batch in one.batches(dtype):
        with torch.no_grad():
            with around or nullcontext():
                expected = outputs(a, batch)
            worst = max(worst, relative_error(expected, outputs(b, batch)))
    return worst


# The oracle.


@pytest.mark.parametrize(("name", "mode"), EXACT)
def test_surgery_changes_nothing_where_the_projections_are_equal(name: str, mode: str) -> None:
    model, converted = merged(name, mode)
    for dtype, tolerance in TOLERANCE.items():
        for training in (False, True):
            assert error(CASES[name], model, converted, dtype, training) <= tolerance, (dtype, training)


@pytest.mark.parametrize("name", CASES)
def test_the_modes_that_fit(name: str) -> None:
    sites = inspect(built(name)[0], example_input=CASES[name].example())
    fitting = {mode for site in sites for mode in site.modes}
    assert fitting == set(CASES[name].modes)
    assert len(sites) == CASES[name].sites
    for site in sites:
        assert set(site.modes) | set(site.refused) == set(MODES)
        assert not set(site.modes) & set(site.refused)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, CASES[name].auto) for name in ("eva", "eva02", "beit", "swin", "hf-vit", "hf-swin", "hf-segformer")]
    + [("vit", mode) for mode in EVEN]
    + [("levit", mode) for mode in ("qk", "concat-half", "concat-full", "concat-key", "grouped", "grouped-shuffled")],
)
def test_without_equal_projections_surgery_changes_the_output(name: str, mode: str) -> None:
    model, armour = built(name)[0], converted_host(name, mode)
    assert all(site.residual > 0.5 for site in armour.surgery.sites)
    assert error(CASES[name], model, armour, torch.float32) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_two_swapped_rows_do_not_escape_the_oracle(name: str) -> None:
    """Any one site of which the shared weight has two rows in the wrong order is found out."""
    model, converted = merged(name, CASES[name].auto)
    done = {site.fqn for site in converted.surgery.sites}
    for found in built(name)[1]:
        if found.fqn not in done:
            continue
        sabotaged = copy.deepcopy(converted)
        weight = sabotaged.get_submodule(found.fqn).get_parameter(found.traced.q.producer.weight)
        with torch.no_grad():
            weight[[0, 1]] = weight[[1, 0]]
        assert error(CASES[name], model, sabotaged, torch.float64) > 1e-6, found.fqn


# The paths through an attention that a flag switches.


class Calls(TorchFunctionMode):
    """Count the calls of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _unfused() -> Iterator[None]:
    before = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(enable=before > 0)


UNFUSED = ("vit", "vit-qk-norm", "eva", "eva02", "beit", "swin")


@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize(
    ("name", "mode"), [(name, "qv") for name in UNFUSED] + [("vit", "qk"), ("vit", "kv"), ("vit-qk-norm", "qk")]
)
def test_the_oracle_holds_with_softmax_written_out(name: str, mode: str) -> None:
    one = CASES[name]
    model = one.build()
    merge(model, mode, one.example())
    with Calls() as calls:
        converted = convert(model, mode, example_input=one.example())
        for training in (False, True):
            assert error(one, model, converted, torch.float64, training) <= 1e-12
    assert calls.fused == 0


@pytest.mark.parametrize("name", UNFUSED)
@pytest.mark.parametrize("mode", ["qv", "qk-diag"])
def test_switching_fused_attention_afterwards_is_followed(name: str, mode: str) -> None:
    one = CASES[name]
    _, converted = merged(name, mode)
    converted = copy.deepcopy(converted).double()
    batch = one.batches(torch.float64)[0]
    switches = [module for module in converted.modules() if hasattr(module, "fused_attn")]
    assert len(switches) == one.sites
    before = [module.fused_attn for module in switches]
    with torch.no_grad():
        expected = outputs(converted, batch)
    # Swin of timm starts with softmax written out, the others with the fused call.
    for fused in (not before[0], before[0]):
        for module in switches:
            module.fused_attn = fused
        with torch.no_grad():
            assert relative_error(expected, outputs(converted.eval(), batch)) <= 1e-12
            outputs(converted.train(), batch)
            # By now both kinds of call are known: what is counted is not their tracing.
            with Calls() as calls:
                outputs(converted.eval(), batch)
                outputs(converted.train(), batch)
        assert calls.fused == (2 * one.sites if fused else 0)


@pytest.mark.parametrize("name", [name for name, one in CASES.items() if name.startswith("hf") and not one.norms])
def test_the_oracle_holds_with_transformers_eager_attention(name: str) -> None:
    one = CASES[name]
    model, converted = (copy.deepcopy(module) for module in merged(name, one.auto))
    for module in (model, converted):
        module.set_attn_implementation("eager")
    for training in (False, True):
        # Sizes that a host is told (SegFormer's height and width) are traced at their first call; that is not counted.
        error(one, model, converted, torch.float64, training)
    with Calls() as calls:
        for training in (False, True):
            assert error(one, model, converted, torch.float64, training) <= 1e-12
    assert calls.fused == 0


# qk-diag against attention written out.


def without_diagonal(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """softmax over the last axis in which no token attends to itself, unless it may attend to nothing else."""
    eye = torch.eye(logits.shape[-1], dtype=torch.bool)
    others = (allowed & ~eye).any(-1, keepdim=True)
    keep = allowed & ~(eye & others)
    return torch.softmax(logits.masked_fill(~keep, float("-inf")).double(), -1).to(logits.dtype)


class Diagonal(TorchFunctionMode):
    """Every square attention that runs in this context is one without its diagonal."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            logits = args[0]
            if logits.shape[-1] == logits.shape[-2]:
                return without_diagonal(logits, logits > torch.finfo(logits.dtype).min / 2)
        return func(*args, **kwargs)

    def attention(self, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **rest: Any) -> Any:
        if q.shape[-2] != k.shape[-2]:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, **rest)
        assert not rest.get("is_causal")
        scale = rest.get("scale") or q.shape[-1] ** -0.5
        logits = q @ k.transpose(-2, -1) * scale
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        elif attn_mask is not None:
            logits, allowed = logits + attn_mask, allowed & ~attn_mask.isneginf()
        return without_diagonal(logits, allowed) @ v


@pytest.mark.parametrize("name", [name for name, one in CASES.items() if "qk-diag" in one.modes])
def test_qk_diag_is_attention_without_its_diagonal(name: str) -> None:
    model, converted = merged(name, "qk-diag")
    # The merged host, run as it is, does look at the diagonal: a reference that did nothing would be found out.
    assert error(CASES[name], model, converted, torch.float64) > 1e-4
    assert error(CASES[name], model, converted, torch.float64, around=Diagonal()) <= 1e-11
    # Not the same operations in the same order, so rounding differs; BatchNorm's scales amplify it.
    tolerance = 2e-4 if CASES[name].norms else 1e-5
    assert error(CASES[name], model, converted, torch.float32, around=Diagonal()) <= tolerance


@pytest.mark.parametrize("name", ["hf-vit", "hf-beit", "hf-clip", "hf-dinov3", "hf-segformer"])
def test_qk_diag_with_transformers_eager_attention(name: str) -> None:
    pair = [copy.deepcopy(module) for module in merged(name, "qk-diag")]
    for module in pair:
        module.set_attn_implementation("eager")
    # transformers' eager attention takes its softmax in float32, whatever the model's type is.
    assert error(CASES[name], *pair, torch.float64, around=Diagonal()) <= 1e-6


def reference(attention: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a `qk-diag` timm attention of 4 heads computes, from the original's weights."""
    q, _, v = (
        part.unflatten(-1, (4, -1)).transpose(1, 2)
        for part in F.linear(x, attention.qkv.weight, attention.qkv.bias).chunk(3, -1)
    )
    logits = q @ q.transpose(-2, -1) * q.shape[-1] ** -0.5
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        logits, allowed = logits + mask, allowed & ~mask.isneginf()
    return attention.proj((without_diagonal(logits, allowed) @ v).transpose(1, 2).flatten(2))


def masks() -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    boolean = torch.rand(2, 1, 6, 6, generator=generator) > 0.5
    boolean[:, :, 3] = False
    boolean[:, :, 3, 3] = True  # this one may attend to itself and to nothing else
    boolean[:, :, 4] = True
    boolean[:, :, 5] = False
    boolean[:, :, 5, 2] = True  # this one may not attend to itself anyway
    boolean |= torch.eye(6, dtype=torch.bool) & ~boolean.any(-1, keepdim=True)
    bias = torch.randn(2, 4, 6, 6, generator=generator, dtype=torch.float64)
    return {
        "none": None,
        "bias": bias,
        "boolean": boolean,
        "additive": torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~boolean, float("-inf")),
        "bias and additive": bias.masked_fill(~boolean, float("-inf")),
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", masks())
def test_qk_diag_with_a_mask(fused: bool, kind: str) -> None:
    attention = randomize(Attention(48, 4, qkv_bias=True)).double().eval()
    attention.fused_attn = fused
    converted = convert(attention, "qk-diag", example_input=torch.empty(2, 6, 48, dtype=torch.float64))
    x = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mask = masks()[kind]
    with torch.no_grad():
        expected, got = reference(attention, x, mask), converted(x, attn_mask=mask)
        assert relative_error([expected], [got]) <= 1e-12
        # Once more without a mask, and with one: the branches do not get in each other's way.
        assert relative_error([reference(attention, x, None)], [converted(x)]) <= 1e-12
        assert relative_error([expected], [converted(x, mask)]) <= 1e-12


@pytest.mark.parametrize("fused", [True, False])
def test_qk_diag_of_a_causal_attention(fused: bool) -> None:
    """The first token may attend to nothing but itself."""
    attention = randomize(Attention(48, 4)).double().eval()
    attention.fused_attn = fused
    converted = convert(attention, "qk-diag", example_input=torch.empty(2, 6, 48, dtype=torch.float64))
    x = torch.randn(2, 6, 48, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        assert relative_error([reference(attention, x, mask)], [converted(x, is_causal=True)]) <= 1e-12


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_qk_diag_of_a_single_token_is_its_value(fused: bool, dtype: torch.dtype) -> None:
    attention = randomize(Attention(48, 4)).to(dtype).eval()
    attention.fused_attn = fused
    converted = convert(attention, "qk-diag", example_input=torch.empty(2, 6, 48, dtype=dtype))
    x = torch.randn(2, 1, 48).to(dtype)
    with torch.no_grad():
        value = F.linear(x, attention.qkv.weight[96:])
        expected, got = attention.proj(value), converted(x)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert relative_error([expected.double()], [got.double()]) <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(
        dtype, 2e-2
    )


@pytest.mark.parametrize("use_conv", [False, True])
def test_qk_diag_of_levit_is_the_formula(use_conv: bool) -> None:
    """Levit's attention once more from the paper's formula, without its code."""
    attention = randomize(LevitAttention(36, 8, num_heads=3, attn_ratio=2, use_conv=use_conv, resolution=(3, 2)))
    attention.double().eval()  # timm's train() returns None here
    shape = (2, 36, 3, 2) if use_conv else (2, 6, 36)
    # In a Sequential, because the attention's own train() returns None, which its own eval() does too.
    model = nn.Sequential(attention)
    converted = convert(model, "qk-diag", example_input=torch.empty(shape, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        qkv = attention.qkv(x)
        tokens = qkv.flatten(2).transpose(1, 2) if use_conv else qkv
        q, _, v = tokens.unflatten(-1, (3, 32)).transpose(1, 2).split([8, 8, 16], -1)
        bias = attention.attention_biases[:, attention.attention_bias_idxs]
        logits = q @ q.transpose(-2, -1) * 8**-0.5 + bias
        y = (without_diagonal(logits, torch.ones_like(logits, dtype=torch.bool)) @ v).transpose(1, 2).flatten(2)
        y = y.transpose(1, 2).unflatten(2, (3, 2)) if use_conv else y
        assert relative_error([attention.proj(y)], [converted(x)]) <= 1e-12
