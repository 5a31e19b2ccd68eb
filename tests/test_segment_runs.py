"""Whole runs of `mvp-fast segment`, on small scenes: what they learn, how they go on, what they say of bad input."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mvp_fast.cli.main import main
from mvp_fast.config.load import load_settings
from mvp_fast.config.segment import SegmentSettings
from mvp_fast.errors import DataError, Preempted
from mvp_fast.evaluate.backbone import BackboneSource, load_backbone
from mvp_fast.evaluate.results import read_results
from mvp_fast.evaluate.segment.finish import finish
from mvp_fast.evaluate.segment.run import SegmentRun, build_segment_run
from mvp_fast.evaluate.segment.scores import Confusion
from mvp_fast.train.checkpoint import list_checkpoints
from mvp_fast.train.distributed import Ranks
from tests.conftest import Launcher, Process, arguments, read_metrics
from tests.segment_cases import TINY, export

STEPS = 6
ONE = Ranks(0, 1, 1, torch.device("cpu"))
Segment = Callable[..., Process]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("network") / "export")


@pytest.fixture(scope="module")
def few(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small scenes without an index; read only."""
    folder = tmp_path_factory.mktemp("few") / "scenes"
    launcher.run("data", "scenes", "--out", folder, "--images", 4, "--profile", "small", "--workers", 1)
    return folder


Words = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def words(few: Path, network: Path) -> Words:
    """The command line of a run in a folder; keywords override settings, `__` standing for the dot."""

    def write(run: Path, *more: Any, model: Any = network, **overrides: Any) -> list[Any]:
        named = {name.replace("__", ".").replace("_", "-"): value for name, value in overrides.items()}
        sets = {"segment.train": few, "segment.val": few, "train.steps": STEPS, "run.dir": run}
        several = {name: value for name, value in named.items() if isinstance(value, tuple)}
        one = {name: value for name, value in {**TINY, **sets, **named}.items() if name not in several}
        many = [word for name, values in several.items() for word in (f"--{name}", *values)]
        return ["segment", model, *more, *arguments(one), *many]

    return write


@pytest.fixture(scope="module")
def segment(launcher: Launcher, words: Words) -> Segment:
    """Start a run in a process of its own; see `words`."""
    return lambda *given, **overrides: launcher.start(*words(*given, **overrides))


@pytest.fixture
def fail(words: Words, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run in this process something that can't be done; the one paragraph that it says. Overrides as `words`."""

    def call(code: int, *given: Any, **overrides: Any) -> str:
        capsys.readouterr()
        assert main(list(map(str, words(*given, **overrides)))) == code
        said = capsys.readouterr().err
        assert said.startswith("mvp-fast segment: ")
        assert said.count("\n") == 1, said
        return said

    return call


@pytest.fixture(scope="module")
def whole(segment: Segment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped, with averaged weights, evaluated on its way; read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = segment(
        run, train__ema_decay=0.5, train__checkpoint_every=2, train__keep_checkpoints=0, segment__evaluate_every=4
    )
    assert process.wait() == 0, process.err
    return run


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}:{name}": tensor
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def built(run: Path, checkpoint: Path | None = None) -> SegmentRun:
    return build_segment_run(load_settings(SegmentSettings, run / "config.yaml"), ONE, checkpoint)


def test_a_few_scenes_are_learnt(segment: Segment, few: Path, tmp_path: Path) -> None:
    """From fresh weights to most pixels of four scenes: images, masks, network, loss and figures fit together."""
    process = segment(
        tmp_path / "run",
        "--from-scratch",
        train__steps=120,
        train__log_every=40,
        train__checkpoint_every=0,
        segment__evaluate_every=0,
        segment__scale=(1, 1),
        segment__photometric=False,
        segment__dropout=0,
        segment__drop_path=0,
        segment__layer_decay=1,
        segment__decoder_channels=32,
        optim__lr=3e-3,
        data__flip=0,
    )
    assert process.wait() == 0, process.err
    results = read_results(tmp_path / "run" / "results.json")
    assert results["miou"] > 0.6, process.out
    assert results["pixel_accuracy"] > 0.92
    assert "with fresh weights" in results["backbone"]["words"]
    there = [each["iou"] for each in results["per_class"].values() if each["iou"] is not None]
    assert results["miou"] == pytest.approx(np.mean(there))
    assert sum(each["pixels"] for each in results["per_class"].values()) == 4 * 96 * 96
    assert f"mIoU {results['miou']:.4f}" in process.out
    pictures = sorted((tmp_path / "run" / "predictions").glob("*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.size == (3 * 96 + 2 * 4, 96)
        found_HWC = np.asarray(picture)
    name, number = pictures[0].stem.rsplit("-", 1)
    with Image.open(few / "masks" / name / f"{number}.png") as mask:
        assert (found_HWC[:, 100:196] == np.asarray(mask.convert("RGB"))).all()
    agreement = (found_HWC[:, 200:] == found_HWC[:, 100:196]).all(-1).mean()
    assert agreement > 0.85


def test_what_a_run_writes(whole: Path, few: Path) -> None:
    results = read_results(whole / "results.json")
    assert results["verb"] == "segment"
    assert results["averaged"]
    assert results["data"]["val"]["images"] == 4
    assert results["settings"]["segment"]["val"] == str(few)
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert set(lines[4]) == {"step", "miou", "pixel_accuracy", "mean_accuracy"}
    assert lines[-1]["miou"] == results["miou"]
    assert (whole / "indexes" / "train.parquet").is_file()
    assert not (few / "index.parquet").exists()
    assert not (whole / "evaluation").exists()
    # The averaged weights are those that count.
    state = json.loads((list_checkpoints(whole / "checkpoints")[-1] / "state.json").read_text())
    assert (state["task"], state["step"], len(state["classes"])) == ("segment", STEPS, 11)


def test_results_are_those_of_the_averaged_weights(whole: Path) -> None:
    """Judged anew in this process, from the checkpoint: the very figures; the others' are other figures."""
    run = built(whole, list_checkpoints(whole / "checkpoints")[-1])
    counts = {}
    for name, model in (("averaged", run.trained), ("last", run.model)):
        confusion = Confusion(11, ONE.device)
        assert run.judge()(model, run.share(), confusion, lambda: False)
        counts[name] = confusion
    results = read_results(whole / "results.json")
    assert counts["averaged"].figures().miou == pytest.approx(results["miou"])
    assert counts["averaged"].counts_CC.tolist() != counts["last"].counts_CC.tolist()
    assert run.model.training


def test_killed_and_resumed(segment: Segment, whole: Path, tmp_path: Path) -> None:
    """Every loss, every tensor and every figure as if nobody had stopped it."""
    run = tmp_path / "run"
    settings = {"train__ema_decay": 0.5, "train__checkpoint_every": 2, "train__keep_checkpoints": 0}
    settings["segment__evaluate_every"] = 4
    process = segment(run, **settings)
    process.wait_until(lambda: len(list_checkpoints(run / "checkpoints")) >= 1)
    process.send(signal.SIGKILL)
    process.wait()
    process = segment(run, resume="auto", **settings)
    assert process.wait() == 0, process.err
    assert "resumed   at step" in process.out
    assert read_metrics(run)[-1] == read_metrics(whole)[-1]
    assert losses_of(run) == losses_of(whole)
    ones, others = (tensors(each / "checkpoints" / f"step-{STEPS:08d}") for each in (run, whole))
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        assert torch.equal(value, others[name]), name
    found, expected = (read_results(each / "results.json") for each in (run, whole))
    assert found["per_class"] == expected["per_class"]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def test_the_last_evaluation_goes_on_where_it_was_killed(whole: Path, tmp_path: Path) -> None:
    """Stopped after one image and after three: counts are kept, no image counts twice, then nothing is left to do."""
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    config = (copied / "config.yaml").read_text().replace(str(whole), str(copied))
    (copied / "config.yaml").write_text(config)
    expected = read_results(copied / "results.json")
    (copied / "results.json").unlink()
    run = built(copied, list_checkpoints(copied / "checkpoints")[-1])
    for images in (1, 2):
        asked = iter(range(10))
        with pytest.raises(Preempted, match="4 images are judged"):
            finish(run, lambda asked=asked, images=images: next(asked) >= images)
    with np.load(copied / "evaluation" / "rank0-of-1.npz") as kept:
        assert (int(kept["done"]), int(kept["counts"].sum())) == (3, 3 * 96 * 96)
    assert not (copied / "results.json").exists()
    judged: list[int] = []
    judge = run.judge()
    read = type(judge).read
    try:
        type(judge).read = lambda self, number: judged.append(number) or read(self, number)  # type: ignore[method-assign]
        content = finish(run, lambda: False)
    finally:
        type(judge).read = read  # type: ignore[method-assign]
    assert judged == [3]
    assert (content["per_class"], content["miou"]) == (expected["per_class"], expected["miou"])
    stamp = (copied / "results.json").stat().st_mtime_ns
    assert finish(run, lambda: True)["miou"] == content["miou"]  # it is there already
    assert (copied / "results.json").stat().st_mtime_ns == stamp
    with torch.no_grad():
        next(run.trained.parameters()).add_(0.1)  # other weights: other figures
    with pytest.raises(Preempted):
        finish(run, lambda: True)


def test_a_complete_run_only_judges(segment: Segment, whole: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    (copied / "results.json").unlink()
    process = segment(
        copied, resume="auto", train__ema_decay=0.5, train__checkpoint_every=2, train__keep_checkpoints=0,
        segment__evaluate_every=4,
    )  # fmt: skip
    assert process.wait() == 0, process.err
    assert "The run is complete: 6 steps" in process.out
    assert read_results(copied / "results.json")["per_class"] == read_results(whole / "results.json")["per_class"]


@pytest.mark.slow
def test_two_ranks_draw_the_same(launcher: Launcher, words: Words, tmp_path: Path) -> None:
    """Batch norm alone sees other batches, so losses are near each other, not equal; each image counts once."""
    settings: dict[str, Any] = {"train__steps": 2, "train__checkpoint_every": 1, "segment__evaluate_every": 1}
    given = {ranks: words(tmp_path / str(ranks), **settings) for ranks in (1, 2)}
    for process in launcher.start_ranks([given[1]]) + launcher.start_ranks([given[2]] * 2):
        assert process.wait() == 0, process.err
    one, two = (read_results(tmp_path / str(ranks) / "results.json") for ranks in (1, 2))
    assert sum(each["pixels"] for each in two["per_class"].values()) == 4 * 96 * 96
    assert {name: each["pixels"] for name, each in one["per_class"].items()} == {
        name: each["pixels"] for name, each in two["per_class"].items()
    }
    first = [losses_of(tmp_path / str(ranks))[1] for ranks in (1, 2)]
    assert first[0] == pytest.approx(first[1], rel=0.2)
    # Of the batch norm that no other precedes, the ranks' mean is the whole batch's: what was drawn is the same.
    name = "segmenter:pyramid.0.1.running_mean"
    means = [tensors(tmp_path / str(ranks) / "checkpoints" / "step-00000001")[name] for ranks in (1, 2)]
    torch.testing.assert_close(*means, atol=1e-6, rtol=1e-4)
    assert float(means[0].abs().max()) > 1e-3
    assert len(read_metrics(tmp_path / "2")) == 4


def test_a_pre_training_run_is_segmented(
    launcher: Launcher, scenes: Path, segment: Segment, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny, "data.index": scenes, "train.steps": 1, "student.depth": 2, "run.dir": tmp_path / "pre"}
    launcher.run("train", *arguments(settings))
    process = segment(tmp_path / "run", model=tmp_path / "pre", train__steps=1, data__image_size=96)
    assert process.wait() == 0, process.err
    assert f"of {tmp_path / 'pre'}, step 1" in process.out
    assert "6 x 6 patches" in process.out
    process = segment(tmp_path / "scratch", "--from-scratch", model=tmp_path / "pre", train__steps=1)
    assert process.wait() == 0, process.err
    fingerprints = [
        read_results(tmp_path / name / "results.json")["backbone"]["fingerprint"] for name in ("run", "scratch")
    ]
    assert fingerprints[0] != fingerprints[1]
    # A segmentation run is no pre-training run.
    with pytest.raises(DataError, match="of no pre-trained student, but of a run of the task segment"):
        load_backbone(BackboneSource(str(tmp_path / "run")))


def test_bad_input_gets_one_paragraph(fail: Callable[..., str], few: Path, whole: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(few, tmp_path / "bad"))
    masks = sorted((bad / "masks").rglob("*.png"))
    masks[0].unlink()
    said = fail(3, tmp_path / "1", segment__train=bad)
    assert "1 of 4 masks can't be used" in said
    assert str(masks[0]) in said
    assert "2 images or more" in fail(2, tmp_path / "2", train__batch_size=1)
    assert "Take a multiple of 16" in fail(2, tmp_path / "3", data__image_size=72)
    assert "Did you mean vit_tiny_patch16_224" in fail(2, tmp_path / "4", model="vit_tinny_patch16_224")
    assert "no block 9" in fail(2, tmp_path / "5", segment__blocks=(0, 1, 2, 9))
    assert "already holds a run" in fail(2, whole)


def test_a_bad_value_on_the_way_loses_nothing(
    fail: Callable[..., str], segment: Segment, few: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(few, tmp_path / "bad"))
    for file in sorted((bad / "masks").rglob("*.png"))[:1]:
        Image.fromarray(np.full((96, 96), 77, np.uint8)).save(file)
    message = fail(3, tmp_path / "run", segment__train=bad, train__steps=50)
    assert "values that mean nothing: 77" in message
    assert str(file) in message
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1
    shutil.copy(few / file.relative_to(bad), file)
    steps = max(STEPS, json.loads((saved[0] / "state.json").read_text())["step"] + 1)
    process = segment(tmp_path / "run", segment__train=bad, train__steps=steps, resume="auto")
    assert process.wait() == 0, process.err


def test_going_on_with_something_else(fail: Callable[..., str], whole: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / "run"))
    resumed: dict[str, Any] = {"resume": "auto", "train__steps": 8}
    said = fail(3, copied, model=export(tmp_path / "other"), **resumed)
    assert "began with another network" in said
    assert "scale was [0.5, 2.0], is [1.0, 2.0]" in fail(2, copied, segment__scale=(1, 2), **resumed)
    assert "segment.blocks was" in fail(2, copied, segment__blocks=(0, 0, 1, 3), **resumed)


def test_the_command_line(
    words: Words, network: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MODEL is the first word or a setting; --print-config shows what is in force and loads nothing."""
    (tmp_path / "config.yaml").write_text(f"segment: {{model: {network}, stride: 32}}\n")
    given = words(tmp_path / "run", "--config", tmp_path / "config.yaml", "--print-config", model="--from-scratch")
    assert main(list(map(str, given))) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load_settings(SegmentSettings, tmp_path / "printed.yaml")
    assert (printed.segment.model, printed.segment.stride, printed.segment.from_scratch) == (str(network), 32, True)
    assert printed.segment.train == str(few)
    assert not (tmp_path / "run").exists()
