"""`mvp-fast probe` as a whole: known accuracies, equal networks, results found again, and sets that do not fit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from scipy.stats import binomtest
from timm.models import save_for_hf

from mvp_fast.cli.main import main
from mvp_fast.config.schema import DataConfig
from mvp_fast.evaluate.backbone import Backbone
from mvp_fast.evaluate.duplicates import duplicates
from mvp_fast.evaluate.progress import progress
from mvp_fast.evaluate.results import read_results
from mvp_fast.evaluate.scores import scored, wilson
from mvp_fast.loaders.passage import passage
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from tests.conftest import Launcher, arguments

CPU = torch.device("cpu")
UNTRAINED = ("vit_tiny_patch16_224", "--untrained", "--image-size", "32")
QUICK = ("--epochs", "3", "--head-batch-size", "16", "--loader", "torchvision", "--threads", "1", "--device", "cpu")


def probe(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    """Run the verb here and return what it printed."""
    capsys.readouterr()
    found = main(["probe", *QUICK, *map(str, words)])
    shown = capsys.readouterr()
    assert found == code, shown.err
    return shown.err if code else shown.out


def copied(scenes: Path, folder: Path, keys: list[str]) -> Path:
    """A set of some of the scenes."""
    for key in keys:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(scenes / key, folder / key)
    build_index(folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def halves(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two thirds of the scenes and the others, every class in both; read only."""
    index, folder = Index.open(scenes), tmp_path_factory.mktemp("halves")
    keys = [index.key(i) for i in range(len(index))]  # sorted by class
    both = [key for i, key in enumerate(keys) if i % 3], [key for i, key in enumerate(keys) if not i % 3]
    classes = {key.split("/")[0] for key in keys}
    assert all({key.split("/")[0] for key in half} == classes for half in both)
    return copied(scenes, folder / "train", both[0]), copied(scenes, folder / "test", both[1])


def stripes(folder: Path, images: int, seed: int) -> Path:
    """Gratings of four directions on noise, in any phase and colour; some too faint to tell."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32]
    for number in range(images):
        direction = number % 4
        angle = np.pi * direction / 4
        wave = np.sin(0.8 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
        faint = rng.uniform() < 0.25
        signal_HW1 = (0.0 if faint else 50) * wave[..., None] * rng.choice([-1, 1], size=3)
        pixels = rng.uniform(90, 165, size=3) + signal_HW1 + rng.normal(0, 25, size=(32, 32, 3))
        path = folder / f"direction-{direction}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    build_index(folder, workers=1)
    return folder


def crops_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All crops of a set, and their classes."""
    index = Index.open(folder)
    plan = CentrePlan(index, batch_size=len(index), image_size=32, patch_size=8, share=1.0)
    (crops,) = passage(plan, DataConfig(image_size=32, loader="torchvision", threads=1), CPU)
    return crops.images_BHWC, torch.from_numpy(index.label.astype(np.int64))


def test_a_supervised_network_has_its_known_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained with a head of its own, whose accuracy on the test set is known; a quarter of the images say nothing."""
    train, test = stripes(tmp_path / "train", 400, 0), stripes(tmp_path / "test", 400, 1)
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
        save_for_hf(model, str(tmp_path / "fresh"), model_args=arguments)
        backbone = Backbone(model, "supervised")
        images_BHWC, label_B = crops_of(train)
        x_BCHW = backbone.pixels(images_BHWC)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(18):
            for rows in torch.randperm(400).split(50):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x_BCHW[rows]), label_B[rows]).backward()
                optimizer.step()
    save_for_hf(model, str(tmp_path / "supervised"), model_args=arguments)
    with torch.no_grad():
        images_BHWC, label_B = crops_of(test)
        known = float((model.eval()(backbone.pixels(images_BHWC)).argmax(1) == label_B).double().mean())
    assert 0.72 < known < 0.88  # a quarter can only be guessed, so a leak would show too

    found = {}
    for name in ("supervised", "fresh"):
        words = (tmp_path / name, "--train", train, "--test", test, "--out", tmp_path / "out" / name)
        probe(capsys, *words, "--crop-share", "1.0", "--epochs", "20", "--head-batch-size", "32")
        found[name] = read_results(tmp_path / "out" / name / "results.json")
    linear, nearest = found["supervised"]["linear"]["test"], found["supervised"]["knn"]["k"]["20"]
    assert abs(linear["accuracy"] - known) < 0.04
    assert abs(nearest["accuracy"] - known) < 0.04
    low, high = linear["interval95"]
    assert low < known < high
    assert found["fresh"]["knn"]["k"]["20"]["accuracy"] < known - 0.1
    assert found["fresh"]["linear"]["test"]["accuracy"] < known - 0.1
    np.testing.assert_allclose(np.mean(list(linear["per_class"].values())), linear["accuracy"])  # equal classes


def test_an_export_has_the_result_of_its_run(
    launcher: Launcher,
    scenes: Path,
    tiny: dict[str, Any],
    halves: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    settings = {**tiny, "data.index": scenes, "run.dir": run, "train.steps": 3}
    launcher.run("train", *arguments(settings))
    assert main(["export", str(run), "--format", "timm"]) == 0
    sets = ("--train", halves[0], "--test", halves[1])
    probe(capsys, run, *sets)
    probe(capsys, run / "export" / "timm", *sets, "--out", tmp_path / "of-export")
    of_run, of_export = (read_results(folder / "results.json") for folder in (run / "probe", tmp_path / "of-export"))
    for part in ("knn", "linear", "settings", "data", "classes", "notes"):
        assert of_run[part] == of_export[part]
    assert of_run["backbone"]["fingerprint"] == of_export["backbone"]["fingerprint"]
    assert (of_run["backbone"]["step"], of_export["backbone"]["step"]) == (3, None)
    assert [row["layer"] for row in of_run["linear"]["layers"]] == ["block 1", "block 2", "final norm"]
    assert of_run["knn"]["pooling"] == "mean"


def test_results_are_found_again(halves: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*UNTRAINED, "--train", halves[0], "--test", halves[1], "--out", tmp_path)
    shown = probe(capsys, *words)
    written = (tmp_path / "results.json").read_text()
    assert "found     " not in shown
    lines = shown.splitlines()
    assert next(line for line in lines if line.startswith("20-NN")).endswith("; final norm, cls")
    assert sum("block" in line and "%" in line for line in lines) >= 12

    again = probe(capsys, *words)
    assert "found     " in again
    assert again[again.index("Accuracy") :] == shown[shown.index("Accuracy") :]
    assert (tmp_path / "results.json").read_text() == written

    shown = probe(capsys, *words, "--overwrite")
    assert "of the training set: found, 64 images" in shown
    anew = read_results(tmp_path / "results.json")
    assert {**json.loads(written), "date": 0, "command": 0} == {**anew, "date": 0, "command": 0}  # deterministic

    shown = probe(capsys, *words, "--label-fraction", "0.5", "--k", "50")
    assert "earlier   results are now results-" in shown
    (aside,) = tmp_path.glob("results-*.json")
    assert json.loads(aside.read_text()) == anew
    half = read_results(tmp_path / "results.json")
    assert half["linear"]["trained_on"] == half["images"]["train"] < 40
    assert any("k 50 is more than" in note for note in half["notes"])

    # Without the whole set's features those of the part are made: the same ones.
    probe(capsys, *words[:-1], tmp_path / "part", "--label-fraction", "0.5", "--k", "50")
    alone = read_results(tmp_path / "part" / "results.json")
    assert len(list((tmp_path / "part" / "features").iterdir())) == 2
    assert (alone["knn"], alone["linear"]) == (half["knn"], half["linear"])


def test_the_test_set_decides_nothing(
    halves: tuple[Path, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the classes of the test images mixed up, layer and learning rate are those chosen before."""
    index = Index.open(halves[1])
    keys = [index.key(i) for i in range(len(index))]
    for key, other in zip(keys, np.random.default_rng(0).permutation(keys), strict=True):
        wrong = tmp_path / "mixed" / Path(key).parent / f"{Path(other).parent}-{Path(other).name}"
        wrong.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(halves[1] / other, wrong)
    build_index(tmp_path / "mixed", workers=1)
    found = []
    for test in (halves[1], tmp_path / "mixed"):
        out = tmp_path / f"out-{len(found)}"
        probe(capsys, *UNTRAINED, "--train", halves[0], "--test", test, "--out", out)
        found.append(read_results(out / "results.json"))
    before, after = found
    for part in ("chosen", "layers", "held_out_images"):
        assert before["linear"][part] == after["linear"][part]
    assert before["linear"]["test"]["per_class"] != after["linear"]["test"]["per_class"]


def test_images_in_both_sets_and_bad_ones_are_told(
    halves: tuple[Path, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, other = Index.open(halves[0]), Index.open(halves[1])
    test = tmp_path / "test"
    shutil.copytree(halves[1], test)
    for row in (5, 40):  # under another name
        shutil.copyfile(index.file(row), test / f"{index.key(row)[:-4]}-again.jpg")
    build_index(test, workers=1)
    broken = test / other.key(7)
    broken.write_bytes(bytes(broken.stat().st_size))
    shown = probe(capsys, *UNTRAINED, "--train", halves[0], "--test", test, "--out", tmp_path / "out")
    results = read_results(tmp_path / "out" / "results.json")
    again = sorted(f"{index.key(row)[:-4]}-again.jpg" for row in (5, 40))
    assert results["test_images_in_training_set"] == {"count": 2, "keys": again}
    assert results["undecoded"] == {"train": [], "test": [other.key(7)]}
    assert results["images"]["test"] == results["linear"]["test"]["images"] == 32 + 2 - 1
    assert "2 test images are in the training set too, byte for byte" in shown
    assert f"not decoded and left out of the test set: 1, such as {other.key(7)}" in shown


def test_duplicates_are_equal_in_every_byte(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(scenes, folder)
    first = Index.open(folder).file(10)
    data = bytearray(first.read_bytes())
    data[-3] ^= 1  # the same length and size, the same middle
    first.write_bytes(bytes(data))
    build_index(folder, workers=1)
    told: list[int] = []
    found = duplicates(Index.open(scenes), Index.open(folder), told.append)
    assert found.tolist() == [row for row in range(96) if row != 10]
    assert told[-1] == 192
    Index.open(folder).file(11).unlink()
    assert len(duplicates(Index.open(scenes), Index.open(folder))) == 94
    assert len(duplicates(Index.open(scenes).subset(np.arange(5)), Index.open(scenes).subset(np.arange(5, 9)))) == 0


def test_a_killed_probe_goes_on(
    halves: tuple[Path, Path], tmp_path: Path, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while features are made or after: the same command comes to the result of one that was left alone."""
    words = (*UNTRAINED, "--train", halves[0], "--test", halves[1], "--batch-size", 2)
    killed = launcher.start("probe", *words, *QUICK, "--out", tmp_path / "killed")
    killed.wait_until(lambda: any((tmp_path / "killed" / "features").glob("*/features.npy")))
    killed.send(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    for name in ("killed", "alone"):
        probe(capsys, *words, "--out", tmp_path / name)
    killed_one, alone = (read_results(tmp_path / name / "results.json") for name in ("killed", "alone"))
    assert (killed_one["knn"], killed_one["linear"]) == (alone["knn"], alone["linear"])


def test_sets_that_do_not_fit(
    halves: tuple[Path, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking, flat = tmp_path / "lacking", tmp_path / "flat"
    shutil.copytree(halves[1], lacking)
    shutil.rmtree(lacking / "heart")
    build_index(lacking, workers=1)
    flat.mkdir()
    for number, file in enumerate(sorted(halves[1].glob("star/*.jpg"))):
        shutil.copyfile(file, flat / f"{number}.jpg")
    build_index(flat, workers=1)
    out = ("--out", tmp_path / "out")
    error = probe(capsys, *UNTRAINED, "--train", halves[0], "--test", lacking, *out, code=3)
    assert "The test set has no image of the class 'heart'" in error
    assert str(lacking) in error
    error = probe(capsys, *UNTRAINED, "--train", lacking, "--test", halves[1], *out, code=3)
    assert "The training set has no image of the class 'heart'" in error
    error = probe(capsys, *UNTRAINED, "--train", halves[0], "--test", flat, *out, code=3)
    assert "In the test set the images have no class" in error
    assert not (tmp_path / "out").exists()

    one = tmp_path / "one"  # of a class, all images broken
    shutil.copytree(halves[1], one)
    for file in one.glob("heart/*.jpg"):
        file.write_bytes(bytes(file.stat().st_size))
    budget = len(list(one.glob("heart/*.jpg")))
    assert budget == 1 or "bad" in probe(capsys, *UNTRAINED, "--train", halves[0], "--test", one, *out, code=3)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("vit_bse_patch16_224",), 2, "Did you mean vit_base_patch16_224"),
        ((os.curdir,), 3, "no checkpoint"),
        ((*UNTRAINED, "--k", "0"), 2, "--k 0"),
        ((*UNTRAINED, "--lr", "0.1", "-1"), 2, "--lr 0.1 -1.0"),
        ((*UNTRAINED, "--label-fraction", "1.5"), 2, "--label-fraction 1.5"),
        ((*UNTRAINED, "--held-out", "0", "--batch-size", "0"), 2, "--held-out 0.0, --batch-size 0"),
        ((*UNTRAINED, "--crop-share", "nan"), 2, "--crop-share nan"),
        ((*UNTRAINED, "--temperature", "0"), 2, "--temperature 0.0"),
        ((*UNTRAINED, "--threads", "-1"), 2, "-1 threads"),
        ((*UNTRAINED, "--loader", "ffcv"), 2, "area"),
        ((*UNTRAINED, "--train", "nowhere"), 3, "There is no index here (nowhere)"),
        ((*UNTRAINED, "--label-fraction", "0.001"), 3, "No class has two training images"),
    ],
    ids=lambda value: "" if isinstance(value, int | str) else " ".join(value[-2:]),
)
def test_what_can_not_be_probed(
    words: tuple[str, ...],
    code: int,
    message: str,
    halves: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    defaults = ("--train", str(halves[0]), "--test", str(halves[1]), "--out", "out", *QUICK)
    given = [words[0], *defaults, *words[1:]]
    assert main(["probe", *given]) == code
    assert message in capsys.readouterr().err


def test_intervals_are_wilsons() -> None:
    for correct, total in ((0, 7), (7, 7), (1, 3), (431, 500), (49_000, 50_000)):
        expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(wilson(correct, total), (expected.low, expected.high), atol=1e-12)


def test_scores_by_class_and_by_five() -> None:
    rng = np.random.default_rng(0)
    classes = [f"class {number}" for number in range(12)]
    label_Q: npt.NDArray[np.int64] = rng.permutation(np.arange(240) % 12)
    ranked_QC = np.array([rng.permutation(12) for _ in range(240)])
    found = scored(ranked_QC, label_Q, classes)
    right = [ranked[0] == label for ranked, label in zip(ranked_QC, label_Q, strict=True)]
    assert found["accuracy"] == sum(right) / 240
    among = [label in ranked[:5] for ranked, label in zip(ranked_QC.tolist(), label_Q.tolist(), strict=True)]
    assert found["accuracy_top5"] == sum(among) / 240
    assert found["per_class"]["class 3"] == sum(r for r, label in zip(right, label_Q, strict=True) if label == 3) / 20
    assert "accuracy_top5" not in scored(ranked_QC % 9, label_Q % 9, classes[:9])


def test_progress_without_a_terminal_is_plain_lines() -> None:
    text = io.StringIO()
    with progress("features", 2000, console=Console(file=text), every=0) as tell:
        tell(0)
        tell(1500)
    (line,) = text.getvalue().splitlines()
    assert line.startswith("features  1,500/2,000  ETA 0:0")
    quick = io.StringIO()
    with progress("features", 2000, console=Console(file=quick)) as tell:
        tell(2000)
    assert quick.getvalue() == ""
    shown = io.StringIO()
    with progress("features", 2000, console=Console(file=shown, force_terminal=True, width=80)) as tell:
        tell(1500)
    assert "features" in shown.getvalue()
