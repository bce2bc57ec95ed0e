"""The libraries' own tests of models, on models as they are built and on the same ones converted: what differs?

    python benchmarks/their_tests.py [--timm CHECKOUT] [--transformers CHECKOUT] [--only PART] [--markdown FILE.md]

CHECKOUT is the source of the library at the version that is installed, with its tests; nothing of it is kept here.
Every model that a test builds is handed to `convert` (mode auto) before the test sees it. Tests in which nothing was
converted are left out. Fails if a test passes on the original and not on the converted model for a reason that is not
in `REASONS`. This file is its own pytest plugin.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The environment of a run: where its outcomes go, which library is tested, and whether its models are converted.
RECORD, LIBRARY, CONVERTED = "THEIR_TESTS_RECORD", "THEIR_TESTS_LIBRARY", "THEIR_TESTS_CONVERTED"

# Tests of timm that go through all architectures are run on these; tests that name a few are run on those.
ARCHITECTURES = (
    *("test_vit2", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s"),
    *("pit_ti_224", "eva02_tiny_patch14_224"),
)
ALL_ARCHITECTURES = 100
# The tests of those few that are about models like these.
LIKE_THESE = r"vit|swin|pit_|cait|eva|beit|relpos|attention_bias|encoder"

FAMILIES = ("vit", "deit", "dinov2", "swin", "levit")


# The plugin: what runs inside of pytest.


@dataclass
class Seen:
    """What the running test has built."""

    converted: int = 0
    sites: int = 0
    refused: Counter[str] = field(default_factory=Counter)


seen = Seen()
building = threading.local()


def pytest_configure(config: Any) -> None:
    if RECORD in os.environ and os.environ[CONVERTED] == "1":
        {"timm": convert_what_timm_builds, "transformers": convert_what_transformers_builds}[os.environ[LIBRARY]]()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if RECORD not in os.environ:
        return
    architectures: dict[str, set[str]] = {}
    for item in items:
        architectures.setdefault(item.originalname, set()).add(parameters(item).get("model_name", ""))
    kept = [item for item in items if is_wanted(item, len(architectures[item.originalname]))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def parameters(item: Any) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else dict(callspec.params)


def is_wanted(item: Any, architectures: int) -> bool:
    name = parameters(item).get("model_name")
    if architectures >= ALL_ARCHITECTURES:
        return name in ARCHITECTURES
    # These load weights from the hub.
    if "IntegrationTest" in item.nodeid or item.originalname == "test_model_inference":
        return False
    return os.environ[LIBRARY] != "timm" or re.search(LIKE_THESE, item.name) is not None


def pytest_runtest_setup() -> None:
    global seen
    seen = Seen()


def pytest_runtest_logreport(report: Any) -> None:
    if RECORD not in os.environ:
        return
    # Setup and teardown are told only where they decide.
    if report.when == "call" or report.outcome != "passed":
        line = {
            "test": report.nodeid.partition("::")[2],
            "outcome": report.outcome,
            "message": message_of(report),
            "converted": seen.converted,
            "sites": seen.sites,
            "refused": dict(seen.refused),
        }
        with open(os.environ[RECORD], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def message_of(report: Any) -> str:
    """The line that says what went wrong."""
    if report.outcome == "skipped":
        return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    return " ".join(text.split())[:300]


def converted(model: Any, **how: Any) -> Any:
    """The model converted, or as it is where nothing in it can be."""
    from armour_surgery import convert
    from armour_surgery.errors import ExampleInputError, NoAttentionError, NothingToConvertError

    if getattr(building, "depth", 0):
        return model
    try:
        with inside():  # `convert` builds models too
            try:
                model = convert(model, **how)
            except ExampleInputError:  # built with patches that the size in its configuration is no multiple of
                model = convert(model, example_input=(2, 3, 64, 64), **how)
    except (NoAttentionError, NothingToConvertError) as error:
        seen.refused[str(error)] += 1
        return model
    seen.converted += 1
    seen.sites += len(model.surgery.sites)
    seen.refused.update(site.reason for site in model.surgery.refused)
    return model


def convert_what_timm_builds() -> None:
    import timm
    import timm.models

    build = timm.create_model

    @functools.wraps(build)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        return converted(build(*args, **kwargs))

    timm.create_model = timm.models.create_model = create_model


def convert_what_transformers_builds() -> None:
    import transformers
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    @classmethod
    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # The checkpoint is of what was saved, and is not made smaller before it is read.
        with inside():
            return load(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = from_pretrained
    prefixes = tuple({"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}.get(name, name.title()) for name in FAMILIES)
    for name in dir(transformers):
        if re.match(rf"({'|'.join(prefixes)})(Model|Backbone|For)", name):
            cls = getattr(transformers, name)
            cls.__init__ = converting(cls.__init__)


def converting(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with inside():
            initialize(self, *args, **kwargs)
        converted(self, inplace=True)

    return __init__


@contextlib.contextmanager
def inside() -> Iterator[None]:
    building.depth = getattr(building, "depth", 0) + 1
    try:
        yield
    finally:
        building.depth -= 1


# The script: both runs, and what differs between them.


@dataclass
class Outcome:
    """What became of one test: the worst of its parts."""

    outcome: str = "passed"
    message: str = ""
    converted: int = 0
    sites: int = 0


# Why a test that passes on the original need not pass on the converted model: by its name and what it says.
REASONS = (
    (
        "",
        r"torch\.jit\.script cannot read",
        "TorchScript reads source files, and a generated forward has none: refused",
    ),
    (
        "dtype|can_|missing_keys|no_checkpoint|contiguous_weights|load_save|save_load",
        "v_proj|Running save/load and forward yields different results|`ignore_mismatched_sizes` to `False`",
        "`from_pretrained` builds the class of transformers, not converted; a converted model is kept with "
        "`armour_surgery.save` and `load`",
    ),
    ("reverse_loading_mapping", "v_proj", "asks for V's projection, which is gone"),
    (
        "compile",
        "sys._getframe",
        "compiled with fullgraph=True, a call of a new kind (other windows) has to be made once uncompiled before",
    ),
    (
        "checkpoint",
        "size mismatch for .*qkv.weight: copying a param",
        "the state of a converted model is read while the next one is built, which is before that can be converted",
    ),
)


def run_tests(library: str, checkout: Path, converted: bool, only: str, record: Path) -> dict[str, Outcome]:
    """What became of each test, told by `record`; they are run unless it is there."""
    if not record.exists():
        run_pytest(library, checkout, converted, only, record)
    outcomes: dict[str, Outcome] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        outcome = outcomes.setdefault(told["test"], Outcome())
        outcome.converted, outcome.sites = told["converted"], told["sites"]
        # Subtests are told one by one, and one that fails is what became of the test.
        if told["outcome"] == "failed" or outcome.outcome == "passed":
            if outcome.outcome != "failed":
                outcome.message = told["message"]
            outcome.outcome = told["outcome"]
    return outcomes


def run_pytest(library: str, checkout: Path, converted: bool, only: str, record: Path) -> None:
    here = Path(__file__).resolve().parent
    if library == "timm":
        files = ["tests/test_models.py"]
    else:
        files = [f"tests/models/{name}/test_modeling_{name}.py" for name in FAMILIES]
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-q", "-p", "no:cacheprovider", *files]
    environment = {
        **os.environ,
        RECORD: str(record),
        LIBRARY: library,
        CONVERTED: str(int(converted)),
        "TIMEOUT": "600",  # timm gives each test two minutes, and converting takes some of them
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run(command + (["-k", only] if only else []), cwd=checkout, env=environment, stdout=sys.stderr)


def reason_for(test: str, message: str) -> str:
    for name, pattern, reason in REASONS:
        if re.search(name, test) and re.search(pattern, message):
            return reason
    return f"not known: {message}"


@dataclass
class Compared:
    """The tests of one library in which something was converted, by what became of them."""

    library: str
    version: str
    alike: Counter[str]
    failing: list[tuple[str, str]]
    differing: list[tuple[str, Outcome, Outcome, str]]
    untouched: int
    models: int
    sites: int

    @property
    def unexplained(self) -> list[str]:
        """Tests that differ for a reason that is not in `REASONS`."""
        return [test for test, _, _, reason in self.differing if reason.startswith("not known")]


def compare(library: str, before: dict[str, Outcome], after: dict[str, Outcome]) -> Compared:
    compared = Compared(library, version(library), Counter(), [], [], 0, 0, 0)
    for test, outcome in after.items():
        original = before[test]
        if not outcome.converted and original.outcome == outcome.outcome:
            compared.untouched += 1
            continue
        compared.models += outcome.converted
        compared.sites += outcome.sites
        if original.outcome == outcome.outcome:
            compared.alike[outcome.outcome] += 1
            if outcome.outcome == "failed":
                compared.failing.append((test, original.message))
        else:
            compared.differing.append((test, original, outcome, reason_for(test, outcome.message)))
    return compared


def page(compared: list[Compared], command: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("armour-surgery", "torch", "timm", "transformers"))
    lines = [
        "# The libraries' own tests, on converted models",
        "",
        f"`{command}` on {versions}.",
        "",
        "Every model that a test builds was converted (mode auto) before the test saw it. Tests that build nothing",
        "that converts are left out.",
        "",
        "| library | tests | models converted in them | sites | pass on both | fail or are skipped on both | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in compared:
        alike = one.alike["failed"] + one.alike["skipped"]
        total = sum(one.alike.values()) + len(one.differing)
        numbers = (total, one.models, one.sites, one.alike["passed"], alike, len(one.differing))
        lines.append(f"| {one.library} | {' | '.join(f'{number:,}' for number in numbers)} |")
    for one in compared:
        lines += ["", f"## {one.library}", ""]
        by_reason: dict[tuple[str, str], list[str]] = {}
        for test, original, outcome, reason in one.differing:
            by_reason.setdefault((f"{original.outcome} → {outcome.outcome}", reason), []).append(test)
        lines += ["| original → converted | why | tests |", "|---|---|---|"]
        for (change, reason), tests in by_reason.items():
            lines.append(f"| {change} | {cell(reason)} | {', '.join(f'`{cell(test)}`' for test in sorted(tests))} |")
        if one.failing:
            lines += ["", "Failing on the original too:", ""]
            lines += [f"- `{test}`: {cell(message)[:160]}" for test, message in one.failing]
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timm", type=Path, metavar="CHECKOUT")
    parser.add_argument("--transformers", type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", default="", metavar="PART", help="only these tests, as pytest's -k")
    parser.add_argument("--outcomes", type=Path, metavar="FOLDER", help="keep what came out here, and read it again")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    compared = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.outcomes or Path(temporary)
        for library, checkout in (("timm", options.timm), ("transformers", options.transformers)):
            if checkout is not None:
                runs = [
                    run_tests(library, checkout, converted, options.only, folder / f"{library}-{name}.jsonl")
                    for name, converted in (("original", False), ("converted", True))
                ]
                compared.append(compare(library, *runs))
    given = "".join(f" --{one.library} CHECKOUT" for one in compared)
    text = page(compared, f"python benchmarks/their_tests.py{given}")
    print(text)
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    if unexplained := [test for one in compared for test in one.unexplained]:
        sys.exit(f"for no known reason: {', '.join(unexplained)}")


if __name__ == "__main__":
    main()
