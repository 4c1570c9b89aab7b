"""What this machine has for kdcache: versions, devices, extras, cores and the disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from kdcache.core.command_result import Report
from kdcache.core.commands import DoctorArgs
from kdcache.core.errors import StorageError
from kdcache.core.system import core_count

# Extra, and the modules that it brings.
EXTRAS = {
    "cloud": ("obstore",),
    "demo": ("sklearn",),
    "hf": ("transformers", "tokenizers"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "plots": ("matplotlib",),
    "safetensors": ("safetensors",),
    "tensorboard": ("tensorboard",),
    "text": ("tokenizers",),
    "timm": ("timm",),
}
_PACKAGES = ("kdcache", "torch", "torchvision", "zarr", "numcodecs", "numpy", "crc32c")
_PROBE_BYTES = 64 << 20


def examine(settings: DoctorArgs) -> Report:
    """Look at everything, and name what is wrong.

    Raises:
        StorageError: the path cannot be written.
    """
    problems: list[str] = []
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": core_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "extras": {
            name: [m for m in modules if importlib.util.find_spec(m) is None] for name, modules in EXTRAS.items()
        },
        "torch": _torch(problems),
        "disk": _disk(Path(settings.path)),
        "problems": problems,
    }
    for name, version in data["packages"].items():
        if version is None:
            problems.append(f"{name} is not installed: pip install kdcache brings it")
    return Report(data, _text(data), exit_code=1 if problems else 0)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(problems: list[str]) -> dict[str, Any]:
    """Builds and devices. A torchvision of another build fails as it is imported, which is what a doctor is for."""
    try:
        import torch
    except Exception as problem:
        problems.append(f"torch cannot be imported: {type(problem).__name__}: {problem}")
        return {}
    found: dict[str, Any] = {"build": torch.__version__, "threads": torch.get_num_threads()}
    try:
        import torchvision  # type: ignore[import-untyped]

        found["torchvision_build"] = torchvision.__version__
        builds = [version.partition("+")[2] for version in (torch.__version__, torchvision.__version__)]
        if all(builds) and builds[0] != builds[1]:
            problems.append(
                f"torch is built for {builds[0]}, torchvision for {builds[1]}: install both from one index, together"
            )
    except Exception as problem:
        problems.append(
            f"torchvision cannot be imported: {type(problem).__name__}: {problem}. torch and torchvision are of "
            "different builds: install both from one index, together"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found["device"] = accelerator.type if accelerator else "cpu"
    found["devices"] = []
    if accelerator is not None and accelerator.type == "cuda":
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found["devices"].append({"name": device.name, "memory_bytes": device.total_memory})
    return found


def _disk(path: Path) -> dict[str, Any]:
    """Free room, and how fast a file is written durably and read back."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".kdcache-doctor-") as file:
            began = time.perf_counter()
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):  # out of memory, so that the disk is read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(len(block)):
                pass
            read = time.perf_counter()
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        raise StorageError(
            f"{folder} cannot be written: {problem.strerror}", "a folder for caches", "name another path"
        ) from problem
    return {
        "path": str(folder),
        "free_bytes": free,
        "write_bytes_per_s": round(_PROBE_BYTES / (written - began)),
        "read_bytes_per_s": round(_PROBE_BYTES / (read - written)),
    }


def _text(data: dict[str, Any]) -> str:
    torch, disk = data["torch"], data["disk"]
    lines = [f"python {data['python']} on {data['platform']}, {data['cores']} cores"]
    lines += [f"  {name:<12} {version or 'MISSING'}" for name, version in data["packages"].items()]
    if torch:
        lines.append(
            f"torch build {torch['build']}, torchvision build {torch.get('torchvision_build', 'not importable')}, "
            f"{torch['threads']} threads; --device auto is {torch['device']}"
        )
        lines += [f"  {each['name']}, {each['memory_bytes'] / 2**30:.0f} GiB" for each in torch["devices"]]
    for name, missing in data["extras"].items():
        state = f'missing {", ".join(missing)}: pip install "kdcache[{name}]"' if missing else "present"
        lines.append(f"extra {name:<12} {state}")
    lines.append(
        f"disk at {disk['path']}: {disk['free_bytes'] / 2**30:,.1f} GiB free, writes "
        f"{disk['write_bytes_per_s'] / 1e6:,.0f} MB/s, reads {disk['read_bytes_per_s'] / 1e6:,.0f} MB/s"
    )
    lines += [f"PROBLEM: {problem}" for problem in data["problems"]] or ["no problem found"]
    return "\n".join(lines)
