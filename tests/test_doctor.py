"""`mvp-fast doctor`: on this machine as it is, and with real packages that are broken put before the good ones."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mvp_fast.doctor import disk, gpu, machine
from mvp_fast.doctor.disk import Piece, find_pieces, measure
from mvp_fast.doctor.isolate import Check, run
from mvp_fast.doctor.packages import check_pixels, small_jpeg
from mvp_fast.doctor.report import CHECKS, judge
from mvp_fast.doctor.row import Row, State, install
from mvp_fast.errors import DataError
from tests.conftest import run_verb
from tests.test_apex import NVIDIAS, OTHER, path_first, write

GPU = torch.cuda.is_available()
PARTS = [
    *("GPU", "driver", "torch", "torchvision", "Triton", "DALI", "nvImageCodec", "timm", "open_clip", "libraries"),
    *("FFCV", "apex", "wandb", "cores", "memory", "shared memory", "open files", "room for runs", "data"),
]


def check_in(folder: Path, part: str, timeout: float = 300) -> Row:
    """The first row of one check, in a process that has `folder` first on its path."""
    code = (
        "import json, sys\nfrom mvp_fast.doctor.isolate import run\nfrom mvp_fast.doctor.report import CHECKS\n"
        "check = next(check for check in CHECKS if check.part == sys.argv[1])\n"
        "print(json.dumps(run(check, {'data': '', 'runs': '.'}, float(sys.argv[2]))[0].as_dict()))"
    )
    words = [sys.executable, "-c", code, part, str(timeout)]
    done = subprocess.run(words, capture_output=True, text=True, env=path_first(folder), timeout=600)
    assert done.returncode == 0, done.stderr
    return Row.from_dict(json.loads(done.stdout.splitlines()[-1]))


# --- The whole verb


@pytest.fixture(scope="module")
def here(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What it prints and writes on this machine as it is."""
    out = tmp_path_factory.mktemp("doctor") / "found.json"
    done = run_verb("doctor", "--data", scenes, "--json", out, check=False)
    found = json.loads(out.read_text())
    assert done.returncode == (0 if found["can_train"] else 4), done.stderr
    return done.stdout, found


def row_of(found: dict[str, Any], part: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["part"] == part)


def test_every_part_has_its_row(here: tuple[str, dict[str, Any]]) -> None:
    shown, found = here
    parts = [row["part"] for row in found["rows"]]
    assert [part for part in PARTS if part not in parts] == []
    assert all(part in shown for part in PARTS)
    assert all(row["found"] for row in found["rows"])
    for row in found["rows"]:
        wanting = row["state"] in ("missing", "broken")
        assert not wanting or (row["loses"] and row["fix"]), f"{row['part']} says no remedy"
        assert row["state"] != "ok" or not row["fix"]


def test_this_machine_can_train(here: tuple[str, dict[str, Any]]) -> None:
    """It does so in the other tests. What each part says is what those who use it get."""
    shown, found = here
    assert found["can_train"]
    assert shown.splitlines()[-1] == found["verdict"]
    assert found["verdict"].startswith("This machine can train: ")
    working = ["torch", "torchvision", "Triton", "DALI", "nvImageCodec", "timm", "open_clip", "libraries", "data"]
    assert {part: row_of(found, part)["state"] for part in working[:-1]} == dict.fromkeys(working[:-1], "ok")
    assert row_of(found, "data")["state"] in ("ok", "note")
    facts = row_of(found, "torch")["facts"]
    assert facts["device"] == ("cuda" if GPU else "cpu")
    assert facts["loader"] == ("dali on the GPU (hardware decoder load 0.65)" if GPU else "cpu") + ", chosen by auto"
    assert facts["kernels"] == ("triton" if GPU else "reference")
    assert facts["loader"] in found["verdict"]
    assert torch.__version__ in row_of(found, "torch")["found"]
    needed = {row["part"] for row in found["rows"] if row["needed"]}
    assert needed >= {"torch", "torchvision", "timm", "open_clip", "libraries", "data"}
    assert ("DALI" in needed, "Triton" in needed, "nvImageCodec" in needed) == (GPU, GPU, not GPU)
    if not GPU:
        assert "interpreter" in row_of(found, "Triton")["found"]
        assert "on the CPU" in found["verdict"]


def test_the_data_were_read(here: tuple[str, dict[str, Any]], scenes: Path) -> None:
    facts = row_of(here[1], "data")["facts"]
    assert facts["images"] == 96
    size = sum(path.stat().st_size for path in scenes.rglob("*.jpg"))
    assert facts["bytes_per_second"] * facts["seconds"] == pytest.approx(size)


def test_broken_packages_each_take_one_row(tmp_path: Path) -> None:
    """One raises, one ends the process, one crashes it, one is another project: the others are told all the same."""
    files = {
        "open_clip/__init__.py": "raise RuntimeError('built for another torch')\n",
        "wandb.py": "raise SystemExit('no licence')\n",
        "triton/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        **OTHER,
    }
    out = tmp_path / "found.json"
    environment = {"PYTHONPATH": str(write(tmp_path / "path", files))}
    done = run_verb("doctor", "--json", out, check=False, env=environment, cwd=tmp_path)
    found = json.loads(out.read_text())
    assert done.returncode == 4
    assert "Traceback" not in done.stdout + done.stderr
    rows = {part: row_of(found, part) for part in ("open_clip", "wandb", "Triton", "apex", "timm", "nvImageCodec")}
    assert "RuntimeError: built for another torch" in rows["open_clip"]["found"]
    assert "SystemExit: no licence" in rows["wandb"]["found"]
    assert "ended by SIGSEGV" in rows["Triton"]["found"]
    assert [rows[part]["state"] for part in ("open_clip", "wandb", "Triton")] == ["broken"] * 3
    assert "another project of that name" in rows["apex"]["found"]
    assert "pip uninstall apex" in rows["apex"]["fix"]
    assert rows["nvImageCodec"]["state"] == "ok"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("This machine can't train with the default settings: ")
    assert "open_clip is broken" in last
    assert "wandb" not in last
    assert "'open_clip_torch>=3.2'" in done.stdout, "the command is whole: not wrapped, not cut"
    assert f"{tmp_path}" in row_of(found, "room for runs")["found"]


def test_a_wrong_option_and_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    assert run_verb("doctor", "--dta", "x", check=False).returncode == 2


# --- Single parts, broken or missing


@pytest.mark.parametrize(
    ("part", "files", "says"),
    [
        (
            "torch",
            {"torch/__init__.py": "raise OSError('libcudart.so.13: cannot open shared object file')"},
            "libcudart",
        ),
        ("torchvision", {"torchvision/__init__.py": "raise RuntimeError('operator nms does not exist')"}, "nms"),
        (
            "DALI",
            {"nvidia/__init__.py": "", "nvidia/dali/__init__.py": "raise ImportError('GLIBC_2.99')"},
            "GLIBC_2.99",
        ),
        ("timm", {"timm/__init__.py": "import not_there"}, "not_there"),
        ("timm", {"timm/__init__.py": "__version__ = '0.1'"}, "is_model"),
        ("libraries", {"pyarrow/__init__.py": "raise ImportError('numpy 1.x')"}, "pyarrow does not load: ImportError"),
        ("apex", {**NVIDIAS, "amp_C.py": "raise ImportError('undefined symbol')"}, "undefined symbol"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_package(tmp_path: Path, part: str, files: dict[str, str], says: str) -> None:
    row = check_in(write(tmp_path, files), part)
    assert (row.part, row.state) == (part, State.BROKEN)
    assert says in row.found
    assert row.loses
    assert row.fix


def test_an_ffcv_whose_library_is_gone(tmp_path: Path) -> None:
    row = check_in(write(tmp_path, {"ffcv/__init__.py": ""}), "FFCV")
    assert row.state is State.BROKEN
    assert "its library does not load" in row.found
    assert "make install" in row.fix


def test_an_nvidia_apex_without_its_compiled_part_is_missing_it(tmp_path: Path) -> None:
    row = check_in(write(tmp_path, NVIDIAS), "apex")
    assert (row.state, row.facts["kind"]) == (State.MISSING, "python_only")
    assert "APEX_CUDA_EXT=1" in row.fix


def test_a_missing_package_comes_with_its_command(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['wandb'] = None\n"
    row = check_in(write(tmp_path, {"sitecustomize.py": code}), "wandb")
    assert (row.state, row.found) == (State.MISSING, "not installed")
    assert row.fix.endswith("'wandb>=0.21'")
    assert sys.executable in row.fix


def test_commands_name_the_version_that_is_asked_for() -> None:
    assert install("nvidia_dali-cuda130", "--force-reinstall").endswith(
        "install --force-reinstall 'nvidia-dali-cuda130>=2.0'"
    )
    assert install("something-else").endswith("install 'something-else'")


def test_a_decoder_with_wrong_pixels_would_be_noticed() -> None:
    data, image_HWC = small_jpeg(64, 48)
    assert data[:2] == b"\xff\xd8"
    check_pixels(image_HWC, image_HWC)
    for wrong_HWC in (image_HWC[:, ::-1], image_HWC[:, :, ::-1], image_HWC * 0, image_HWC[1:]):
        with pytest.raises(ArithmeticError):
            check_pixels(wrong_HWC, image_HWC)


# --- Checks in processes of their own


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import time; time.sleep(600)", "no answer within"),
        ("import os; os._exit(7)", "ended with 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "ended by SIGABRT"),
        ("raise KeyError('deep inside')", "KeyError: 'deep inside'"),
        ("print('x' * 10_000_000)\n    raise SystemExit", "ended with 1: SystemExit"),
    ],
)
def test_a_check_that_ends_badly_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
) -> None:
    (tmp_path / "bad_check.py").write_text(f"def look(options):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    begun = time.monotonic()
    (row,) = run(Check("thing", "bad_check", "look", fix="mend it"), {}, timeout=20 if "sleep" not in body else 1)
    assert (row.part, row.state, row.fix) == ("thing", State.BROKEN, "mend it")
    assert says in row.found
    assert time.monotonic() - begun < 120


def test_what_a_check_prints_at_its_end_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "import atexit, os, signal\nfrom mvp_fast.doctor.row import Row, State\n"
        "def look(options):\n    print('noise')\n    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)\n"
        "    return [Row('thing', State.OK, options['word'])]\n"
    )
    (tmp_path / "noisy_check.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    assert run(Check("thing", "noisy_check", "look"), {"word": "fine"}) == [Row("thing", State.OK, "fine")]


# --- What it comes to


def rows_of(**states: State) -> list[Row]:
    """A machine with two GPUs on which all is well but for what is said."""
    facts: dict[str, dict[str, Any]] = {
        "GPU": {"count": 2, "name": "A GPU"},
        "torch": {"device": "cuda", "loader": "dali on the GPU", "kernels": "triton"},
    }
    parts = ["driver", *(check.part for check in CHECKS)]
    return [Row(part, states.get(part, State.OK), "found", facts=facts.get(part, {})) for part in parts]


def test_a_machine_with_gpus() -> None:
    report = judge(rows_of())
    assert report.can_train
    for words in ("on 2 x A GPU", "loader dali on the GPU", "triton kernels", "adamw", "fusedlamb by apex", "FFCV"):
        assert words in report.verdict
    without = judge(rows_of(apex=State.MISSING, FFCV=State.BROKEN, wandb=State.BROKEN, cores=State.NOTE))
    assert without.can_train
    assert "apex" not in without.verdict
    assert "FFCV" not in without.verdict


@pytest.mark.parametrize("state", [State.MISSING, State.BROKEN])
def test_what_training_needs(state: State) -> None:
    for part in ("torch", "torchvision", "timm", "open_clip", "libraries", "data"):
        report = judge(rows_of(**{part: state}))
        assert not report.can_train
        assert f"{part} is {state}" in report.verdict
        assert "Until then" not in report.verdict
    assert judge(rows_of(nvImageCodec=state)).can_train, "a GPU's run decodes by DALI"
    assert "mvp-fast train --data.loader torchvision." in judge(rows_of(DALI=state)).verdict
    assert "mvp-fast train --kernels.impl reference." in judge(rows_of(Triton=state)).verdict
    on_cpu = rows_of(nvImageCodec=state, GPU=State.MISSING, driver=State.MISSING)
    next(row for row in on_cpu if row.part == "torch").facts["device"] = "cpu"
    assert "nvImageCodec is" in judge(on_cpu).verdict


def test_a_gpu_that_torch_cannot_use_is_a_fault() -> None:
    assert "GPU is broken" in judge(rows_of(GPU=State.BROKEN)).verdict
    assert "driver is broken" in judge(rows_of(driver=State.BROKEN)).verdict


# --- nvidia-smi


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that answers what it is asked for, from a table; two GPUs, the second one hot."""
    program = tmp_path / "nvidia-smi"
    table = {
        "index": "0 1",
        "name": "NVIDIA_A NVIDIA_A",
        "driver_version": "580.65.06 580.65.06",
        "memory.total": "81559 81559",
        "persistence_mode": "Disabled Disabled",
        "mig.mode.current": "Disabled Enabled",
        "clocks.sm": "1980 1200",
        "clocks.max.sm": "1980 1980",
        "temperature.gpu": "40 90",
        "power.limit": "700.00 700.00",
        "clocks_throttle_reasons.active": "0x0000000000000001 0x0000000000000044",
    }
    program.write_text(
        f"#!{sys.executable}\nimport sys\ntable = {table!r}\n"
        "fields = next(w for w in sys.argv if w.startswith('--query-gpu=')).removeprefix('--query-gpu=').split(',')\n"
        "if not all(f in table for f in fields):\n    sys.exit('Field is not a valid field to query.')\n"
        "for n in (0, 1):\n    print(', '.join(table[f].split()[n].replace('_', ' ') for f in fields))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


def test_clocks_that_are_held_back_are_told(smi: Path) -> None:
    cards = gpu.query(gpu._IDENTITY)
    assert [card["name"] for card in cards] == ["NVIDIA A"] * 2
    row = gpu._clocks(cards)
    assert row.state is State.NOTE
    assert "1980 of 1980 MHz" in row.found
    assert "GPU 1 is held back: power limit (software), heat (hardware)" in row.found
    assert "GPU 0" not in row.found
    assert "MIG is on" in gpu._driver(cards).found
    assert "580.65.06" in gpu._driver(cards).found


def test_persistence_and_steady_clocks(smi: Path) -> None:
    smi.write_text(smi.read_text().replace("0x0000000000000044", "0x0000000000000000"))
    row = gpu._clocks(gpu.query(gpu._IDENTITY))
    assert "persistence mode is off" in row.found
    assert row.fix == "nvidia-smi -pm 1"
    smi.write_text(smi.read_text().replace("Disabled Disabled", "Enabled Enabled"))
    assert gpu._clocks(gpu.query(gpu._IDENTITY)).state is State.OK


def test_a_field_that_it_does_not_know(smi: Path) -> None:
    assert gpu.query(("index", "no.such.field")) == []
    smi.write_text(smi.read_text().replace("'clocks.sm'", "'clocks.other'"))
    assert "does not tell" in gpu._clocks(gpu.query(gpu._IDENTITY)).found
    assert gpu.reasons_of("[N/A]") == []


@pytest.mark.skipif(GPU, reason="torch can use this machine's GPU")
def test_a_gpu_that_nvidia_smi_lists_and_torch_cannot_use(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = gpu._seen()
    assert row.state is State.BROKEN
    assert "torch can't use it" in row.found
    assert "driver of branch 580" in row.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu._seen().state is State.NOTE
    assert "CUDA_VISIBLE_DEVICES" in gpu._seen().fix


# --- Limits


def test_quotas_of_both_versions_of_control_groups(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/pod/box\n")
    write(tmp_path, {"pod/cpu.max": "150000 100000\n", "pod/box/cpu.max": "max 100000\n", "pod/memory.max": "1000\n"})
    write(tmp_path, {"pod/box/memory.max": "max\n"})
    assert machine.core_quota(tmp_path, groups) == 1.5
    assert machine.memory_limit(tmp_path, groups) == 1000
    old = tmp_path / "old"
    groups.write_text("4:memory:/far/away\n3:cpu,cpuacct:/box\n0::/\n")
    write(old, {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"})
    write(old, {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"})
    write(old, {"memory/memory.limit_in_bytes": "9223372036854771712"})
    assert machine.core_quota(old, groups) == 4.0
    assert machine.memory_limit(old, groups) is None, "far/away is the host's path: the mount's own files hold"
    write(old, {"memory/memory.limit_in_bytes": "2000000"})
    assert machine.memory_limit(old, groups) == 2_000_000
    assert machine.core_quota(tmp_path / "none", tmp_path / "none") is None


def test_fewer_cores_and_files_are_noticed() -> None:
    code = (
        "import os, resource\nfrom mvp_fast.doctor import machine\n"
        "os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\nfor row in (machine.cores(), machine.open_files()):\n"
        "    print(row.state, row.facts.get('affinity'), row.found, row.fix, sep='|')"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0].split("|")[1] == "1"
    assert shown[1] == "note|None|256|ulimit -n 2048"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 256


def test_room_for_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = machine.room(tmp_path / "runs" / "that" / "are not there")
    assert str(tmp_path) in row.found
    assert row.facts["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert (row.state is State.OK) == (row.facts["free_bytes"] >= machine.ROOM)
    monkeypatch.setattr(machine, "ROOM", 10**18)
    assert machine.room(tmp_path).state is State.NOTE
    (tmp_path / "file").write_text("")
    assert machine.room(tmp_path / "file" / "runs").state is State.BROKEN


# --- The disk


def write_files(folder: Path, count: int, size: int) -> list[Piece]:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(os.urandom(size))
    os.sync()
    return find_pieces(folder)


def test_files_are_read_whole_and_once(tmp_path: Path) -> None:
    pieces = write_files(tmp_path / "images", 50, 30_000)
    assert sorted(piece.path.name for piece in pieces) == sorted(f"{number}.jpg" for number in range(50))
    rate = measure(pieces)
    assert (rate.images, rate.bytes) == (50, 1_500_000)
    assert rate.seconds > 0


def test_memory_is_not_taken_for_a_disk() -> None:
    """A file system in memory keeps what it is told to drop, and nothing comes from a disk: that is said."""
    folder = Path("/dev/shm/mvp-doctor-test")
    try:
        rate = measure(write_files(folder, 20, 100_000))
        assert rate.cached
        (row,) = disk.disk_rows({"data": str(folder)})
        assert row.state is State.NOTE
        assert "% from the disk, the rest may be the page cache's rate" in row.found
        assert row.facts["may_be_cached"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_time_is_bounded(tmp_path: Path) -> None:
    pieces = write_files(tmp_path / "images", 5, 1000) * 4000
    assert measure(pieces, seconds=0.0).images == 0
    assert 0 < measure(pieces, seconds=0.05).images <= len(pieces)


def test_folders_and_indexes(scenes: Path, tmp_path: Path) -> None:
    by_index, folder = find_pieces(scenes / "index.parquet", seed=1), tmp_path / "plain"
    assert {(p.path, p.offset, p.length) for p in by_index} == {(p, 0, p.stat().st_size) for p in scenes.rglob("*.jpg")}
    assert find_pieces(scenes, seed=1) == by_index
    assert find_pieces(scenes, seed=2) != by_index, "in random order"
    shutil.copytree(scenes, folder)
    (folder / "index.parquet").unlink()
    (folder / ".hidden.jpg").write_text("x")
    os.mkfifo(folder / "pipe.jpg")  # it would be waited for
    named = sorted(piece.path.relative_to(folder) for piece in find_pieces(folder) if piece.path.suffix == ".jpg")
    assert named == sorted(path.relative_to(scenes) for path in scenes.rglob("*.jpg"))


@pytest.mark.parametrize("case", ["nowhere", "empty", "no index", "files gone"])
def test_data_that_cannot_be_read(scenes: Path, tmp_path: Path, case: str) -> None:
    place = tmp_path / "place"
    if case == "empty":
        place.mkdir()
    elif case == "no index":
        place.write_text("text")
    elif case == "files gone":
        place.mkdir()
        shutil.copy(scenes / "index.parquet", place / "index.parquet")
        pieces = [Piece(place / "gone.jpg", 0, 10)]
        with pytest.raises(FileNotFoundError) as raised:
            measure(pieces)
        assert raised.value.errno == errno.ENOENT
        return
    (row,) = disk.disk_rows({"data": str(place)})
    assert row.state is State.BROKEN
    assert str(place) in row.found
    assert row.fix
    if case != "empty":
        with pytest.raises(DataError):
            find_pieces(place)


def test_no_data_no_row() -> None:
    assert disk.disk_rows({"data": ""}) == []
