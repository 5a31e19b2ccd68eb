"""Frozen features against timm's own modules, and their files: killed and resumed, damaged, of something else."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mvp_fast.config.schema import DataConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.evaluate.backbone import Backbone
from mvp_fast.evaluate.feature_cache import FeatureCache, Features
from mvp_fast.evaluate.features import Extraction, find_features, layer_names, make_features, own_pooling, poolings
from mvp_fast.loaders.passage import passage
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index

CPU = torch.device("cpu")
HOW = Extraction(batch_size=20, data=DataConfig(loader="torchvision", threads=1))
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}


def network(name: str = "vit_tiny_patch16_224", seed: int = 0, **arguments: Any) -> Backbone:
    """A small network whose every weight has moved from where it began."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **{**SMALL, **arguments})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return Backbone(model, name).eval()


def part(scenes: Path, images: int = 96) -> Index:
    return Index.open(scenes).subset(np.arange(images))


def values(features: Features) -> np.ndarray:
    return np.asarray(features.values_NLPD[features.places_K])


@pytest.mark.parametrize(
    ("network_of", "own"),
    [
        (lambda: network(), "cls"),
        (lambda: network(class_token=False, global_pool="avg"), "mean"),
        (lambda: network("vit_base_patch16_reg4_gap_256"), "mean"),
        (lambda: network("beitv2_base_patch16_224", global_pool="avg"), "mean"),
        (lambda: network("deit3_small_patch16_224"), "cls"),
    ],
    ids=["CLS", "no CLS", "registers, no CLS", "BEiT", "DeiT III"],
)
def test_features_are_those_of_the_modules(scenes: Path, tmp_path: Path, network_of: Any, own: str) -> None:
    backbone, index = network_of(), part(scenes, 30)
    features = make_features(tmp_path, backbone, index, HOW, CPU)
    assert values(features).shape == (30, 4, len(poolings(backbone)), 24)
    assert features.values_NLPD.dtype == np.float32
    assert layer_names(backbone) == ["block 1", "block 2", "block 3", "final norm"]
    assert own_pooling(backbone) == own

    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in backbone.model.blocks]
    plan = CentrePlan(index, batch_size=30, image_size=32, patch_size=8)
    with torch.no_grad():
        (crops,) = passage(plan, replace(HOW.data, image_size=32), CPU)
        tokens_BND = backbone.model.forward_features(backbone.pixels(crops.images_BHWC))
        pooled_BD = backbone.model.forward_head(tokens_BND, pre_logits=True)
    for hook in hooks:
        hook.remove()
    prefix = tokens_BND.shape[1] - 16
    for layer, out_BND in enumerate(outputs):
        expected = {"cls": out_BND[:, 0], "mean": out_BND[:, prefix:].mean(1)}
        for way, pooling in enumerate(poolings(backbone)):
            found = torch.from_numpy(features.column(layer, way)[0:30])
            torch.testing.assert_close(found, expected[pooling], atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # forward_features ends with the norm of tokens, where there is one
        expected = {"cls": tokens_BND[:, 0], "mean": tokens_BND[:, prefix:].mean(1)}
        expected = {pooling: backbone.model.fc_norm(out_BD) for pooling, out_BD in expected.items()}
    for way, pooling in enumerate(poolings(backbone)):
        found = torch.from_numpy(features.column(3, way)[0:30])
        torch.testing.assert_close(found, expected[pooling], atol=1e-5, rtol=1e-5)
    last = torch.from_numpy(features.column(3, poolings(backbone).index(own))[0:30])
    torch.testing.assert_close(last, pooled_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [20, 7])
def test_a_killed_extraction_goes_on_where_it_was(scenes: Path, tmp_path: Path, batch_size: int) -> None:
    """What a kill leaves is what is on disk: a copy of the folder, made between two batches."""
    backbone, index = network(), part(scenes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def copy(done: int) -> None:
        if done == 40:
            shutil.copytree(whole, killed)

    expected = make_features(whole, backbone, index, HOW, CPU, copy, seconds_at_risk=0)
    assert find_features(killed, backbone, index, HOW, CPU) is None
    told: list[int] = []
    found = make_features(killed, backbone, index, replace(HOW, batch_size=batch_size), CPU, told.append)
    first = (40 // batch_size + 1) * batch_size
    assert told == [*range(first, 96, batch_size), 96, 96]  # nothing before was computed again
    np.testing.assert_allclose(values(found), values(expected), atol=1e-5)
    assert found.rows_K.tolist() == list(range(96))

    told.clear()
    again = make_features(killed, backbone, index, HOW, CPU, told.append)
    assert told == []
    assert (values(again) == values(found)).all()
    complete = find_features(killed, backbone, index, HOW, CPU)
    assert complete is not None
    assert (values(complete) == values(found)).all()


def test_an_interrupted_one_loses_nothing(scenes: Path, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_features(tmp_path, network(), part(scenes), HOW, CPU, stop)
    told: list[int] = []
    make_features(tmp_path, network(), part(scenes), HOW, CPU, told.append)
    assert told[0] == 80


def test_samples_that_do_not_decode_are_left_out(scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(scenes, folder)
    build_index(folder, workers=1)
    index = Index.open(folder)
    expected = make_features(tmp_path / "sound", network(), index, HOW, CPU)
    broken = [3, 59, *range(80, 96)]  # and the whole last batch
    for row in broken:
        index.file(row).write_bytes(bytes(index.file(row).stat().st_size))
    how = replace(HOW, data=replace(HOW.data, bad_sample_budget=0.5))
    made = tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        make_features(made, network(), index, how, CPU, lambda done: _stop() if done == 40 else None)
    found = make_features(made, network(), index, how, CPU)
    assert found.bad == tuple(broken)
    assert found.rows_K.tolist() == [row for row in range(96) if row not in broken]
    np.testing.assert_allclose(values(found), values(expected)[found.rows_K], atol=1e-5)
    ledger = next(made.glob("*/bad_samples.jsonl")).read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in ledger) == sorted(index.key(row) for row in broken)
    some = found.of_rows(np.array([59, 60, 2, 81]))
    assert (some.rows_K.tolist(), some.bad) == ([2, 60], (59, 81))
    assert (values(some) == values(found)[[2, 58]]).all()
    with pytest.raises(DataError, match="bad_sample_budget"):
        make_features(tmp_path / "strict", network(), index, HOW, CPU)


def _stop() -> None:
    raise KeyboardInterrupt


def test_features_of_something_else_are_never_taken(scenes: Path, tmp_path: Path) -> None:
    index = part(scenes, 20)
    make_features(tmp_path, network(), index, HOW, CPU)
    others = [
        (network(seed=1), index, HOW),
        (network(), part(scenes, 21), HOW),
        (network(img_size=40), index, HOW),
        (network(), index, replace(HOW, share=0.9)),
        (network(), index, replace(HOW, precision="bf16")),
        (network(), index, replace(HOW, data=replace(HOW.data, interpolation="bilinear"))),
        (network(), index, replace(HOW, data=replace(HOW.data, loader="cpu"))),
    ]
    for backbone, other, how in others:
        assert find_features(tmp_path, backbone, other, how, CPU) is None
    # threads and batch size change nothing
    same = replace(HOW, batch_size=3, data=replace(HOW.data, threads=2))
    assert find_features(tmp_path, network(), index, same, CPU) is not None


@pytest.mark.parametrize("damage", ["about", "cut", "progress", "no progress"])
def test_damaged_files_are_made_anew(scenes: Path, tmp_path: Path, damage: str) -> None:
    index = part(scenes, 40)
    expected = values(make_features(tmp_path, network(), index, HOW, CPU)).copy()
    (folder,) = tmp_path.iterdir()
    if damage == "about":
        about = json.loads((folder / "about.json").read_text())
        (folder / "about.json").write_text(json.dumps({**about, "backbone": "another"}))
    elif damage == "cut":
        with (folder / "features.npy").open("r+b") as file:
            file.truncate(5000)
    elif damage == "progress":
        (folder / "progress.json").write_text('{"done": 4')
    else:
        (folder / "progress.json").unlink()
    assert find_features(tmp_path, network(), index, HOW, CPU) is None
    told: list[int] = []
    found = make_features(tmp_path, network(), index, HOW, CPU, told.append)
    assert told[0] == 20
    assert (values(found) == expected).all()


def test_bf16_is_kept_as_float16(scenes: Path, tmp_path: Path) -> None:
    index = part(scenes, 20)
    exact = values(make_features(tmp_path, network(), index, HOW, CPU))
    features = make_features(tmp_path, network(), index, replace(HOW, precision="bf16"), CPU)
    assert features.values_NLPD.dtype == np.float16
    rough = values(features).astype(np.float32)
    assert 1e-5 < np.abs(rough - exact).mean() < 0.02 * np.abs(exact).mean()


class Scaled(nn.Module):
    """A block whose output is multiplied."""

    def __init__(self, block: nn.Module, factor: float) -> None:
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, x_BND: Tensor) -> Tensor:
        """Its output."""
        return self.block(x_BND) * self.factor


@pytest.mark.parametrize(
    ("factor", "precision", "kind", "message"),
    [(1e7, "bf16", ConfigError, "Take --precision fp32"), (float("nan"), "fp32", DataError, "not finite")],
)
def test_features_that_can_not_be_kept(
    scenes: Path, tmp_path: Path, factor: float, precision: Any, kind: type[Exception], message: str
) -> None:
    backbone = network()
    backbone.model.blocks[1] = Scaled(backbone.model.blocks[1], factor)
    with pytest.raises(kind, match=message):
        make_features(tmp_path, backbone, part(scenes, 20), replace(HOW, precision=precision), CPU)


def test_one_process_writes_at_a_time(scenes: Path, tmp_path: Path) -> None:
    index = part(scenes, 20)
    make_features(tmp_path, network(), index, HOW, CPU)
    (folder,) = tmp_path.iterdir()
    with (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="Another process"):
            make_features(tmp_path, network(), index, HOW, CPU)
    make_features(tmp_path, network(), index, HOW, CPU)


def test_no_room_and_no_rights(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, {"shape": [10**10, 13, 2, 768]}, np.float32)
    with cache.locked(), pytest.raises(EnvironmentProblem, match=r"The features take 798,720\.0 GB"):
        cache.begin()
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", {"shape": [1, 1, 1, 1]}, np.float32)
    with pytest.raises(EnvironmentProblem, match="can't be written"), cache.locked():
        pass


def test_parts_and_columns() -> None:
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(12, 3, 2, 5)).astype(np.float32)
    places = np.array([7, 2, 11, 0])
    features = Features(stored, np.array([1, 4, 6, 9]), places)
    assert len(features) == 4
    column = features.column(1, 0)
    assert column.shape == (4, 5)
    assert (column[1:3] == stored[[2, 11], 1, 0]).all()
    assert (column[2:99] == stored[[11, 0], 1, 0]).all()
    assert (features.gather(np.array([3, 0]), [2, 0]) == stored[[0, 7]][:, [2, 0]].reshape(2, 2, 10)).all()
    turned = features.at(np.array([3, 1]))
    assert (turned.rows_K.tolist(), turned.places_K.tolist()) == ([9, 4], [0, 2])
