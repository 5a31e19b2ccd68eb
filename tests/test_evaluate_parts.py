"""Centre plans, parts of an index, and the networks that are evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mvp_fast.config.schema import DataConfig, StudentConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.results import read_results, write_results
from mvp_fast.export.timm_format import timm_model, write_timm
from mvp_fast.loaders.passage import passage
from mvp_fast.models.student import Student
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index

STUDENT = StudentConfig(width=48, depth=3, heads=3)


def small_student(seed: int = 0) -> Student:
    student = Student(STUDENT, target_width=16, image_size=64, seed=seed)
    with torch.no_grad():  # fresh tables are zero, and zeros are alike wherever they are copied to
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return student


@pytest.mark.parametrize("share", [1.0, 0.875, 0.5])
def test_boxes_are_central_squares(scenes: Path, share: float) -> None:
    index = Index.open(scenes)
    plan = CentrePlan(index, batch_size=7, image_size=64, share=share)
    rows = plan.step(3)
    assert rows.sample_B.tolist() == list(range(21, 28))
    shorter = np.minimum(index.width, index.height)[21:28]
    assert np.abs(rows.width_B - share * shorter).max() <= 0.5
    assert (rows.width_B == rows.height_B).all()
    left_over = index.width[21:28] - rows.width_B - 2 * rows.x_B
    assert set(left_over.tolist()) <= {0, 1}
    assert set((index.height[21:28] - rows.height_B - 2 * rows.y_B).tolist()) <= {0, 1}
    assert not rows.flip_B.any()
    assert rows.masked_BM().shape == (7, 0)


def test_each_sample_counts_once(scenes: Path) -> None:
    index = Index.open(scenes)
    plan = CentrePlan(index, batch_size=7, image_size=64)
    seen = np.concatenate([rows.sample_B[plan.counted(rows)] for rows in map(plan.step, range(plan.steps))])
    assert seen.tolist() == list(range(len(index)))
    halves = [CentrePlan(index, batch_size=8, image_size=64, rank=rank, world=2) for rank in (0, 1)]
    both = np.concatenate([half.step(2).sample_B for half in halves])
    assert both.tolist() == CentrePlan(index, batch_size=8, image_size=64).step(2).sample_B.tolist()


@pytest.mark.parametrize("loader", ["cpu", "torchvision", "dali"])
def test_passage_shows_the_centre_of_each_image(scenes: Path, loader: str) -> None:
    index = Index.open(scenes)
    plan = CentrePlan(index, batch_size=20, image_size=64)
    data = DataConfig(loader=loader, image_size=64, threads=1)  # type: ignore[arg-type]
    found = list(passage(plan, data, torch.device("cpu"), start_step=1))
    assert np.concatenate([crops.sample_B for crops in found]).tolist() == list(range(20, 96))
    sample, image_HWC = int(found[-1].sample_B[-1]), found[-1].images_BHWC[-1].numpy().astype(float)
    rows = plan.rows(0, sample)
    x, y, side = int(rows.x_B[0]), int(rows.y_B[0]), int(rows.width_B[0])
    with Image.open(index.file(sample)) as picture:
        expected = picture.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    assert np.abs(image_HWC - np.asarray(expected)).mean() < 2


def test_a_bad_sample_does_not_count(scenes: Path, tmp_path: Path) -> None:
    import shutil

    from mvp_fast.samples.index_build import build_index

    folder = tmp_path / "set"
    shutil.copytree(scenes, folder)
    build_index(folder, workers=1)
    index = Index.open(folder)
    broken = index.file(5)
    broken.write_bytes(broken.read_bytes()[:64] + bytes(broken.stat().st_size - 64))
    plan = CentrePlan(index, batch_size=16, image_size=64)
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    seen = [sample for crops in passage(plan, data, torch.device("cpu")) for sample in crops.sample_B.tolist()]
    assert seen == [sample for sample in range(96) if sample != 5]


def test_a_part_of_an_index(scenes: Path) -> None:
    index = Index.open(scenes)
    wanted = np.array([90, 3, 4, 50])
    part = index.subset(wanted)
    assert [part.key(i) for i in range(4)] == [index.key(int(i)) for i in wanted]
    assert [part.file(i) for i in range(4)] == [index.file(int(i)) for i in wanted]
    assert part.label.tolist() == index.label[wanted].tolist()
    assert part.classes == index.classes
    assert part.fingerprint() != index.fingerprint()
    part.check_files()
    with pytest.raises(DataError, match="no samples"):
        index.subset(np.array([], dtype=np.int64))


def test_a_part_of_shards(scenes: Path, tmp_path: Path) -> None:
    from tests.conftest import run_verb

    run_verb("data", "convert", scenes, "--to", "shards", "--out", tmp_path / "shards", "--shard-size", 40_000)
    index = Index.open(tmp_path / "shards")
    starts = index.shard_starts()
    assert starts is not None
    assert len(starts) > 3
    wanted = np.array([95, 0, 1, 60, 2])
    part = index.subset(wanted)
    for place, i in enumerate(wanted.tolist()):
        read = [
            (one.file(at).read_bytes()[one.offset[at] : one.offset[at] + one.length[at]])
            for one, at in ((index, i), (part, place))
        ]
        assert read[0] == read[1]


def test_a_run_and_its_export_are_the_same_backbone(tmp_path: Path) -> None:
    student = small_student()
    exported = load_backbone(BackboneSource(str(write_timm(student, tmp_path / "export"))))
    backbone = Backbone(timm_model(student).eval(), "the student")
    assert exported.fingerprint == backbone.fingerprint
    assert Backbone(timm_model(small_student(1)).eval(), "another").fingerprint != backbone.fingerprint
    images_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        found, tokens_BND = backbone.tokens(images_BHWC), student.eval().encode(student.patches(images_BHWC))
        last = found[-1]
        assert last.cls_BD is not None
        whole_BND = student.norm(torch.cat((last.cls_BD[:, None], last.patches_BND), 1))
    assert len(found) == backbone.depth == 3
    torch.testing.assert_close(whole_BND, tokens_BND, atol=1e-5, rtol=1e-5)


def test_a_timm_model() -> None:
    source = BackboneSource("vit_tiny_patch16_224", untrained=True, image_size=64)
    backbone = load_backbone(source)
    assert (backbone.grid, backbone.depth, backbone.width, backbone.image_size) == ((4, 4), 12, 192, 64)
    assert load_backbone(source).fingerprint == backbone.fingerprint
    images_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        tokens = backbone.tokens(images_BHWC)
        x_BND = backbone.model.forward_features(backbone.pixels(images_BHWC))
        last = tokens[-1]
        assert last.cls_BD is not None
        torch.testing.assert_close(backbone.model.norm(last.cls_BD), x_BND[:, 0])
    pooled = timm.create_model("vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg")
    assert Backbone(pooled, "no CLS").tokens(images_BHWC)[0].cls_BD is None
    registers = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, class_token=False, reg_tokens=2, global_pool="avg", no_embed_class=True
    )
    assert Backbone(registers, "registers alone").tokens(images_BHWC)[0].cls_BD is None


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (BackboneSource("vit_bse_patch16_224"), ConfigError, "Did you mean vit_base_patch16_224"),
        (BackboneSource("resnet18", untrained=True), ConfigError, "no plain vision transformer"),
        (BackboneSource("vit_tiny_patch16_224", untrained=True, image_size=65), ConfigError, "65 px"),
        (BackboneSource("vit_tiny_patch16_224"), EnvironmentProblem, "could not be downloaded"),
    ],
    ids=["unknown", "no transformer", "size", "no weights"],
)
def test_what_can_not_be_evaluated(
    source: BackboneSource, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(kind, match=message):
        load_backbone(source)


def test_folders_that_hold_no_network(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint"):
        load_backbone(BackboneSource(str(tmp_path)))
    exported = write_timm(small_student(), tmp_path / "export")
    (exported / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="can't load this folder"):
        load_backbone(BackboneSource(str(exported)))


def test_results_are_written_and_read(tmp_path: Path) -> None:
    write_results(tmp_path / "new" / "results.json", "probe", {"knn": {"accuracy": 0.5}})
    content = read_results(tmp_path / "new" / "results.json")
    assert (content["verb"], content["knn"]) == ("probe", {"accuracy": 0.5})
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(DataError, match="schema 0"):
        read_results(tmp_path / "old.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem):
        write_results(tmp_path / "file" / "results.json", "probe", {})
