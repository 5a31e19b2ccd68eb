"""What can go wrong in a run: each time one paragraph, the documented exit code, and nothing lost.

The command line runs in this process, and must leave it as it was: signals, ranks and threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mvp_fast.cli.main import main
from mvp_fast.config.load import parse_overrides
from mvp_fast.config.schema import Config, DataConfig, MaskConfig, TeacherConfig
from mvp_fast.errors import ConfigError, EnvironmentProblem
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.train.build import build_run
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.sinks import check_sinks

BATCH, IMAGES, CHECKED = 8, 96, 64
KINDS = {
    2: "configuration error",
    3: "data error",
    4: "environment error",
    5: "training diverged",
}


@dataclass(frozen=True)
class Told:
    """How a call ended."""

    code: int
    out: str
    err: str

    def paragraph(self, code: int) -> str:
        """What it said, after a look at its form: the exit code, one paragraph, no traceback."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert self.err.startswith(f"mvp-fast train: {KINDS[code]}: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out
        return self.err


def call(settings: dict[str, Any], *more: str) -> Told:
    """`mvp-fast train` in this process."""
    words = ["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value))), *more]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not torch.distributed.is_initialized()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("mvp", "checkpoint"))] == []
    return Told(code, out.getvalue(), err.getvalue())


Attempt = Callable[..., Told]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from a second thread, and lose much where other processes want the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base(tiny: dict[str, Any], scenes: Path) -> dict[str, Any]:
    """A tiny run's settings, without a folder."""
    return {**tiny, "train.batch-size": BATCH, "data.index": scenes, "data.loader": "torchvision", "train.steps": 4}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run's folder."""
    return tmp_path / "run"


@pytest.fixture
def attempt(base: dict[str, Any], run: Path) -> Attempt:
    """Call `mvp-fast train` with these settings over the tiny run's."""
    return lambda settings, *more: call({**base, "run.dir": run, **settings}, *more)


@pytest.fixture(scope="module")
def finished(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with checkpoints at 2 and 4; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    told = call({**base, "run.dir": folder, "train.checkpoint-every": 2})
    assert (told.code, told.err) == (0, "")
    assert steps_with_checkpoint(folder) == [2, 4]
    return folder


@pytest.fixture
def again(finished: Path, run: Path) -> Path:
    """A copy of the finished run, to go on with."""
    shutil.copytree(finished, run)
    return run


def steps_with_checkpoint(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def metric_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (folder / "checkpoints" / f"step-{step:08d}" / "student").glob("*.safetensors")
    return load_file(file)


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The command line and the configuration: 2


def test_misspelt_setting_on_the_command_line(attempt: Attempt, run: Path) -> None:
    told = attempt({"train.stepz": 4})
    assert told.code == 2
    assert "Unrecognized options: --train.stepz" in told.err
    assert "--train.steps" in told.err.replace("--train.stepz", "")
    assert not run.exists()


def test_misspelt_setting_in_a_file(attempt: Attempt, tmp_path: Path, run: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {bacth_size: 4}\n")
    text = attempt({"config": file}).paragraph(2)
    assert f"There is no setting `train.bacth_size` ({file}). Did you mean `train.batch_size`?" in text
    assert not run.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"student.name": "beitv2_bas_patch16_224"}, ("student.name", "Did you mean beitv2_base_patch16_224")),
        ({"teacher.name": "ViT-S-61"}, ("teacher.name", "Did you mean ViT-S-16")),
        ({"teacher.pretrained": "opnai", "teacher.name": "ViT-B-16"}, ("teacher.pretrained", "Did you mean openai")),
        ({"optim.name": "adamv"}, ("optim.name", "Did you mean `adam")),
        ({"train.batch-size": 8, "train.accumulate": 3}, ("8", "3 equal micro-batches", "train.accumulate")),
        ({"mask.patches": 17}, ("mask.patches is 17", "16 patches")),
        ({"data.image-size": 60}, ("data.image_size", "60")),
        ({"student.heads": 3}, ("heads", "64")),
        ({"train.log-every": 0}, ("train.log-every is 0", "1 or more")),
        ({"data.index": ""}, ("data.index is empty", "mvp-fast data index")),
    ],
)
def test_wrong_settings(attempt: Attempt, run: Path, settings: dict[str, Any], says: tuple[str, ...]) -> None:
    text = attempt(settings).paragraph(2)
    assert [part for part in says if part not in text] == [], text
    assert not run.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [({}, "the 3 ranks (train.batch_size is 8)"), ({"train.accumulate": 4}, "2 images can't be split into 4")],
)
def test_batch_that_ranks_cannot_share(base: dict[str, Any], settings: dict[str, Any], says: str) -> None:
    """Each rank says so before it talks to another, so one of them is enough here."""
    world = 3 if not settings else 4
    words = [word for name, value in {**base, **settings}.items() for word in (f"--{name}", str(value))]
    config = parse_overrides(Config(), words, "test", "")
    with pytest.raises(ConfigError) as caught:
        build_run(config, Ranks(0, world, world, torch.device("cpu")), None)
    assert says in str(caught.value)


# The machine: 4


def test_no_gpu(attempt: Attempt, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = attempt({"train.device": "cuda"}).paragraph(4)
    assert "no GPU" in text
    assert "set train.device to cpu" in text
    assert not run.exists()


def test_kernels_that_cannot_run_here(attempt: Attempt, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    text = attempt({"kernels.impl": "triton"}).paragraph(4)
    assert "kernels.impl triton" in text
    assert "Set kernels.impl to auto or reference" in text
    for value in ("triton", "tritno"):
        monkeypatch.setenv("MVP_KERNELS", value)
        text = attempt({}).paragraph(4)
        assert value in text
        assert "Unset MVP_KERNELS" in text
    assert not run.exists()
    told = attempt({"kernels.impl": "reference", "train.steps": 1})  # the field counts before the variable
    assert told.code == 0, told.err
    assert "kernels   reference" in told.out


def test_wandb_missing(attempt: Attempt, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed, where it is
    text = attempt({"run.wandb-project": "mine"}).paragraph(4)
    assert "wandb is not installed (run.wandb-project mine). Install it with `pip install 'mvp-fast[wandb]'`" in text
    assert not run.exists()
    check_sinks(Config())
    with pytest.raises(EnvironmentProblem):
        check_sinks(parse_overrides(Config(), ["--run.wandb-project", "mine"], "test", ""))


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/mvp-fast-run"])
def test_folder_that_cannot_be_made(attempt: Attempt, place: str) -> None:
    text = attempt({"run.dir": place}).paragraph(4)
    assert f"The run's folder can't be written: {'Not a dir' if 'null' in place else 'No such'}" in text
    assert f"({place}). Choose another --run.dir" in text


def test_folder_that_is_a_file(attempt: Attempt, run: Path) -> None:
    run.write_text("precious")
    assert str(run) in attempt({}).paragraph(4)
    assert run.read_text() == "precious"


def test_checkpoint_folder_that_is_a_file(attempt: Attempt, run: Path) -> None:
    run.mkdir()
    (run / "checkpoints").write_text("precious")
    assert str(run / "checkpoints") in attempt({}).paragraph(4)
    assert (run / "checkpoints").read_text() == "precious"
    (run / "checkpoints").unlink()
    assert attempt({"train.steps": 1}).code == 0  # the failed start is no run that the next must go on with


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a full disk that needs no rights and fails in write(), as a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_at_a_checkpoint(attempt: Attempt, again: Path) -> None:
    before = contents(again / "checkpoints")
    more = {"train.steps": 6, "train.checkpoint-every": 1, "resume": "auto"}
    with largest_file(200_000):  # less than the weights, more than all else
        text = attempt(more).paragraph(4)
    assert "The checkpoint could not be written: File too large" in text
    assert "step-00000005" in text
    assert "--resume auto: earlier checkpoints are whole" in text
    assert contents(again / "checkpoints") == before
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    told = attempt(more)
    assert (told.code, told.err) == (0, "")
    assert "resumed   at step 4" in told.out
    assert metric_steps(again) == [1, 2, 3, 4, 5, 6]
    assert steps_with_checkpoint(again) == [4, 5, 6]


def test_full_disk_elsewhere(attempt: Attempt, again: Path) -> None:
    """A file that no part of the program expected to fail: still one paragraph, and the old one whole."""
    metrics = again / "metrics.jsonl"
    metrics.write_text(metrics.read_text() * 300)
    before = contents(again)
    with largest_file(len(before["metrics.jsonl"]) - 1):
        text = attempt({"train.steps": 6, "resume": "auto"}).paragraph(4)
    assert "File too large" in text
    assert "Free some space" in text
    after = contents(again)
    assert {name for name in before if after[name] != before[name]} <= {"config.yaml", "environment.json"}


# Data: 3


def test_missing_and_empty_data(attempt: Attempt, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, where in (("nowhere", "nowhere"), ("empty", "empty/index.parquet")):
        text = attempt({"data.index": tmp_path / folder}).paragraph(3)
        assert f"There is no index here ({tmp_path / where}). Write one with `mvp-fast data index DIR`" in text
    assert not run.exists()


def test_missing_teacher_file(attempt: Attempt, run: Path, tmp_path: Path) -> None:
    text = attempt({"teacher.pretrained": tmp_path / "clip.pt"}).paragraph(3)
    assert f"There is no such checkpoint file (teacher.pretrained {tmp_path / 'clip.pt'})" in text
    assert not run.exists()


@pytest.fixture
def images(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the image set, to damage."""
    return Path(shutil.copytree(scenes, tmp_path / "images"))


def samples_in_order(folder: Path, steps: int) -> list[list[int]]:
    """The samples of the first steps."""
    config = {"data": DataConfig(image_size=64), "mask": MaskConfig(patches=6, min_block=2)}
    plan = SamplePlan(Index.open(folder), seed=0, batch_size=BATCH, **config)
    return [plan.step(step).sample_B.tolist() for step in range(steps)]


def delete(file: Path) -> None:
    file.unlink()


def replace(file: Path) -> None:
    Image.new("RGB", (50, 40), "navy").save(file, "JPEG")


def corrupt(file: Path) -> None:
    """Nonsense in the Huffman tables, the length as it was: every decoder refuses it."""
    data = file.read_bytes()
    at = data.index(b"\xff\xc4") + 5
    file.write_bytes(data[:at] + b"\xff" * 16 + data[at + 16 :])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


@pytest.mark.parametrize("damage", [delete, replace])
def test_index_that_no_longer_fits_is_told_at_the_start(
    damage: Callable[[Path], None], attempt: Attempt, images: Path, run: Path
) -> None:
    file = Index.open(images).file(IMAGES - 1)
    damage(file)
    text = attempt({"data.index": images}).paragraph(3)
    assert f"The index no longer fits its files: {file}" in text
    assert f"Write it anew with `mvp-fast data index {images}`" in text
    assert not run.exists()


@pytest.mark.parametrize("damage", [delete, replace])
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_index_that_no_longer_fits_is_told_later(
    damage: Callable[[Path], None], loader: str, attempt: Attempt, images: Path, run: Path
) -> None:
    looked_at = set(np.linspace(0, IMAGES - 1, CHECKED).round().astype(int).tolist())
    steps = samples_in_order(images, 6)
    step, sample = next((k, s) for k, row in enumerate(steps) if k for s in row if s not in looked_at)
    index = Index.open(images)
    whole = index.file(sample).read_bytes()
    damage(index.file(sample))
    settings = {"data.index": images, "data.loader": loader, "data.bad-sample-budget": 0, "train.steps": step + 1}
    text = attempt(settings).paragraph(3)
    assert "The index no longer fits its files" in text
    assert index.key(sample) in text
    assert steps_with_checkpoint(run) == [step]
    index.file(sample).write_bytes(whole)
    assert attempt({**settings, "resume": "auto"}).code == 0
    assert metric_steps(run) == list(range(1, step + 2))


@pytest.mark.parametrize("damage", [corrupt, truncate])
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_bad_image_within_the_budget_is_replaced(
    damage: Callable[[Path], None], loader: str, attempt: Attempt, images: Path, run: Path
) -> None:
    index = Index.open(images)
    sample = samples_in_order(images, 2)[1][3]
    damage(index.file(sample))
    build_index(images)  # reads headers alone: the image is indexed with its new length
    assert len(Index.open(images)) == IMAGES
    told = attempt({"data.index": images, "data.loader": loader, "train.steps": 3})
    assert (told.code, told.err) == (0, "")
    (line,) = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert (line["key"], line["step"], line["kind"]) == (index.key(sample), 1, "broken")
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["bad_samples"] == 1
    assert metric_steps(run) == [1, 2, 3]


@pytest.mark.parametrize("damage", [corrupt, truncate])
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_bad_image_over_the_budget_ends_the_run_and_loses_nothing(
    damage: Callable[[Path], None], loader: str, attempt: Attempt, images: Path, run: Path, finished: Path
) -> None:
    index = Index.open(images)
    sample = samples_in_order(images, 3)[2][5]
    whole = index.file(sample).read_bytes()
    damage(index.file(sample))
    build_index(images)
    settings = {"data.index": images, "data.loader": loader, "data.bad-sample-budget": 0}
    text = attempt(settings).paragraph(3)
    assert f"all of them are in {run / 'bad_samples.jsonl'}" in text
    assert index.key(sample) in text
    assert "--verify" in text
    assert json.loads((run / "bad_samples.jsonl").read_text())["key"] == index.key(sample)
    assert steps_with_checkpoint(run) == [2]
    assert metric_steps(run) == [1, 2]
    if loader == "torchvision":  # the loader of the undamaged run
        assert same_weights(student_of(run, 2), student_of(finished, 2))
    told = attempt({**settings, "resume": "auto", "data.bad-sample-budget": 0.5})
    assert told.code == 0, told.err
    assert "resumed   at step 2" in told.out
    assert metric_steps(run) == [1, 2, 3, 4]
    assert len(whole) >= index.file(sample).stat().st_size


def test_bad_image_in_the_first_batch(attempt: Attempt, images: Path, run: Path) -> None:
    """A checkpoint of step 0 holds an optimizer without state; the run goes on from it all the same."""
    index = Index.open(images)
    sample = samples_in_order(images, 1)[0][0]
    whole = index.file(sample).read_bytes()
    corrupt(index.file(sample))
    settings = {"data.index": images, "data.bad-sample-budget": 0, "train.steps": 2}
    attempt(settings).paragraph(3)
    assert steps_with_checkpoint(run) == [0]
    assert "already holds a run" in attempt(settings).paragraph(2)
    index.file(sample).write_bytes(whole)
    told = attempt({**settings, "resume": "auto"})
    assert told.code == 0, told.err
    assert metric_steps(run) == [1, 2]


# Going on: what must fit, 2 and 3


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"student.width": 128}, 3, ("The checkpoint is of another model", "student.* settings")),
        ({"student.depth": 3}, 3, ("The checkpoint is of another model", "blocks.2.")),
        ({"teacher.seed": 1}, 3, ("trained against another teacher", "teacher.* settings")),
        ({"train.batch-size": 16}, 2, ("batch_size was 8, is 16", "config.yaml")),
        ({"seed": 1}, 2, ("seed was 0, is 1", "config.yaml")),
        ({"mask.patches": 5}, 2, ("mask_patches was 6, is 5",)),
    ],
)
def test_checkpoint_that_does_not_fit(
    attempt: Attempt, finished: Path, run: Path, settings: dict[str, Any], code: int, says: tuple[str, ...]
) -> None:
    before = contents(finished)
    checkpoint = finished / "checkpoints" / "step-00000002"
    for more in ({"run.dir": finished, "resume": "auto"}, {"resume": checkpoint}):
        text = attempt({"train.steps": 6, **settings, **more}).paragraph(code)
        assert [part for part in says if part not in text] == [], text
        assert str(finished / "checkpoints") in text
    assert contents(finished) == before
    assert not run.exists()


def test_checkpoint_of_another_data_set(attempt: Attempt, finished: Path, images: Path) -> None:
    Index.open(images).file(5).unlink()
    build_index(images)
    before = contents(finished)
    text = attempt({"data.index": images, "run.dir": finished, "resume": "auto", "train.steps": 6}).paragraph(3)
    assert "trained on another data set" in text
    assert str(images) in text
    assert contents(finished) == before


@pytest.mark.parametrize("which", ["6", "nowhere", "../nowhere"])
def test_checkpoint_that_is_not_there(attempt: Attempt, finished: Path, which: str) -> None:
    text = attempt({"run.dir": finished, "resume": which}).paragraph(3)
    assert f"There is no checkpoint {which}" in text
    assert "2, 4" in text


def test_folders_that_hold_a_run_are_not_mixed(attempt: Attempt, finished: Path, again: Path) -> None:
    before = contents(again)
    for settings in ({}, {"resume": finished / "checkpoints" / "step-00000002"}, {"resume": finished}):
        text = attempt(settings).paragraph(2)
        assert f"The folder already holds a run (run.dir {again}). Go on with it by --resume auto" in text
    assert contents(again) == before


def cut_weights(checkpoint: Path) -> None:
    (file,) = (checkpoint / "student").glob("*.safetensors")
    truncate(file)


def cut_optimizer(checkpoint: Path) -> None:
    (file,) = (checkpoint / "optimizer").glob("*.safetensors")
    truncate(file)


def lose_weights(checkpoint: Path) -> None:
    (file,) = (checkpoint / "student").glob("*.safetensors")
    file.unlink()


def lose_part(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")


def lose_tensor(checkpoint: Path) -> None:
    (file,) = (checkpoint / "optimizer").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)


def cut_state(checkpoint: Path) -> None:
    truncate(checkpoint / "state.json")


def poor_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text('{"version": 1, "step": 4}')


def other_version(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "version": 99}))


def lose_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_weights, "The checkpoint is damaged"),
        (cut_optimizer, "The checkpoint is damaged"),
        (lose_weights, "The checkpoint is damaged: No such file"),
        (lose_part, "The checkpoint has no part `optimizer`"),
        (lose_tensor, "The checkpoint is damaged"),
        (cut_state, "This is no whole checkpoint"),
        (poor_state, "This is no whole checkpoint: state.json lacks config, plan,"),
        (other_version, "The checkpoint has format version 99, this program reads 1"),
        (lose_state, "There is no checkpoint"),
    ],
)
def test_damaged_checkpoint_is_told(damage: Callable[[Path], None], says: str, attempt: Attempt, again: Path) -> None:
    newest = again / "checkpoints" / "step-00000004"
    damage(newest)
    before = contents(again)
    for which in ("auto", newest) if damage is not lose_state else (newest,):
        text = attempt({"resume": which, "train.steps": 6}).paragraph(3)
        assert says in text
        assert str(newest) in text
    assert contents(again) == before


@pytest.mark.parametrize(("damage", "which"), [(cut_weights, "2"), (lose_state, "auto")])
def test_an_older_checkpoint_takes_over(
    damage: Callable[[Path], None], which: str, attempt: Attempt, again: Path, finished: Path
) -> None:
    """The damaged one is set aside: it neither stands in the way of the new one nor is taken for the newest."""
    damage(again / "checkpoints" / "step-00000004")
    told = attempt({"resume": which})
    assert told.code == 0, told.err
    assert "resumed   at step 2" in told.out
    assert "superseded-step-00000004" in told.out
    assert steps_with_checkpoint(again) == [2, 4]
    assert same_weights(student_of(again, 4), student_of(finished, 4))
    assert metric_steps(again) == [1, 2, 3, 4]
    told = attempt({"resume": "auto"})
    assert "The run is complete: 4 steps" in told.out


# Values that are not finite: 5


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of noise, one of them white."""
    folder = tmp_path_factory.mktemp("bright")
    for i in range(16):
        noise_HWC = np.random.default_rng(i).integers(0, 256, (80, 90, 3), dtype=np.uint8)
        picture = Image.fromarray(noise_HWC) if i != 5 else Image.new("RGB", (90, 80), "white")
        picture.save(folder / f"{i:02d}.jpg", quality=90)
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's weights that overflow on a white patch, and on no other.

    The first channel takes a patch's sum, and the first unit of an MLP opens above a threshold that only white reaches.
    """
    teacher = build_teacher(TeacherConfig("ViT-S-16", "random"), grid=(4, 4), image_size=64)
    state = {f"visual.{name}": tensor.clone() for name, tensor in teacher.visual.state_dict().items()}
    state["visual.conv1.weight"][0] = 0.005
    state["visual.class_embedding"][0] = 0.0
    mlp = "visual.transformer.resblocks.0.mlp"
    state[f"{mlp}.c_fc.weight"][0] = 0.0
    state[f"{mlp}.c_fc.weight"][0, 0] = 1e20
    state[f"{mlp}.c_fc.bias"][0] = -3e20  # white is near 6 after the norm, noise near 1
    state[f"{mlp}.c_proj.weight"][0, 0] = 1e30
    file = tmp_path_factory.mktemp("teacher") / "overflowing.safetensors"
    save_file(state, file)
    return file


def test_skipped_updates_within_the_budget(attempt: Attempt, bright: Path, overflowing: Path, run: Path) -> None:
    settings = {"data.index": bright, "teacher.pretrained": overflowing, "train.nonfinite-budget": 2}
    told = attempt({**settings, "train.checkpoint-every": 1, "train.keep-checkpoints": 0})
    assert (told.code, told.err) == (0, "")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line["skipped_updates"]]
    ledger = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert len(skipped) == 2  # once an epoch of two steps
    assert [line["step"] for line in ledger] == skipped
    assert all("05.jpg" in line["keys"] and len(line["keys"]) == BATCH for line in ledger)
    for line in lines:
        assert (line["loss"] is None) == (line["step"] in skipped)
        assert line["loss"] is None or np.isfinite(line["loss"])
    for step in range(2, 5):  # a skipped update changes nothing, another one does
        assert same_weights(student_of(run, step), student_of(run, step - 1)) == (step in skipped)
        assert all(tensor.isfinite().all() for tensor in student_of(run, step).values())
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["skipped"] == 2


def test_skipped_updates_over_the_budget(attempt: Attempt, bright: Path, overflowing: Path, run: Path) -> None:
    settings = {"data.index": bright, "teacher.pretrained": overflowing, "train.checkpoint-every": 1}
    text = attempt({**settings, "train.nonfinite-budget": 1}).paragraph(5)
    assert "2 updates were skipped for a non-finite loss or gradient, train.nonfinite-budget allows 1" in text
    assert "05.jpg" in text
    assert str(run / "nonfinite.jsonl") in text
    assert "Lower optim.lr" in text
    last = steps_with_checkpoint(run)[-1]
    assert last >= 1
    assert all(tensor.isfinite().all() for tensor in student_of(run, last).values())
    ledger = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert len(ledger) == 2
    assert all("05.jpg" in line["keys"] for line in ledger)
    # A resumed run counts on from the checkpoint, and ends well with a greater budget.
    told = attempt({**settings, "train.nonfinite-budget": 2, "resume": "auto"})
    assert (told.code, told.err) == (0, "")


def test_a_teacher_of_nans_never_reaches_the_weights(attempt: Attempt, overflowing: Path, run: Path) -> None:
    state = load_file(overflowing)
    state["visual.ln_post.weight"][3] = torch.nan
    save_file(state, broken := run.with_name("nan.safetensors"))
    settings = {"teacher.pretrained": broken, "train.checkpoint-every": 1, "train.steps": 3}
    attempt({**settings, "train.nonfinite-budget": 1}).paragraph(5)
    assert steps_with_checkpoint(run) == [1]
    assert all(tensor.isfinite().all() for tensor in student_of(run, 1).values())
    # Nothing was ever updated, so the optimizer has no state: the checkpoint serves all the same.
    told = attempt({**settings, "train.nonfinite-budget": 3, "resume": "auto"})
    assert (told.code, told.err) == (0, "")
    assert "every update of the last steps skipped" in told.out
    assert same_weights(student_of(run, 3), student_of(run, 1))
