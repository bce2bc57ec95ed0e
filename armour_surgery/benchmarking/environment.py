"""Where something was measured: what of this machine and of the installed versions decides how fast a model is."""

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Environment", "environment"]

# Instruction sets that matrix products are written for.
_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "fphp", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
    "sve2",
)  # fmt: skip
_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Environment:
    """Where something was measured.

    `threads` is how many threads torch uses inside an operator, `affinity` which of the machine's `cores` this process
    may run on (empty where the system does not tell). `cpu_flags` are those of the processor's instruction sets that
    matter here, `cpu_capability` the one that torch's own kernels use. `load` is the system's load average over the
    last minute when this was made, None where there is none. `commit` is the checkout of this project that the code ran
    from, with `-dirty` if it was changed; None for an installed package. `driver` is that of the accelerator.
    """

    device: str
    processor: str
    cores: int
    threads: int
    torch: str
    timm: str
    python: str
    system: str
    transformers: str = "not installed"
    onnxruntime: str = "not installed"
    openvino: str = "not installed"
    armour_surgery: str = "not installed"
    commit: str | None = None
    affinity: tuple[int, ...] = ()
    cpu: str = ""
    cpu_flags: tuple[str, ...] = ()
    cpu_capability: str = ""
    matmul_precision: str = "highest"
    driver: str | None = None
    load: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "affinity": list(self.affinity), "cpu_flags": list(self.cpu_flags)}


def environment(device: torch.device | str = "cpu") -> Environment:
    """This machine and the versions that matter, for whoever reads the numbers later."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    cpu = _cpu_fields()
    name = cpu.get("model name") or platform.processor() or platform.machine()
    # x86 has flags, ARM has Features.
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return Environment(
        device=device.type,
        processor=torch.cuda.get_device_name(device) if cuda else name,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=_version("timm"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        transformers=_version("transformers"),
        onnxruntime=_version("onnxruntime"),
        openvino=_version("openvino"),
        armour_surgery=_version("armour-surgery"),
        commit=_commit(),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        cpu=name,
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        matmul_precision=torch.get_float32_matmul_precision(),
        driver=_driver() if cuda else None,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _cpu_fields() -> dict[str, str]:
    """What Linux tells about the first processor, by name; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    fields = {}
    for line in first.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    if not (_CHECKOUT / ".git").exists():
        return None
    # No tags: a commit of a checkout is what others can look up.
    describe = ("git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return _first_line(describe)


def _driver() -> str | None:
    return _first_line(("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))


def _first_line(command: tuple[str, ...]) -> str | None:
    """The first line that a program prints; None where it is missing, fails, or says nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None
