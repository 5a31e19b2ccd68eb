"""The GPU: what torch sees, what the driver says, whether clocks are held back, and whether several of them talk.

The functions that take options run in processes of their own (see `isolate`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mvp_fast.doctor.row import Row, State, told

OLDEST_DRIVER = {13: 580, 12: 525}
"""Driver branch by CUDA's major version that torch is built for: the least that has it (NVIDIA's release notes)."""
REASONS = {
    0x04: "power limit (software)",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake (hardware)",
}
"""Bits of clocks_throttle_reasons.active that cost speed (NVML); the others are idleness and settings."""
_IDENTITY = ("index", "name", "driver_version", "memory.total", "persistence_mode", "mig.mode.current")
_CLOCKS = ("index", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.limit", "clocks_throttle_reasons.active")


def gpu_rows(options: dict[str, Any]) -> list[Row]:
    """GPU, driver, clocks, and NCCL where there are several."""
    smi = query(_IDENTITY)
    cards = [_seen(), _driver(smi)]
    if smi:
        cards.append(_clocks(smi))
    if cards[0].facts.get("count", 0) > 1:
        cards.append(_nccl())
    return cards


def query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; empty where there is none, or it does not know a field."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    lines = [[text.strip() for text in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]


def _seen() -> Row:
    """The GPUs that torch can use; a driver, or a device, without one is a fault."""
    try:
        import torch
    except (Exception, SystemExit) as error:
        return Row("GPU", State.NOTE, f"torch does not load, so none can be used ({told(error)})")
    if torch.cuda.is_available():
        return _usable()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        words = f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        return Row("GPU", State.NOTE, words, "training at a useful speed", "unset CUDA_VISIBLE_DEVICES")
    if not query(("index",)) and not any(Path("/dev").glob("nvidia[0-9]*")):
        fix = "an NVIDIA GPU of compute capability 8.0 or newer; in a container, start it with --gpus all"
        return Row("GPU", State.MISSING, "none", "training at a useful speed: the CPU is for trying things out", fix)
    try:
        torch.cuda.init()
        why = "torch does not say why"
    except Exception as error:
        why = told(error)
    wanted = OLDEST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]))
    fix = f"a driver of branch {wanted} or newer" if wanted else "a torch that is built for CUDA"
    return Row("GPU", State.BROKEN, f"there is one, but torch can't use it: {why}", "the GPU", fix)


def _usable() -> Row:
    import torch

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(number) for number in range(count)]
    names = sorted({f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}" for p in properties})
    facts = {"count": count, "name": properties[0].name, "memory_bytes": properties[0].total_memory}
    words = f"{count} x {' and '.join(names)}"
    try:
        for number in range(count):
            a_MM = torch.ones(256, 256, dtype=torch.bfloat16, device=f"cuda:{number}")
            if float((a_MM @ a_MM)[0, 0]) != 256:
                raise ArithmeticError(f"GPU {number} computes a product wrongly")
    except Exception as error:
        return Row("GPU", State.BROKEN, f"{words}: {told(error)}", "the GPU", "see nvidia-smi and the log", facts=facts)
    if any((p.major, p.minor) < (8, 0) for p in properties):
        loses, fix = "bf16 and the Triton kernels", "--train.precision fp32 --kernels.impl reference"
        return Row("GPU", State.NOTE, f"{words}: older than capability 8.0", loses, fix, facts=facts)
    if len(names) > 1:
        loses, fix = "speed: the slowest sets the pace of all", "CUDA_VISIBLE_DEVICES with those of one kind"
        return Row("GPU", State.NOTE, words, loses, fix, facts=facts)
    return Row("GPU", State.OK, words, facts=facts)


def _driver(smi: list[dict[str, str]]) -> Row:
    """The driver's version, and the CUDA version that it can serve."""
    version = smi[0]["driver_version"] if smi else ""
    file = Path("/proc/driver/nvidia/version")
    if not version and file.exists():
        version = file.read_text(errors="replace").splitlines()[0]
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            number.value = 0
    except (OSError, AttributeError):
        number.value = 0
    if not version and not number.value:
        words = "apt-get install nvidia-driver (Debian), or NVIDIA's installer"
        return Row("driver", State.MISSING, "NVIDIA's driver is not installed", "GPUs, where there are any", words)
    serves = f", serves CUDA {number.value // 1000}.{number.value % 1000 // 10}" if number.value else ""
    mig = sorted({card["mig.mode.current"] for card in smi} & {"Enabled"})
    words = f"{version or 'version unknown'}{serves}{', MIG is on' if mig else ''}"
    if not number.value:
        fix = "start the container with --gpus all, or install the driver's library libcuda.so.1"
        return Row("driver", State.BROKEN, f"{words}, but its library libcuda.so.1 does not answer", "the GPU", fix)
    return Row("driver", State.OK, words, facts={"version": version, "cuda": number.value, "mig": bool(mig)})


def _clocks(smi: list[dict[str, str]]) -> Row:
    """Whether something holds the clocks back now, and whether the driver stays loaded between processes."""
    found = query(_CLOCKS)
    if not found:
        return Row("GPU clocks", State.NOTE, "nvidia-smi does not tell them")
    held = [(card["index"], reasons_of(card["clocks_throttle_reasons.active"])) for card in found]
    first = found[0]
    words = f"{first['clocks.sm']} of {first['clocks.max.sm']} MHz, {first['temperature.gpu']} degrees C"
    words += f", power limit {first['power.limit']} W"
    off = [card["index"] for card in smi if card["persistence_mode"] == "Disabled"]
    told_of = [f"GPU {index} is held back: {', '.join(reasons)}" for index, reasons in held if reasons]
    if told_of:
        fix = "better cooling, a higher power limit (nvidia-smi -pl), or nothing where another job loads it now"
        return Row("GPU clocks", State.NOTE, f"{words}; {'; '.join(told_of)}", "speed, and steady timings", fix)
    if off:
        loses = "a second or more at each process's start: the driver is loaded anew"
        return Row("GPU clocks", State.NOTE, f"{words}; persistence mode is off", loses, "nvidia-smi -pm 1")
    return Row("GPU clocks", State.OK, f"{words}; nothing holds them back")


def reasons_of(mask: str) -> list[str]:
    """The words for a mask such as 0x0000000000000024; none where it can't be read."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return []
    return [words for bit, words in REASONS.items() if bits & bit]


def _nccl() -> Row:
    """One sum over all GPUs by NCCL, in one process."""
    import torch

    fix = "NCCL_DEBUG=INFO torchrun ... shows what fails; a container needs --shm-size 8g or --ipc host"
    try:
        import torch.cuda.nccl as nccl

        version = ".".join(map(str, nccl.version()))
        count = torch.cuda.device_count()
        parts = [torch.full((1024,), float(number + 1), device=f"cuda:{number}") for number in range(count)]
        nccl.all_reduce(parts)
        if any(float(part[0]) != count * (count + 1) / 2 for part in parts):
            raise ArithmeticError(f"a sum over {count} GPUs is wrong")
    except Exception as error:
        return Row("NCCL", State.BROKEN, told(error), "runs on several GPUs", fix)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if not all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs):
        words = f"{version}, sums over {count} GPUs, but not all reach each other's memory"
        return Row("NCCL", State.NOTE, words, "speed on several GPUs: sums go through the host")
    return Row("NCCL", State.OK, f"{version}, sums over {count} GPUs")
