"""One judgement of image files: what `data index --verify` passes the loaders accept, and the reverse."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_fast.config.schema import DataConfig, MaskConfig
from mvp_fast.errors import DataError
from mvp_fast.loaders import encoded
from mvp_fast.loaders.base import Batch
from mvp_fast.loaders.encoded import BadSampleError
from mvp_fast.loaders.failures import Failure
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.encoded_image import MAX_PIXELS, BrokenImageError, check_markers, judge
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import PlanRows, SamplePlan
from mvp_fast.samples.probe import probe
from tests.bad_images import BAD, BAD_REASONS, BASELINE, DECODING, GOOD, PROGRESSIVE, flipped, with_size, write_corpus

BATCH = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), GOOD, BAD)


@pytest.fixture(scope="module")
def passed(corpus: Path) -> set[str]:
    """What --verify lets through; its index lies elsewhere."""
    out = corpus.parent / f"{corpus.name}-verified" / "index.parquet"
    out.parent.mkdir()
    report = build_index(corpus, out, verify=True, workers=1)
    for entry in report.bad:
        assert BAD_REASONS[entry.path] in entry.reason, entry.path
    index = Index.open(out)
    return {index.key(i) for i in range(len(index))}


@pytest.fixture(scope="module")
def by_headers(corpus: Path) -> Index:
    """What headers alone let through: good images and most of the bad."""
    out = corpus.parent / f"{corpus.name}-headers" / "index.parquet"
    out.parent.mkdir()
    report = build_index(corpus, out, workers=1)
    seen = {entry.path for entry in report.bad}
    assert seen <= set(BAD)
    assert {name for name in BAD if "bomb" in name} <= seen, "sizes are in the headers"
    return Index.open(out)


class Replay(SamplePlan):
    """A plan whose rows were written down."""

    script: list[PlanRows]

    def step(self, k: int) -> PlanRows:
        return self.script[k % len(self.script)]


def plan_for(index: Index, kind: type[SamplePlan] = SamplePlan, **data: Any) -> Any:
    settings = DataConfig(image_size=48, threads=2, **{"bad_sample_budget": 1.0, **data})
    return kind(index, seed=1, batch_size=BATCH, data=settings, mask=MaskConfig(patches=3, min_block=1))


def run(name: str, plan: SamplePlan, steps: int, ledger: Path | None = None) -> tuple[list[Batch], dict[str, Failure]]:
    loader: Any = make_loader(name, plan.data, ledger=ledger)
    try:
        return list(islice(loader.batches(plan, 0), steps)), loader.failures.failures
    finally:
        loader.close()


def test_verify_tells_good_from_bad(passed: set[str]) -> None:
    assert passed == set(GOOD)


@pytest.mark.parametrize("name", DECODING)
def test_loaders_accept_what_verify_passes_and_nothing_else(
    by_headers: Index, passed: set[str], tmp_path: Path, name: str
) -> None:
    """An epoch over the corpus: every bad sample named, every other one untouched, every pixel its own image's."""
    index, ledger = by_headers, tmp_path / "bad.jsonl"
    met = {index.key(i) for i in range(len(index))}
    assert passed < met, "headers alone hide some of the damage"
    plan = plan_for(index)
    batches, failures = run(name, plan, -(-len(index) // BATCH), ledger)
    assert set(failures) == met - passed
    for key, failure in failures.items():
        assert BAD_REASONS[key] in failure.reason
        assert failure.kind == "broken"
    assert sorted(json.loads(line)["key"] for line in ledger.read_text().splitlines()) == sorted(met - passed)
    for batch in batches:
        planned = plan.step(batch.step)
        for i in range(BATCH):
            wanted = planned.slice(i, i + 1)
            while index.key(int(wanted.sample_B[0])) not in passed:
                wanted = plan.stand_in(wanted, 0)
            for column in ("sample_B", "x_B", "y_B", "width_B", "height_B", "flip_B", "attempt_B"):
                assert getattr(batch.rows, column)[i] == getattr(wanted, column)[0]
    # No stale pixels: the same rows, planned as such, meet no bad sample and give the same bits.
    replay = plan_for(index, Replay, bad_sample_budget=0.0)
    replay.script = [batch.rows for batch in batches]
    for batch in run(name, replay, len(batches))[0]:
        assert torch.equal(batch.images_BHWC, batches[batch.step].images_BHWC)


@pytest.mark.parametrize("name", DECODING)
def test_good_oddities_have_the_pixels_of_the_reference(by_headers: Index, passed: set[str], name: str) -> None:
    good = [i for i in range(len(by_headers)) if by_headers.key(i) in passed]
    plan = plan_for(by_headers, Replay, bad_sample_budget=0.0)
    position_B = np.arange(-(-len(good) // BATCH) * BATCH)
    rows = plan.rows(0, position_B % len(by_headers))
    sample_B = np.resize(np.array(good), len(rows))
    boxes = {"x_B": 0, "y_B": 0, "width_B": by_headers.width[sample_B], "height_B": by_headers.height[sample_B]}
    for column, value in boxes.items():
        getattr(rows, column)[:] = value
    rows.sample_B[:] = sample_B
    plan.script = [rows.slice(i, i + BATCH) for i in range(0, len(rows), BATCH)]
    (reference, _), (batches, failures) = (run(each, plan, len(plan.script)) for each in ("torchvision", name))
    assert failures == {}
    for a, b in zip(reference, batches, strict=True):
        assert (a.images_BHWC.int() - b.images_BHWC.int()).abs().float().mean() < 1


@pytest.mark.parametrize("name", DECODING)
def test_flipped_bits_in_the_pixels_touch_no_other_sample(tmp_path: Path, name: str) -> None:
    """Such damage mostly decodes; whatever a backend makes of it, the whole images beside it stay as they were."""
    write_corpus(tmp_path, flipped(), {f"good {i}.jpg": BASELINE for i in range(8)})
    build_index(tmp_path)
    index = Index.open(tmp_path)
    assert len(index) == 32
    batches, failures = run(name, plan_for(index), 8)
    assert not any(key.startswith("good") for key in failures)
    for key in failures:
        with pytest.raises(BrokenImageError):
            judge((tmp_path / key).read_bytes())
    replay = plan_for(index, Replay)
    replay.script = [batch.rows for batch in batches]
    for batch in run("torchvision", replay, 8)[0]:
        for i, sample in enumerate(batch.rows.sample_B):
            if index.key(int(sample)).startswith("good"):
                difference = batch.images_BHWC[i].int() - batches[batch.step].images_BHWC[i].int()
                assert difference.abs().float().mean() < 1


@pytest.mark.parametrize("name", DECODING)
def test_too_many_bad_ones_end_with_exit_code_3(by_headers: Index, name: str) -> None:
    threads = threading.active_count()
    with pytest.raises(DataError, match=r"bad_sample_budget allows a share of 0\.1") as caught:
        run(name, plan_for(by_headers, bad_sample_budget=0.1, bad_sample_probation=20), 12)
    assert caught.value.exit_code == 3
    assert threading.active_count() == threads


def test_every_prefix_of_a_jpeg_is_cut_short() -> None:
    for data in (BASELINE, PROGRESSIVE):
        assert judge(data) == (90, 70)
        for end in range(2, len(data) - 1, 37):
            for cut in (data[:end], data[:end].ljust(len(data), b"\0")):
                with pytest.raises(BrokenImageError, match="cut short"):
                    judge(cut)


# --- Bombs


def test_the_limit_is_where_pillow_begins_to_warn() -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_an_image_of_the_greatest_size_is_no_bomb() -> None:
    width = 9000
    assert check_markers(with_size(BASELINE, width, MAX_PIXELS // width)) is not None
    with pytest.raises(BrokenImageError, match="more than 89,478,485"):
        check_markers(with_size(BASELINE, width, MAX_PIXELS // width + 1))


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own: the most memory that it ever had, before and after all bombs were judged in full."""
    write_corpus(tmp_path, {name: data for name, data in BAD.items() if "bomb" in name})
    code = """
import resource, sys
from pathlib import Path
from mvp_fast.samples.encoded_image import BrokenImageError, judge
from mvp_fast.samples.probe import probe
files = sorted(Path(sys.argv[1]).iterdir())
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
probe(str(files[0]), True)
before = most()
for file in files:
    assert probe(str(file), True).reason and probe(str(file), False).reason, file
    try:
        judge(file.read_bytes())
        raise SystemExit(f"{file} passed")
    except BrokenImageError:
        pass
print(len(files), most() - before)
"""
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, shown.stdout.split())
    assert count == sum("bomb" in name for name in BAD)
    assert kilobytes < 80_000  # a bomb just above the limit is 268,000 once decoded
    assert shown.stderr == "", "no warning either"


# --- Files that are no files


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach, with one image in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        (Path(name) / "1.jpg").write_bytes(BASELINE)
        yield Path(name)


def unreadable(path: Path) -> str:
    path.chmod(0)
    return "Permission denied"


def folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "not a regular file"


def pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "not a regular file"


def device(path: Path) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "not a regular file"


def loop(path: Path) -> str:
    path.unlink()
    path.symlink_to(path)
    return "symbolic links"


@pytest.mark.parametrize("change", [unreadable, folder, pipe, device, loop])
def test_files_that_turn_into_something_else(open_folder: Path, change: Any) -> None:
    """Every backend reads through `encoded.read`; nothing here may wait or raise anything else."""
    path = open_folder / "1.jpg"
    build_index(open_folder)
    index = Index.open(open_folder)
    assert encoded.read(index, 0).plain_jpeg
    said = change(path)
    user = os.geteuid()
    if user == 0 and stat.S_ISREG(os.lstat(path).st_mode):
        os.seteuid(65534)  # nothing is unreadable to root
    try:
        with pytest.raises(BadSampleError, match=said) as caught:
            encoded.read(index, 0)
        assert caught.value.kind == "missing"
        assert said in probe(str(path), False).reason
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", DECODING)
def test_a_pipe_in_place_of_an_image_stops_no_loader(open_folder: Path, name: str) -> None:
    for i in range(2, 9):
        (open_folder / f"{i}.jpg").write_bytes(BASELINE)
    build_index(open_folder)
    index = Index.open(open_folder)
    pipe(open_folder / "3.jpg")
    folder(open_folder / "5.jpg")
    batches, failures = run(name, plan_for(index), 2)
    assert len(batches) == 2
    assert set(failures) == {"3.jpg", "5.jpg"}
