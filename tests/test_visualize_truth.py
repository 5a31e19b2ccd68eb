"""How well a map finds what the masks say is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import DataError
from mvp_fast.evaluate.visualize import truth
from mvp_fast.evaluate.visualize.images import from_index
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index


def test_coverage_is_counted_pixel_by_pixel(tmp_path: Path) -> None:
    """Of an image wider than high, whose central 64 pixels are four whole patches down and across."""
    (tmp_path / "a").mkdir()
    (tmp_path / "masks" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((64, 150, 3), dtype=np.uint8)).save(tmp_path / "a" / "0.png")
    mask = np.random.default_rng(0).integers(0, 3, (64, 150), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks" / "a" / "0.png")
    (tmp_path / "scenes.json").write_text('{"mask_legend": {"0": "ground", "1": "box", "2": "ball"}}')
    build_index(tmp_path, workers=1)
    index = Index.open(tmp_path)
    assert truth.legend(index) == {"box": 1, "ball": 2}
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    shown = from_index(index, np.array([0]), data, 16, 1.0, torch.device("cpu"))
    expected = (mask[:, 43:107] == 2).reshape(4, 16, 4, 16).mean((1, 3)).ravel()
    np.testing.assert_allclose(truth.coverage(shown, 2)[0], expected, atol=1e-6)
    Image.fromarray(mask[:50]).save(tmp_path / "masks" / "a" / "0.png")
    with pytest.raises(DataError, match="The mask has 150x50 pixels, its image 150x64"):
        truth.coverage(shown, 2)
    (tmp_path / "masks" / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="The mask can't be read"):
        truth.coverage(shown, 2)


def test_figures_of_masks(scenes: Path) -> None:
    """A map made of the masks finds all, its opposite nothing; any other what counting pairs and ranks says."""
    index = Index.open(scenes)
    words = truth.legend(index)
    assert (words["square"], len(words)) == (8, 10)
    assert [truth.named(text, words) for text in ("two red Squares", "grass", "a star on a ring", "box")] == [
        *("square", None, None, None)
    ]
    rows = np.flatnonzero(index.label == index.classes.index("square"))[:3]
    rows = np.r_[rows, np.flatnonzero(index.label == index.classes.index("ring"))[:2]]
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    shown = from_index(index, rows, data, 16, 2 / 3, torch.device("cpu"))
    covered = truth.coverage(shown, words["square"])
    map_BTM = torch.from_numpy(covered)[:, None].repeat(1, 3, 1) * torch.tensor([0.3, -0.3, 1])[:, None]
    best, worst = truth.figures(map_BTM, shown, ["a square", "a red square", "grass"], words)
    assert best["roc_auc"] == best["average_precision"] == pytest.approx(1)
    assert worst["roc_auc"] == pytest.approx(0)
    assert best["patches"] == pytest.approx(float((covered >= 0.5).mean()))
    assert 3 <= best["images_with_it"] <= 5
    noise_BTM = torch.rand(5, 1, 16) * 2 - 1
    chance = truth.figures(noise_BTM, shown, ["square"], words)[0]
    score, of_it = noise_BTM.numpy().ravel(), covered.ravel() >= 0.5
    assert chance["roc_auc"] == pytest.approx(float((score[of_it][:, None] > score[~of_it]).mean()))
    precision = [of_it[score >= each].mean() for each in score[of_it]]
    assert chance["average_precision"] == pytest.approx(float(np.mean(precision)), abs=1e-6)
    nowhere = words | {"circle": 99}
    assert truth.figures(noise_BTM, shown, ["circle"], nowhere)[0]["roc_auc"] is None
