"""The Python interface: names, signatures, and what convert, plan and inspect promise."""

import inspect as python_inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import vit

import armour_surgery
from armour_surgery import convert, inspect, load, redundancy, save
from armour_surgery.modes import MODES

# Names


def test_the_public_names() -> None:
    functions = ["benchmark", "convert", "deploy", "export", "inspect", "load", "plan", "push", "redundancy", "save"]
    documented = ["ArmourError", "ArmourWarning", "AttentionSite", "SurgeryPlan", *functions, "sensitivities"]
    assert armour_surgery.__all__ == documented
    assert armour_surgery.__all__ == sorted(armour_surgery.__all__)
    assert all(getattr(armour_surgery, name).__doc__ for name in documented)
    assert armour_surgery.convert is convert
    assert python_inspect.isfunction(armour_surgery.inspect)
    with pytest.raises(AttributeError, match="has no attribute 'finetune_everything'"):
        armour_surgery.finetune_everything  # noqa: B018
    namespace: dict[str, Any] = {}
    exec("from armour_surgery import *", namespace)
    assert set(documented) <= set(namespace)


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert armour_surgery.__version__ == version("armour-surgery")


ORDERS = """
import importlib, itertools, sys, types
modules = sys.argv[1:]
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "armour_surgery"]:
        del sys.modules[name]
from armour_surgery import __all__ as public_names
# Alone, those that could hide something: a module in the package's own folder takes the name that it has itself.
alone = [one for one in modules if one.rpartition(".")[2] in public_names or ".cli." in one]
assert len(alone) > 5
for order in (modules, modules[::-1], *([one] for one in alone)):
    forget()
    for name in order:
        importlib.import_module(name)
    from armour_surgery import convert, inspect, load, plan, save
    for public in (convert, inspect, load, plan, save):
        assert isinstance(public, types.FunctionType), (order, public)
    import armour_surgery
    for name in armour_surgery.__all__:
        assert not isinstance(getattr(armour_surgery, name), types.ModuleType), (order, name)
print("fine", len(modules))
"""


def test_submodules_do_not_hide_the_public_names() -> None:
    """Importing `armour_surgery.X` puts X into the package, and must not put a module over a function."""
    root = Path(armour_surgery.__file__).parent
    modules = [f"armour_surgery.{path.stem}" for path in sorted(root.glob("*.py")) if "__" not in path.stem]
    modules += [f"armour_surgery.{path.parent.name}" for path in sorted(root.glob("*/__init__.py"))]
    names = ("bench", "convert", "inspect", "push", "redundancy", "paper", "demo")
    modules += [f"armour_surgery.cli.{name}" for name in names]
    done = subprocess.run([sys.executable, "-c", ORDERS, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fine")


def test_importing_the_package_alone_is_cheap() -> None:
    code = "import sys, armour_surgery; print(sorted({'torch', 'timm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CONTRACT = {
    "model": python_inspect.Parameter.empty,
    "mode": "auto",
    "init": "wq",
    "include": None,
    "exclude": None,
    "inplace": False,
    "example_input": None,
}


def test_the_signature_of_convert() -> None:
    parameters = python_inspect.signature(convert).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    positional = python_inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [name for name, kind in kinds.items() if kind is positional] == ["model", "mode"]
    assert {kind for name, kind in kinds.items() if name not in ("model", "mode")} == {
        python_inspect.Parameter.KEYWORD_ONLY
    }
    assert {name: parameters[name].default for name in CONTRACT} == CONTRACT
    assert set(parameters) - set(CONTRACT) <= {
        "calibration",
        "calibration_images",
        "gauge",
        "max_loss",
        "measured",
        "mlp",
        "params",
        "progress",
        "rank",
        "reconstruct",
        "source",
    }
    assert list(python_inspect.signature(save).parameters)[:2] == ["model", "path"]
    assert list(python_inspect.signature(load).parameters) == ["path", "into"]
    with pytest.raises(TypeError):
        convert(vit(), "qv", "wq")  # type: ignore[misc]


# inspect


def test_inspect_tells_every_mode_once() -> None:
    sites = inspect(vit())
    assert [site.fqn for site in sites] == [f"blocks.{index}.attn" for index in range(3)]
    for site in sites:
        assert set(site.modes) | set(site.refused) == set(MODES)
        assert not set(site.modes) & set(site.refused)
        assert all(reason and "\n" not in reason for reason in site.refused.values())
        contract = {"fqn", "kind", "num_heads", "key_dim", "value_dim", "modes", "refused"}
        assert contract <= set(site.to_dict())
        assert site.kind == "self-attention"
        assert site.q is not None
        assert site.q.fqn == "blocks.0.attn.qkv".replace("0", site.fqn.split(".")[1])
        assert [len(head) for head in site.q.channels] == [12] * 4


def test_inspect_needs_no_weights() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert [site.fqn for site in inspect(model)] == ["blocks.0.attn"]


def test_it_is_public() -> None:
    assert armour_surgery.redundancy is redundancy
    assert "redundancy" in armour_surgery.__all__
