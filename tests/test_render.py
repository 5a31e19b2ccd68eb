"""`mvp-fast data render`: the batch that a loader makes, as arrays and as a sheet to look at.

Shape legend: B images, H and W pixels, C channels, N patches.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvp_fast.cli.data import render as verb
from mvp_fast.cli.main import main
from mvp_fast.config.schema import Config
from mvp_fast.loaders.registry import make_loader
from mvp_fast.samples.index import Index
from mvp_fast.samples.index_build import build_index
from mvp_fast.samples.plan import SamplePlan


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(4)
    for i in range(7):
        image_HWC = rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)
        name = folder / f"class{i % 2}" / f"a_rather_long_name_that_has_to_be_cut_somewhere_{i}.jpg"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(image_HWC).resize((150, 120)).save(name)
    build_index(folder)
    return Index.open(folder)


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_arrays_are_the_batch(index: Index, tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "render", str(index.root), "--loader", loader, "--step", "3", "--batch-size", "5", "--seed", "9"]
    assert main([*words, "--out", str(tmp_path / "new" / "folder")]) == 0
    assert "step 3, 5 images" in capsys.readouterr().out
    config = Config()
    plan = SamplePlan(index, seed=9, batch_size=5, data=config.data, mask=config.mask)
    made = make_loader(loader, config.data)
    (batch,) = islice(made.batches(plan, 3), 1)
    made.close()
    with np.load(tmp_path / "new" / "folder" / "batch.npz") as arrays:
        rows = batch.rows
        np.testing.assert_array_equal(arrays["images"], batch.images_BHWC.numpy())
        assert arrays["images"].dtype == np.uint8
        assert list(arrays["keys"]) == [index.key(int(sample)) for sample in rows.sample_B]
        np.testing.assert_array_equal(arrays["box"].T, [rows.x_B, rows.y_B, rows.width_B, rows.height_B])
        np.testing.assert_array_equal(arrays["flip"], rows.flip_B)
        np.testing.assert_array_equal(arrays["mask"], rows.mask_BN)
        np.testing.assert_array_equal(arrays["label"], index.label[rows.sample_B])


def test_the_sheet_shows_what_the_student_sees(index: Index, tmp_path: Path) -> None:
    verb.render(verb.RenderOptions(index=str(index.root), out=str(tmp_path), batch_size=5))
    sheet_HWC = np.asarray(Image.open(tmp_path / "sheet.png"))
    with np.load(tmp_path / "batch.npz") as arrays:
        images_BHWC, mask_BN = arrays["images"], arrays["mask"]
    assert mask_BN.sum(axis=1).tolist() == [75] * 5
    for i, image_HWC in enumerate(images_BHWC):
        x, y = verb.tile_corner(i, 3, 224)  # five images make three columns
        shown_HWC = sheet_HWC[y : y + 224, x : x + 224]
        for patch, masked in enumerate(mask_BN[i]):
            top, left = 16 * (patch // 14), 16 * (patch % 14)
            shown, own = (a[top : top + 16, left : left + 16].astype(float) for a in (shown_HWC, image_HWC))
            expected = verb.GREY + (own - verb.GREY) * verb.SHADE if masked else own
            assert np.abs(shown - expected).max() <= 1
            assert masked or (shown == own).all()
        caption_HWC = sheet_HWC[y + 224 : y + 224 + verb.CAPTION_HEIGHT, x : x + 224]
        assert caption_HWC.min() < 128  # there is a key, in black on white
    assert (sheet_HWC[:, -verb.GAP :] == 255).all()  # and none runs over the edge


def test_settings_come_from_the_configuration(index: Index, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 4\ndata: {image_size: 64}\nmask: {patches: 5, min_block: 1}\n")
    options = {"index": str(index.root), "batch_size": 2, "config": str(tmp_path / "c.yaml")}
    verb.render(verb.RenderOptions(**options, out=str(tmp_path / "a")))  # type: ignore[arg-type]
    verb.render(verb.RenderOptions(**options, out=str(tmp_path / "b"), seed=4))  # type: ignore[arg-type]
    verb.render(verb.RenderOptions(**options, out=str(tmp_path / "c"), seed=5))  # type: ignore[arg-type]
    a, b, c = (np.load(tmp_path / name / "batch.npz") for name in "abc")
    assert a["images"].shape == (2, 64, 64, 3)
    assert a["mask"].sum(axis=1).tolist() == [5, 5]
    np.testing.assert_array_equal(a["images"], b["images"])
    assert not np.array_equal(a["images"], c["images"])


def test_stand_ins_are_told_of(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(index.root, tmp_path / "set")
    bad = sorted((tmp_path / "set").glob("*/*.jpg"))[2]
    bad.write_bytes(bytes(bad.stat().st_size))
    out = tmp_path / "out"
    assert main(["data", "render", str(tmp_path / "set"), "--batch-size", "7", "--out", str(out)]) == 0
    assert "bad samples met and replaced: 1" in capsys.readouterr().out
    with np.load(out / "batch.npz") as arrays:
        assert bad.relative_to(tmp_path / "set").as_posix() not in arrays["keys"]
        assert arrays["attempt"].sum() == 1


def test_wrong_input_is_told_in_a_paragraph(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert main(["data", "render", str(tmp_path / "nowhere"), *out]) == 3
    assert "no index here" in capsys.readouterr().err
    assert main(["data", "render", str(index.root), "--step", "-1", *out]) == 2
    assert "count from 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["data", "render", str(index.root), "--out", str(tmp_path / "file" / "x")]) == 4
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["data", "render", str(index.root), "--loader", "dalli", *out])
    assert caught.value.code == 2
