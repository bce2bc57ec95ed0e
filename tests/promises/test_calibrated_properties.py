"""What holds for every way to choose weights, on any host: it runs, types stay, and the better one is better."""

import copy

import pytest
import torch
from in_steps import initialized
from oracle import outputs
from shared_hosts import built, example, prepared
from tiny_hosts import CASES, HostCase, case
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.copies import full_copy, meta_copy
from armour_surgery.discover import find_output, find_sites
from armour_surgery.initialize.site import SiteResult
from armour_surgery.initialize.weights import locate, read, read_output, write, write_output
from armour_surgery.surgery.order import INITS

EVERYWHERE = [(name, mode) for name, one in CASES.items() for mode in one.modes]
# One host for each answer to which bases are free: both, V's only, neither and V's order.
SEEN = [("vit", "qv"), ("vit", "kv"), ("vit-qk-norm", "qv"), ("hf-dinov2", "qv"), ("swin", "qv"), ("eva02", "qv")]
SEEN += [
    ("levit", "concat-half"),
    ("levit", "concat-full"),
    ("levit", "concat-key"),
    ("levit", "grouped"),
    ("hf-vit", "qk"),
    ("vit", "qk-diag"),
]


def images(host: HostCase, count: int = 3, batch: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Calibration batches of the size that the host is converted for.

    Few and large ones: a call of a tiny host takes as long for eight images as for one.
    """
    size = host.inputs[0][1]
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def converted(host: HostCase, model: nn.Module, mode: str, init: str, seen: list[Tensor]) -> nn.Module:
    """What a user of `convert` gets, for a model of the images' type."""
    calibration = seen if init == "calibrated" else None
    return convert(model, mode, init=init, calibration=calibration, example_input=example(host.id, seen[0].dtype))


def weighed(
    name: str, mode: str, init: str, seen: list[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[SiteResult]]:
    model, _ = built(name, dtype)
    return initialized(model, prepared(name, mode, dtype), init, example(name, dtype), seen)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("name", "mode"), [("vit", "qv"), ("levit", "concat-half")])
def test_the_steps_are_what_convert_does(name: str, mode: str, init: str) -> None:
    host, seen = case(name), images(case(name))
    whole = converted(host, built(name)[0], mode, init, seen)
    armour, results = weighed(name, mode, init, seen)
    wanted, got = whole.state_dict(), armour.state_dict()
    assert list(wanted) == list(got)
    assert all(torch.equal(value, got[key]) for key, value in wanted.items())
    if init != "wq":  # of which nothing is told but what was taken
        told = [(one.fqn, one.residual, one.steps) for one in results]
        assert [(one.fqn, one.residual, one.steps) for one in whole.surgery.sites] == told


def site_outputs(host: HostCase, model: nn.Module, fqn: str, seen: list[Tensor]) -> list[Tensor]:
    """What one attention returns for each batch."""
    caught: list[Tensor] = []
    model = full_copy(model)
    model.get_submodule(fqn).register_forward_hook(
        lambda _, __, output: caught.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in seen:
            model(**{host.argument: batch})
    return [output.double() for output in caught]


def relative_loss(expected: list[Tensor], got: list[Tensor]) -> float:
    """Relative squared error over all batches."""
    error = energy = 0.0
    for wanted, output in zip(expected, got, strict=True):
        error += float((wanted - output).square().sum())
        energy += float((wanted - wanted.mean(dim=(0, 1))).square().sum())
    return error / energy


@pytest.mark.parametrize(("name", "mode"), SEEN)
def test_on_the_images_it_saw_calibrated_is_never_worse(name: str, mode: str) -> None:
    """At the first site, whose input no other conversion has changed, for the output of attention."""
    host, first = case(name), prepared(name, mode)[0].fqn
    seen = images(host)
    expected = site_outputs(host, built(name)[0], first, seen)
    errors = {}
    for init in INITS:
        armour, _ = weighed(name, mode, init, seen)
        errors[init] = relative_loss(expected, site_outputs(host, armour, first, seen))
    assert errors["calibrated"] <= min(errors["wq-refit"], errors["joint-svd"]) * (1 + 1e-4), errors
    assert errors["calibrated"] < errors["wq"]


def change_bases(model: nn.Module, host: HostCase) -> None:
    """Give every head other bases, in place, that leave what the model computes as it is."""
    generator = torch.Generator().manual_seed(5)

    def mix(heads: int, size: int) -> Tensor:
        noise = torch.randn(heads, size, size, generator=generator, dtype=torch.float64)
        # Heads also differ in size.
        scale = torch.exp(0.5 * torch.randn(heads, 1, 1, generator=generator, dtype=torch.float64))
        return scale * (torch.eye(size, dtype=torch.float64) + 0.5 / size**0.5 * noise)

    for found in find_sites(model, example(host.id, torch.float64)):
        traced = found.traced
        assert traced is not None
        module = model.get_submodule(found.site.fqn)
        with torch.no_grad():
            out = find_output(meta_copy(module), found.call, traced.v)
        assert out is not None
        m, n = mix(traced.q.num_heads, traced.q.head_dim), mix(traced.v.num_heads, traced.v.head_dim)
        unused = torch.eye(1)
        for role, change in ((traced.q, m), (traced.k, torch.linalg.inv(m).mT), (traced.v, n)):
            place = locate(module, role, {})
            write(module, place, read(module, place) @ change, unused)
        weight, offset = read_output(module, out)
        write_output(module, out, torch.linalg.inv(n) @ weight, offset, unused)


@pytest.mark.parametrize("init", ["joint-svd", "calibrated"])
@pytest.mark.parametrize("name", ["vit", "hf-vit"])
def test_another_basis_of_the_heads_gives_the_same_function(name: str, init: str) -> None:
    host = case(name)
    model = host.build(torch.float64)
    other = copy.deepcopy(model)
    change_bases(other, host)
    batch = {key: value.double() for key, value in host.batches()[1].items()}
    same, wanted = outputs(other, batch), outputs(model, batch)
    for a, b in zip(wanted, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    seen = images(host, dtype=torch.float64)
    first, second = (outputs(converted(host, one, "qv", init, seen).eval(), batch) for one in (model, other))
    for a, b, original in zip(first, second, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
        assert (a - original).norm() > 1e-3 * original.norm()  # otherwise there was nothing to be invariant


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_stay(dtype: torch.dtype, init: str) -> None:
    host = case("levit")  # which also holds BatchNorm
    model, _ = built("levit", dtype)
    armour, _ = weighed("levit", "concat-half", init, images(host, dtype=dtype), dtype)
    assert {p.dtype for p in armour.parameters()} == {dtype}
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert {name: buffer.dtype for name, buffer in armour.named_buffers()} == before
    (output, *_) = outputs(armour.eval(), host.batches(dtype)[0])
    assert output.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.parametrize(("name", "mode"), EVERYWHERE)
def test_every_initializer_runs_everywhere(name: str, mode: str) -> None:
    host = case(name)
    batch, seen = host.batches()[1], images(host, count=2)
    shapes = [tensor.shape for tensor in outputs(full_copy(built(name)[0]), batch)]
    # What `wq-refit` does is one of the candidates of `joint-svd`: alone it need not run in every mode.
    inits = INITS[1:] if mode == host.auto else ("joint-svd", "calibrated")
    for init in inits:
        armour, results = weighed(name, mode, init, seen)
        assert [one.fqn for one in results] == [operation.fqn for operation in prepared(name, mode)]
        assert all(one.steps for one in results)
        assert all(tensor.isfinite().all() for tensor in armour.state_dict().values())
        found = outputs(armour, batch)
        assert [tensor.shape for tensor in found] == shapes
        assert all(tensor.isfinite().all() for tensor in found)
