"""The machine around the GPU: cores, memory, limits, and room for runs. Linux's own files say it all.

The functions that take options run in a process of their own (see `isolate`). Under control groups the least of a
group's and its parents' limits holds; both versions' files are read.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvp_fast.doctor.row import Row, State

FILES = 4096
"""Open files that a run should be allowed: threads that read, shards, several ranks' pipes."""
SHARED_MEMORY = 2**30
"""Bytes below which NCCL between several GPUs of a machine is known to fail: containers start with 64 MiB."""
ROOM = 8 * 10**9
"""Bytes that a B/16 run can need: 86 M weights and two averages in float32 make 1.03 GB a checkpoint. Three are kept
while another is written, and averaged weights add a third."""
UNLIMITED = 2**60  # version 1 of control groups says "no limit" by a number near 2^63


def machine_rows(options: dict[str, Any]) -> list[Row]:
    """Cores, memory, shared memory, open files, and room where the runs go."""
    return [cores(), memory(), shared_memory(), open_files(), room(Path(options["runs"]))]


def cores() -> Row:
    """The cores that this process may use: by affinity and by its group's quota of time."""
    there, mine, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), core_quota()
    facts = {"machine": there, "affinity": mine, "quota": quota}
    words = f"{mine} of the machine's {there} for this process" if mine < there else f"{mine}"
    if quota is not None and quota < mine:
        fix = f"--data.threads {max(1, int(quota))} a rank, or raise the quota (docker --cpus, a pod's cpu limit)"
        loses = "steady loading: a thread a core is started, and the quota halts all of them together"
        return Row("cores", State.NOTE, f"{words}, but a quota of {quota:.3g} cores' time", loses, fix, facts=facts)
    return Row("cores", State.OK, words, facts=facts)


def core_quota(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that control groups allow this process; None without a limit."""
    quotas = []
    for folder in _folders(root, groups, "cpu"):
        text = _read(folder / "cpu.max").split()
        if len(text) == 2 and text[0] != "max":
            quotas.append(int(text[0]) / int(text[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory() -> Row:
    """Main memory: there, free, and allowed."""
    sizes = {line.partition(":")[0]: line.split()[1] for line in _read(Path("/proc/meminfo")).splitlines()}
    there, free = int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024
    limit = memory_limit()
    words = f"{there / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    facts = {"total_bytes": there, "available_bytes": free, "limit_bytes": limit}
    if limit is not None and limit < there:
        words += f", {limit / 2**30:.1f} allowed to this group of processes"
    if min(free, limit or free) < 4 * 2**30:
        loses = "runs beyond small ones: a B/16 run takes some GiB of main memory a rank"
        return Row("memory", State.NOTE, words, loses, "end other processes, or raise the limit", facts=facts)
    return Row("memory", State.OK, words, facts=facts)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that control groups allow this process; None without a limit."""
    limits = []
    for folder in _folders(root, groups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit() and int(text) < UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


def _folders(root: Path, groups: Path, controller: str) -> Iterator[Path]:
    """This process's group and those above it. In a container the path may be one of the host's, not to be seen."""
    for line in _read(groups).splitlines():
        number, names, path = line.split(":", 2)
        if number == "0":
            mounts = [root, root / "unified"]
        elif controller in names.split(","):
            mounts = [root / names, root / controller]
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            yield from (part for part in (folder, *folder.parents) if part.is_relative_to(mount))


def shared_memory() -> Row:
    """/dev/shm, through which ranks on one machine speak."""
    try:
        there = shutil.disk_usage("/dev/shm")
    except OSError:
        return Row("shared memory", State.NOTE, "/dev/shm is missing", "several ranks on this machine", "mount a tmpfs")
    words = f"{there.total / 2**30:.1f} GiB, {there.free / 2**30:.1f} free"
    if there.free < SHARED_MEMORY:
        loses, fix = "several ranks on this machine (NCCL)", "docker run --shm-size 8g, or --ipc host"
        return Row("shared memory", State.NOTE, words, loses, fix)
    return Row("shared memory", State.OK, words)


def open_files() -> Row:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < FILES:
        fix = f"ulimit -n {FILES if hard == resource.RLIM_INFINITY else min(max(FILES, soft), hard)}"
        return Row("open files", State.NOTE, words, "runs with many threads or shards may end for it", fix)
    return Row("open files", State.OK, words)


def room(runs: Path) -> Row:
    """Free space, and the right to write, where runs go."""
    there = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Row("room for runs", State.BROKEN, f"{there} can't be written", "runs there", "--run.dir elsewhere")
    free = shutil.disk_usage(there).free
    words = f"{free / 1e9:.1f} GB free in {there}"
    if free < ROOM:
        loses = f"checkpoints: a B/16 run can need {ROOM / 1e9:.0f} GB"
        return Row("room for runs", State.NOTE, words, loses, "--run.dir on another disk", facts={"free_bytes": free})
    return Row("room for runs", State.OK, words, facts={"free_bytes": free})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
