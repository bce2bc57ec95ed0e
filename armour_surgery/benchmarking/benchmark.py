"""How fast models are beside each other, all of them treated alike: `benchmark`.

A model becomes a subject (deployed, moved, compiled, with an example of what it takes); subjects are counted, timed in
turns at every batch size by `speed.compare`, and profiled. `results` has the records of that, `files` writes them.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.benchmarking.environment import environment
from armour_surgery.benchmarking.memory import held_bytes, peak_growth
from armour_surgery.benchmarking.operators import Profile, profile_call
from armour_surgery.benchmarking.results import BatchSpeed, Benchmark, ModelCost, Settings
from armour_surgery.benchmarking.speed import compare, keep_memory, many_compiled
from armour_surgery.calls import given_in_order
from armour_surgery.copies import full_copy
from armour_surgery.deployment.pipeline import RUNTIMES, deploy
from armour_surgery.devices import usable_device
from armour_surgery.errors import BenchmarkError, ExampleInputError, NothingToDeployError, UsageError
from armour_surgery.examples import on_meta, with_numbers
from armour_surgery.exporting.onnx import load_onnx, write_onnx
from armour_surgery.exporting.openvino import load_openvino
from armour_surgery.exporting.packages import require
from armour_surgery.hosts.wrappers import refuse_wrapped
from armour_surgery.measure.cost import count_macs, count_params
from armour_surgery.progress import told
from armour_surgery.records import Progress
from armour_surgery.surgery.targets import Example, plain_example_of

__all__ = ["DTYPES", "ROUNDS", "RUNTIMES", "benchmark"]

RunsInputs = Callable[[dict[str, Tensor]], list[Tensor]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = 300

_MIB = 2**20
_PERCENT = 100


@dataclass(frozen=True)
class _Subject:
    """A model as it is timed: `run` is `module`, compiled or not; `example` has meta tensors of what it takes.

    `loaded` gives what runs it in another runtime, prepared for a batch size.
    """

    name: str
    module: nn.Module
    run: Callable[..., Any]
    example: dict[str, Tensor]
    device: torch.device
    loaded: Callable[[int], RunsInputs] | None = None

    def caller(self, batch_size: int) -> Callable[[Tensor], Any]:
        """The model as a function of images; a model that takes images of another size has its own."""
        inputs = {name: _random(value, batch_size, self.device) for name, value in self.example.items()}
        argument, own = next(iter(inputs.items()))
        if self.loaded is not None:
            run = self.loaded(batch_size)
            return lambda images: run({**inputs, argument: images if images.shape == own.shape else own})
        in_order = given_in_order(self.module, inputs)

        def call(images: Tensor) -> Any:
            by_name = {**inputs, argument: images if images.shape == own.shape else own}
            return self.run(*[by_name.pop(name) for name in in_order], **by_name)

        return call

    def images(self, batch_size: int) -> Tensor:
        """A batch of noise that fits the model."""
        return _random(next(iter(self.example.values())), batch_size, self.device)


def benchmark(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (16,),
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    compile: bool = False,
    deploy: bool = False,
    profile: bool = False,
    rounds: int = ROUNDS,
    budget_s: float = 40.0,
    threads: int | None = None,
    example_input: Example | None = None,
    keep_freed_memory: bool = False,
    inplace: bool = False,
    progress: Progress | bool | None = None,
    runtime: str = "torch",
) -> Benchmark:
    """Time models in turns against the first of them, at every batch size and for one image alone.

    Every model gets the same: eval mode, `deploy` (BatchNorm folded, and so on), the dtype, `torch.compile` for exactly
    the sizes that are run, and images of noise. The first model also gets a double, a copy with memory of its own that
    is treated and timed like the others: what those two differ by is noise. 16 times during the rounds all weights move
    to other memory, so that a lucky place does not count for a model.

    Args:
        models: by name; they are copied, and stay as they are.
        batch_sizes: 1 is added to them.
        device: `cpu`, `cuda`, another that torch knows, or `auto`: CUDA where there is one.
        dtype: `fp32`, `bf16` or `fp16`, of weights and inputs.
        profile: also tell where the time goes at the largest batch size, operator by operator.
        rounds: an even number, at most so many at each batch size.
        budget_s: seconds of timing at each batch size.
        threads: torch's threads inside an operator while it runs; as many as before if it is not given.
        example_input: what all models take, for models of your own; see `convert`. Where it is not given, and a model's
            input is not known, it gets what the first one takes.
        keep_freed_memory: change this process for good, so that freed memory is not given back; see
            `speed.keep_memory`. The ratios are much steadier.
        inplace: use the models themselves instead of copies.
        runtime: `torch`, `compile` (as `compile`), or `onnx` (ONNX Runtime) and `openvino`, on the CPU in fp32, with
            a graph for exactly the batch size that is run, and threads that do not spin.
        progress: True shows a bar (tqdm, also in notebooks); a function is called with what is being done, how much of
            it is done, and how much there is. Neither does anything while a model is timed.

    Raises:
        UsageError: there is no model, a wrapper is around one, or a number, dtype, device or `progress` is none that
            there is.
        ExampleInputError: nobody knows what to feed the first model.
        ExportError: a package that the runtime needs is not installed.
        BenchmarkError: a model does not compile or run with this dtype, device and batch size; the message names it.
    """
    place = _check(models, batch_sizes, device, dtype, threads)
    compile = compile or runtime == "compile"
    _check_runtime(runtime, place, dtype, compile=compile, profile=profile)
    kept = keep_memory() if keep_freed_memory else False
    settings = Settings(dtype, compile, deploy, rounds, budget_s, kept, "torch" if compile else runtime)
    first = next(iter(models))
    double = f"{first} again"
    while double in models:
        double += " again"
    given = {name: model if inplace else full_copy(model) for name, model in models.items()}
    # A copy in any case: that it has memory of its own is what the double is for.
    given[double] = full_copy(models[first])
    with (
        told(progress) as reported,
        _threads(threads),
        many_compiled() if compile else nullcontext(),
        tempfile.TemporaryDirectory() as files,
    ):
        tell = reported or (lambda what, done, total: None)
        everyone: list[_Subject] = []
        for name, model in given.items():
            takes = _example_of(model, example_input, everyone[0].example if everyone else None)
            tell("preparing", len(everyone), len(given))
            # The double is the first model again: the same graph, loaded once more.
            graph = Path(files) / f"{0 if name == double else len(everyone)}.onnx"
            everyone.append(_subject(name, model, settings, place, takes, graph))
        # The double is timed and nothing else.
        subjects = everyone[:-1]
        costs = []
        for number, subject in enumerate(subjects):
            tell("counting", number, len(subjects))
            macs = count_macs(subject.module, subject.example).macs
            costs.append(ModelCost(subject.name, count_params(subject.module), macs))
        here = environment(place)
        batches = [_at_batch(everyone, size, settings, tell) for size in sorted({1, *batch_sizes})]
        profiles = []
        for number, subject in enumerate(subjects if profile else ()):
            tell("profiling", number, len(subjects))
            profiles.append(_profile(subject, batches[-1].batch_size))
    return Benchmark(here, settings, tuple(costs), tuple(batches), tuple(profiles))


def _check(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    device: torch.device | str,
    dtype: str,
    threads: int | None,
) -> torch.device:
    """Refuse what is never right; the device."""
    if not models:
        raise UsageError("nothing to time: no model was given")
    for model in models.values():
        refuse_wrapped(model)
    for size in batch_sizes:
        if size < 1:
            raise UsageError(f"a batch size must be 1 or more, not {size}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, not {threads}")
    return usable_device(device, f"device {str(device)!r}")


def _check_runtime(runtime: str, device: torch.device, dtype: str, *, compile: bool, profile: bool) -> None:
    """Refuse what a runtime does not do, and one that is not there."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime {runtime!r} is none; choose {', '.join(RUNTIMES)}")
    if runtime in ("torch", "compile"):
        return
    for option, asked in (("compile", compile), ("profile", profile)):
        if asked:
            raise UsageError(f"{option} is for torch, not for the runtime {runtime}; leave one of them out")
    if device.type != "cpu" or dtype != "fp32":
        raise UsageError(f"the runtime {runtime} is timed on cpu in fp32, not on {device.type} in {dtype}")
    require(runtime)


def _example_of(model: nn.Module, given: Example | None, of_first: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What a model takes; where nobody knows, what the first one takes: they are held against each other."""
    try:
        example = plain_example_of(model, given)
    except ExampleInputError:
        if of_first is None:
            raise
        # One tensor goes to whatever a forward calls its first argument.
        example = plain_example_of(model, of_first if len(of_first) > 1 else next(iter(of_first.values())))
    return on_meta(example)


def _subject(
    name: str, model: nn.Module, settings: Settings, device: torch.device, example: dict[str, Tensor], file: Path
) -> _Subject:
    if settings.deployed:
        model = _deployed(model, "compile" if settings.compiled else settings.runtime, example)
    dtype = DTYPES[settings.dtype]
    # Training drops what a host computed and keeps for eval, which would stay in its old type (LeViT's biases).
    model = model.to(device=device, dtype=dtype).train().eval()
    example = {key: value.to(dtype) if value.is_floating_point() else value for key, value in example.items()}
    # Without `dynamic=False` the second batch size would get code for any size, and the first code for its own.
    run = torch.compile(model, dynamic=False) if settings.compiled else model
    loaded = None
    if settings.runtime != "torch":
        if not file.exists():
            write_onnx(model, with_numbers(example, device), file, {"model": name}, any_size=False)
        load = load_onnx if settings.runtime == "onnx" else load_openvino
        threads = torch.get_num_threads()

        def loaded(batch_size: int) -> RunsInputs:
            return load(file, threads, batch_size)

    return _Subject(name, model, run, example, device, loaded)


def _deployed(model: nn.Module, runtime: str, example: dict[str, Tensor]) -> nn.Module:
    if hasattr(model, "deployment"):
        return model  # the caller did it
    try:
        deployed: nn.Module = deploy(model, runtime=runtime, example_input=example, inplace=True)
    except NothingToDeployError:
        return model  # nothing to fold is as good as folded
    return deployed


def _at_batch(subjects: Sequence[_Subject], size: int, settings: Settings, tell: Progress) -> BatchSpeed:
    device = subjects[0].device
    calls = {subject.name: subject.caller(size) for subject in subjects}
    images = subjects[0].images(size)
    compile_s: dict[str, float] = {}
    peak_mib: dict[str, float | None] = {}
    for number, subject in enumerate(subjects):
        tell(f"{'compiling' if settings.compiled else 'trying'}, batch {size}", number, len(subjects))
        compile_s[subject.name] = _first_call(subject, calls[subject.name], images, settings)
    # After all first calls, so that nothing that is set up once counts for the model that happens to need it first.
    for subject in subjects:
        with torch.inference_mode():
            growth = peak_growth(partial(calls[subject.name], images), device)
        peak_mib[subject.name] = None if growth is None else (held_bytes(subject.module) + growth) / _MIB

    def before_block(done: float) -> None:
        tell(f"timing, batch {size}", int(_PERCENT * done), _PERCENT)
        for subject in subjects if settings.runtime == "torch" else ():
            _move_weights(subject.module)
        # The first call after a move reads memory that no cache has seen, and is not one to be timed.
        for call in calls.values():
            call(images)

    tell(f"warming up, batch {size}", 0, _PERCENT)
    report = compare(
        calls,
        lambda: torch.randn_like(images),
        rounds=settings.rounds,
        budget_s=settings.budget_s,
        before_block=before_block,
    )
    # The double came last.
    *pairs, noise = report.pairs
    return BatchSpeed(
        size,
        report.models[:-1],
        tuple(pairs),
        noise,
        peak_mib,
        compile_s if settings.compiled else {},
    )


def _first_call(subject: _Subject, call: Callable[[Tensor], Any], images: Tensor, settings: Settings) -> float:
    """Run once, with whatever is compiled at that; the seconds."""
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            call(images)
            if subject.device.type != "cpu":
                torch.accelerator.synchronize(subject.device)
    except Exception as error:
        # Compilers and kernels raise whatever they run into.
        asked = f"on {subject.device.type} in {settings.dtype}, batch size {len(images)}"
        hint = (
            "leave compiling out" if settings.compiled else
            "take fp32" if settings.dtype != "fp32" else
            "a smaller batch may do if it was memory"
        )  # fmt: skip
        what = "compile and run" if settings.compiled else "run"
        raise BenchmarkError(
            f"{subject.name} does not {what} {asked}: {type(error).__name__}: {str(error).strip()[:400]}; {hint}"
        ) from error
    return time.perf_counter() - started


def _profile(subject: _Subject, size: int) -> Profile:
    call = partial(subject.caller(size), subject.images(size))
    return profile_call(subject.name, size, call, subject.device)


def _move_weights(module: nn.Module) -> None:
    """Copy all weights to other memory; what shares memory goes on sharing it."""
    # The new storage by the address of the old one.
    moved: dict[int, torch.UntypedStorage] = {}
    with torch.inference_mode(mode=False), torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if type(tensor.data) is not Tensor or tensor.layout is not torch.strided or tensor.is_inference():
                continue  # packed for a kernel, and not ours to take apart
            # A tensor is a view of its storage, and all views of one storage move together.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in moved:
                moved[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
            place = (moved[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)


def _random(value: Tensor, batch_size: int, device: torch.device) -> Tensor:
    shape = (batch_size, *value.shape[1:]) if value.ndim else ()
    if value.is_floating_point():
        return torch.randn(shape, dtype=value.dtype, device=device)
    return torch.zeros(shape, dtype=value.dtype, device=device)  # 0 is a token, an index and a mask everywhere


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
