"""One converted model of each class of attention module, used as engineers use models.

    armour-surgery coverage --json > coverage.json
    python benchmarks/each_class.py coverage.json [--library NAME] [--only CLASS] [--rows FILE...] [--markdown FILE.md]

For every class of attention module that `auto` converts, an architecture that has it is built with random
weights and converted. Then:

- *copy*: a deepcopy gives the same output, bit for bit;
- *load*: saved, and loaded in another process, it gives the same output for one image and for three, bit for bit;
- *train*: all gradients of a training step are finite, and so is the output after it;
- *compile*: torch.compile(backend="aot_eager") gives the same output within 1e-5, in float32 or else in float64;
- *deploy*: the deployed model's output is within 1e-5 (in float64 where rounding decides what the model selects), or
  deploying is refused, with the reason.

What the original itself does not do, or not right (three images at once, training, compiling), is told so, and is no
failure. Models of transformers have two layers in every part, few words and experts, narrow MLPs, and images of eight
by eight patches where they run on such; one of timm whose images have more than 512 pixels a side gets the smallest
that it takes. What takes longer than ten minutes of a processor, or more than 14 GiB, is left.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from class_table import CHECKS, class_table
from small_architectures import images, outputs, quiet_outputs, running
from torch import Tensor, nn

from armour_surgery import convert, deploy, load, save
from armour_surgery.coverage.summary import versions
from armour_surgery.errors import ArmourError, PostconditionError
from armour_surgery.hosts.catalog import skeleton
from armour_surgery.measure.cost import count_params
from armour_surgery.measure.difference import largest_difference

_ABOUT = "\n\nFor every"  # where the table's own text begins in that of this file
_CANDIDATES = 8  # architectures of a class that are asked for; those that were examined fastest
_NEAR = 1e-5
_LONGEST = 600  # seconds of a processor that a class may take
_SLOWEST = 6  # times as long it may wait for one, beside other work, until it is taken to hang
_MEMORY_GIB = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("coverage", type=Path, help="what `armour-surgery coverage --json` printed")
    parser.add_argument("--library", choices=("timm", "transformers", "torchvision"))
    parser.add_argument("--only", default="", metavar="CLASS", help="only classes whose name has this in it")
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines: classes that are there are not run again, and the others are added to the last file",
    )
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if not options.coverage.is_file():
        parser.error(f"{options.coverage} is not there; `armour-surgery coverage --json` prints it")
    document = json.loads(options.coverage.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    chosen = []
    for library, found in document["libraries"].items():
        if options.library in (None, library):
            classes = _by_class(found["list"])
            chosen += [(library, host, names) for host, names in classes.items() if options.only in host]
    rows: list[dict[str, str]] = []
    for file in filter(Path.is_file, options.rows):
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for library, host, names in chosen:
        if any((row["library"], row["class"]) == (library, host) for row in rows):
            continue
        name = _plainest(library, names)
        started = time.perf_counter()
        known = [row for row in rows if (row["library"], row["architecture"]) == (library, name)]
        # Converted is the whole architecture, with all classes that it has.
        outcomes = {key: known[0][key] for key in CHECKS} if known else _examined_apart(library, name)
        print(f"{library} {host} {name} {time.perf_counter() - started:.1f} s {outcomes}", file=sys.stderr)
        rows.append({"library": library, "class": host, "architecture": name, **outcomes})
        if options.rows:
            with options.rows[-1].open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if options.markdown is not None:  # after each: all of them take an hour
            options.markdown.write_text(_page(rows, chosen, options), encoding="utf-8")
    rows = _ordered(rows, chosen)
    if options.markdown is not None:
        options.markdown.write_text(_page(rows, chosen, options), encoding="utf-8")
    print(json.dumps({"versions": versions(), "classes": rows}, indent=1))
    sys.exit(any(outcome.startswith("FAILS") for row in rows for outcome in row.values()))


def _ordered(rows: list[dict[str, str]], chosen: list[tuple[str, str, list[str]]]) -> list[dict[str, str]]:
    """Those of the chosen classes, in their order: earlier runs may have chosen others."""
    order = [(library, host) for library, host, _ in chosen]
    own = [row for row in rows if (row["library"], row["class"]) in order]
    return sorted(own, key=lambda row: order.index((row["library"], row["class"])))


def _examined_apart(library: str, name: str) -> dict[str, str]:
    """The outcomes, from a process of its own: it may hang, or take all memory, and leaves none of it behind."""
    context = multiprocessing.get_context("fork")  # what was imported is there at once
    ours, theirs = context.Pipe()
    process = context.Process(target=_examine_and_send, args=(library, name, theirs))
    process.start()
    theirs.close()
    try:
        end = time.monotonic() + _SLOWEST * _LONGEST
        # Asked for, since no pipe tells: what a process holds open, the one that loads, forked from it, does too.
        while not ours.poll(1) and process.is_alive():
            if time.monotonic() > end:
                return dict.fromkeys(CHECKS, f"not examined: it took longer than {_SLOWEST * _LONGEST} s")
        if ours.poll():
            return ours.recv()
        if process.exitcode == -signal.SIGXCPU:
            return dict.fromkeys(CHECKS, f"not examined: it took longer than {_LONGEST} s of a processor")
        return dict.fromkeys(CHECKS, f"FAILS: its process ended with {process.exitcode}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()


def _examine_and_send(library: str, name: str, connection: Connection) -> None:
    os.setpgid(0, 0)  # so that the process that loads ends with it
    reader = _Reader()
    # Too much memory is to be an error. The process that loads has a limit of its own.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_GIB << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (_LONGEST, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    connection.send(_examine(library, name, reader))


def _by_class(outcomes: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The architectures that have a class which `auto` converts, those that were examined fastest first.

    The classes that most architectures have come first.
    """
    classes: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome["seconds"]):
        for host in dict.fromkeys(kind["host"] for kind in outcome["kinds"] if kind["auto"]):
            classes.setdefault(host, []).append(outcome["name"])
    return dict(sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])))


def _plainest(library: str, names: list[str]) -> str:
    """The one that takes the least time: compiling takes it for each module, everything else for the weights."""

    def cost(name: str) -> int:
        model, _ = skeleton(library, name)
        return count_params(model) // 1_000_000 + sum(1 for _ in model.modules())

    return min(names[:_CANDIDATES], key=cost)


class _Reader:
    """Another process, which loads folders and has never built nor converted anything."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        context.Process(target=_read, args=(theirs,), daemon=True).start()

    def outputs(self, folder: Path, inputs: list[dict[str, Tensor]]) -> list[list[Tensor]]:
        """What the model in a folder answers to each input."""
        self._connection.send((folder, inputs))
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _read(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            folder, inputs = connection.recv()
        except EOFError:
            return
        try:
            model = load(folder)
            # Plain arrays cross to the other process without shared memory, of which containers have little.
            connection.send([quiet_outputs(model, one) for one in inputs])
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


def _examine(library: str, name: str, reader: _Reader) -> dict[str, str]:
    try:
        original, one = running(library, name)
    except Exception as error:
        return dict.fromkeys(CHECKS, f"not examined: {_said(error)}")
    try:
        three = images(original, 3)
        quiet_outputs(original, three)
    except Exception:
        three = None
    try:
        converted = convert(original, "auto")
        expected = quiet_outputs(converted, one)
    except Exception as error:
        return dict.fromkeys(CHECKS, _failed(error))
    checks: dict[str, Callable[[nn.Module], str]] = {
        "copy": lambda model: _same(quiet_outputs(copy.deepcopy(model), one), expected),
        # Norms over a batch of one vector do not train.
        "train": lambda model: _train(model, one if three is None else three),
        "compile": lambda model: _compile(model, one),
        "deploy": lambda model: _deploy(model, one, expected),
    }
    outcomes = {key: _attempt(key, check, converted, original) for key, check in checks.items()}
    loaded: dict[str, str] = {}
    try:
        inputs = [one] if three is None else [one, three]
        with tempfile.TemporaryDirectory() as folder:
            save(converted, Path(folder) / "model")
            answers = reader.outputs(Path(folder) / "model", inputs)
        loaded["load 1"] = _same(answers[0], expected)
        if three is None:
            loaded["load 3"] = "the original takes one image"
        else:
            loaded["load 3"] = _same(answers[1], quiet_outputs(converted, three))
    except Exception as error:
        loaded = dict.fromkeys(("load 1", "load 3"), _failed(error))
    outcomes |= loaded
    return {key: outcomes[key] for key in CHECKS}


def _attempt(key: str, check: Callable[[nn.Module], str], converted: nn.Module, original: nn.Module) -> str:
    outcome = _outcome(check, converted)
    if key in ("train", "compile") and outcome.startswith("FAILS"):
        own = _outcome(check, original)
        if own.startswith("FAILS"):
            return f"the original does not {key}: {own.partition(': ')[2][:100]}"
    return outcome


def _outcome(check: Callable[[nn.Module], str], model: nn.Module) -> str:
    try:
        return check(model)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"not examined: it takes more than {_MEMORY_GIB} GiB"
    return f"FAILS: {_said(error)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _same(got: list[Tensor], expected: list[Tensor]) -> str:
    equal = all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    return "same" if equal else f"FAILS: {largest_difference(expected, got):.1e}"


def _train(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    before = quiet_outputs(model, inputs)
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    trained = [output.float().square().mean() for output in outputs(student, inputs) if output.requires_grad]
    if not trained:
        raise ValueError("what its outputs depend on is frozen")
    torch.stack(trained).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        return "FAILS: gradients are not finite"
    optimizer.step()
    after = quiet_outputs(student.eval(), inputs)
    # Some have minus infinity where they mask.
    kept = [output.isfinite() | ~was.isfinite() for output, was in zip(after, before, strict=True)]
    return "finite" if all(one.all() for one in kept) else "FAILS: the output is not finite"


def _compile(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    difference = largest_difference(quiet_outputs(model, inputs), quiet_outputs(compiled, inputs))
    if difference <= _NEAR:
        return f"{difference:.0e}"
    exact, inputs = copy.deepcopy(model).double(), _in_doubles(inputs)
    wanted = quiet_outputs(exact, inputs)
    double = largest_difference(wanted, quiet_outputs(torch.compile(exact, backend="aot_eager"), inputs))
    return f"{double:.0e} in float64" if double <= _NEAR else f"FAILS: {difference:.1e}, in float64 {double:.1e}"


def _in_doubles(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _deploy(converted: nn.Module, inputs: dict[str, Tensor], expected: list[Tensor]) -> str:
    try:
        deployed = deploy(copy.deepcopy(converted))
    except ArmourError as error:
        if isinstance(error, PostconditionError):
            raise
        return f"refused: {_said(error)}"
    difference = largest_difference(expected, quiet_outputs(deployed, inputs))
    if difference <= _NEAR:
        return f"{difference:.0e}"
    # Rounding decides what a model selects by rank, the best of many queries for one, where weights are random.
    exact, inputs = copy.deepcopy(converted).double(), _in_doubles(inputs)
    wanted = quiet_outputs(exact, inputs)
    double = largest_difference(wanted, quiet_outputs(deploy(exact, inplace=True), inputs))
    return f"{double:.0e} in float64" if double <= _NEAR else f"FAILS: {difference:.1e}, in float64 {double:.1e}"


def _page(rows: list[dict[str, str]], chosen: list[tuple[str, str, list[str]]], options: argparse.Namespace) -> str:
    words = [f"python benchmarks/each_class.py {options.coverage.name}"]
    words += [f"--library {options.library}"] if options.library else []
    words += [f"--only {options.only}"] if options.only else []
    words += [" ".join(["--rows", *(file.name for file in options.rows)])] if options.rows else []
    command = " ".join([*words, f"--markdown {options.markdown}"])
    wanted = Counter(library for library, _, _ in chosen)
    return class_table(_ordered(rows, chosen), wanted, command, f"For every{__doc__.partition(_ABOUT)[2]}")


if __name__ == "__main__":
    main()
