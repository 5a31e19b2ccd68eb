"""Pictures of a network: attention, components, similarity, and how they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mvp_fast.cli.main import main
from mvp_fast.config.schema import StudentConfig
from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.results import read_results
from mvp_fast.evaluate.visualize import draw, sheets
from mvp_fast.evaluate.visualize.attention import block_number, cls_weights, look, patch_attention
from mvp_fast.evaluate.visualize.images import choose, from_files, from_index
from mvp_fast.evaluate.visualize.pca import colours, inwards, principal
from mvp_fast.evaluate.visualize.similarity import Patch, find_patch, similarity, usual_patches
from mvp_fast.export.timm_format import timm_model, write_timm
from mvp_fast.models.student import Student
from mvp_fast.samples.index import Index


def student(seed: int = 0) -> Student:
    """A small student whose tables are not zero."""
    made = Student(StudentConfig(width=48, depth=3, heads=3), target_width=16, image_size=64, seed=seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        made.rel_pos_bias.relative_position_bias_table.normal_()
    return made


def pictures(count: int = 2, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)


# ---- attention


@torch.no_grad()
def test_attention_of_a_beit_gives_the_blocks_own_output() -> None:
    """By hand from the parameters, bias included; CLS's output of the real block is these weights' mean of values."""
    backbone = Backbone(timm_model(student()).eval(), "a student").double()
    images_BHWC, taken = pictures(), {}
    module = backbone.model.blocks[1].attn
    handle = module.register_forward_hook(lambda _, inputs, out: taken.update(x=inputs[0], out=out))
    found = look(backbone, images_BHWC, 1).attention_BHN
    handle.remove()
    x_BND = taken["x"]
    shift = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    q, k, v = F.linear(x_BND, module.qkv.weight, shift).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    table = module.relative_position_bias_table[module.relative_position_index.view(-1)]
    bias_HNN = table.view(17, 17, 3).permute(2, 0, 1)
    weights_BHNN = (q @ k.transpose(-1, -2) / 4 + bias_HNN).softmax(-1)
    assert found is not None
    torch.testing.assert_close(found, weights_BHNN[:, :, 0], atol=1e-12, rtol=1e-10)
    unbiased = (q @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 0]
    assert (found - unbiased).abs().max() > 0.01
    cls_BD = torch.einsum("bhn,bhnd->bhd", found, v).flatten(1)
    torch.testing.assert_close(module.proj(cls_BD), taken["out"][:, 0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "block", "prefix"),
    [("vit_tiny_patch16_224", 11, 1), ("eva02_tiny_patch14_224", 4, 1), ("vit_tiny_patch16_dinov3_qkvb", 7, 5)],
)
@torch.no_grad()
def test_attention_is_what_timm_computes_by_hand(name: str, block: int, prefix: int) -> None:
    """timm's own slow path hands its softmax to `attn_drop`: rotary embeddings and registers are in it."""
    model = timm.create_model(name, img_size=56 if "eva" in name else 64, num_classes=0).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    backbone, images_BHWC = Backbone(model, name), pictures(side=56 if "eva" in name else 64)
    attention, taken = model.blocks[block].attn, []
    fused = look(backbone, images_BHWC, block)
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda _, inputs, out: taken.append(out))
    backbone.tokens(images_BHWC)
    handle.remove()
    slow = look(backbone, images_BHWC, block)  # goes back to the slow path after itself
    assert attention.fused_attn is False
    for seen in (fused, slow):
        assert seen.attention_BHN is not None
        torch.testing.assert_close(seen.attention_BHN, taken[0][:, :, 0], atol=1e-5, rtol=1e-4)
        patches_BND = seen.tokens[block].patches_BND
        assert patch_attention(seen.attention_BHN, patches_BND.shape[1]).shape == (2, taken[0].shape[1], 16)
    assert taken[0].shape[-1] == 16 + prefix


def test_weights_with_masks_and_shared_keys() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    one = torch.eye(5).expand(2, 2, 5, 5)  # with these for values, the output is the weights
    expected = F.scaled_dot_product_attention(q, k, one, attn_mask=mask, scale=0.7, enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(cls_weights(q, k, v, mask, scale=0.7, enable_gqa=True), expected)


def test_networks_without_a_map() -> None:
    pooled = timm.create_model("vit_tiny_patch16_224", img_size=64, class_token=False, global_pool="avg")
    assert look(Backbone(pooled, "no CLS"), pictures(), 0).attention_BHN is None
    assert (block_number(-1, 12), block_number(0, 12)) == (11, 0)
    for block in (12, -13):
        with pytest.raises(ConfigError, match="There is no block"):
            block_number(block, 12)


# ---- components and similarity


@pytest.mark.parametrize("channels", [4, 20, 33])
def test_components_are_those_of_numpy(channels: int) -> None:
    for _ in range(4):
        rows = torch.randn(300, channels, dtype=torch.float64) * torch.linspace(3, 0.1, channels) + 5
        score_RK, explained_K = principal(rows, 3)
        u, s, vt = np.linalg.svd(rows.numpy() - rows.numpy().mean(0), full_matrices=False)
        for k in range(3):
            expected = u[:, k] * s[k] * np.sign(vt[k, np.abs(vt[k]).argmax()])
            np.testing.assert_allclose(score_RK[:, k].numpy(), expected, atol=1e-8)
        np.testing.assert_allclose(explained_K.numpy(), (s**2 / (s**2).sum())[:3])


def test_colours_are_joint_and_leave_the_background_out() -> None:
    grid, things = (6, 6), torch.zeros(2, 6, 6, dtype=torch.bool)
    things[0, 1:4, 2:5] = things[1, 2:5, 1:3] = True
    apart_D, noise = torch.randn(16) * 4, torch.randn(2, 36, 16)
    features = noise + things.view(2, 36, 1) * apart_D
    whole = colours(features, grid)
    assert bool(whole.foreground_BM.all())
    assert float(whole.colour_BM3.min()) == 0
    assert float(whole.colour_BM3.max()) == 1
    first = whole.colour_BM3[..., 0]
    inside, outside = first[things.view(2, 36)], first[~things.view(2, 36)]
    assert float(inside.min()) > float(outside.max()) or float(inside.max()) < float(outside.min())
    for sign in (1, -1):  # the things are in front whichever way the component points
        front = colours(sign * features, grid, foreground=0.5)
        assert torch.equal(front.foreground_BM, things.view(2, 36))
        assert float(front.colour_BM3[~front.foreground_BM].abs().max()) == 0
        alone, _ = principal(sign * features[things.view(2, 36)], 3)
        shown = front.colour_BM3[front.foreground_BM]
        assert torch.equal(
            shown[:, 1].argsort(),
            alone[:, 1].clamp(*alone[:, 1].quantile(torch.tensor([0.01, 0.99]).double())).argsort(),
        )
    with pytest.raises(ConfigError, match="too few"):
        colours(torch.randn(1, 2, 16), (1, 2))


def test_inwards() -> None:
    value = torch.zeros(1, 16)
    value[0, [5, 6, 9, 10]] = 1
    assert torch.equal(inwards(value, (4, 4)), value)
    assert torch.equal(inwards(-value, (4, 4)), value)


def test_similarity_is_the_cosine() -> None:
    features = torch.randn(2, 12, 8)
    found = similarity(features, [Patch(0, 0), Patch(2, 1)], (3, 4))
    for image in range(2):
        for place, number in enumerate((0, 9)):
            expected = [F.cosine_similarity(features[image, number], other, dim=0) for other in features[image]]
            torch.testing.assert_close(found[image, place], torch.stack(expected).double(), atol=1e-6, rtol=1e-6)


def test_patches_by_name() -> None:
    assert find_patch("3, 5", (4, 6), 16) == Patch(3, 5)
    assert find_patch("x=95,y=47", (4, 6), 16) == Patch(2, 5)
    assert usual_patches((14, 14)) == [Patch(7, 7), Patch(3, 3), Patch(10, 10)]
    assert usual_patches((1, 1)) == [Patch(0, 0)]
    for words, message in {"4,0": "outside the grid", "x=96,y=0": "outside", "middle": "names no patch"}.items():
        with pytest.raises(ConfigError, match=message):
            find_patch(words, (4, 6), 16)


# ---- images and drawing


def test_choice_is_even_over_classes(scenes: Path) -> None:
    index = Index.open(scenes)
    for images in (8, 10, 25):
        rows = choose(index, images, 0)
        count = np.bincount(index.label[rows], minlength=10)
        assert len(set(rows.tolist())) == images
        assert count.max() - count.min() <= 1
        assert (np.diff(index.label[rows]) >= 0).all()
        assert rows.tolist() == choose(index, images, 0).tolist()
    assert choose(index, 8, 0).tolist() != choose(index, 8, 1).tolist()
    assert sorted(choose(index, 500, 0).tolist()) == list(range(96))


def test_a_file_is_cropped_as_the_index_does(scenes: Path) -> None:
    from mvp_fast.config.schema import DataConfig

    index = Index.open(scenes)
    rows = np.array([7, 50])
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    listed = from_index(index, rows, data, 16, 0.7, torch.device("cpu"))
    named = from_files([str(index.file(i)) for i in rows.tolist()], 64, 0.7)
    assert listed.names == [index.key(7), index.key(50)]
    assert (listed.images_BHWC.float() - named.images_BHWC.float()).abs().mean() < 1


def test_colours_of_maps() -> None:
    assert draw.colour(np.array([0.0, 1.0, 0.5, 2.0, np.nan]), "viridis").tolist() == [
        *([68, 1, 84], [253, 231, 37], [33, 145, 140], [253, 231, 37], [68, 1, 84])
    ]
    assert len({draw.label_colour(number) for number in range(30)}) == 30
    for grid in ((14, 14), (4, 4), (37, 37), (300, 300)):
        side = draw.tile_side(grid)
        assert side % grid[0] == 0
        assert grid[0] >= 224 or abs(side - 224) <= grid[0] / 2


def test_the_brightest_cell_is_where_the_map_is_highest() -> None:
    from mvp_fast.evaluate.visualize.images import Shown

    grey = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    canvas = sheets.Canvas.of(Shown(["a/long/name.jpg"], grey, np.array([]), None), (4, 4), "a network")
    map_BTM = torch.rand(1, 2, 16) * 0.5
    map_BTM[0, 1, 6] = 0.9
    sheet = sheets.text_sheet(canvas, map_BTM, ["one", "two"], "of the test")
    tile = sheet.rows[0][2].picture.astype(float).sum(-1).reshape(4, 56, 4, 56).mean((1, 3))
    assert int(tile.argmax()) == 6
    sharp = sheet.rows[0][2].picture.reshape(4, 56, 4, 56, 3)
    assert int((sharp.max((1, 3)) - sharp.min((1, 3))).max()) == 0
    assert sheet.scale is not None
    assert (sheet.scale.low, sheet.scale.high) == (float(map_BTM.double().min()), float(map_BTM.double().max()))
    nearest = sheet.rows[0][3].picture.reshape(4, 56, 4, 56, 3)[:, 0, :, 0].reshape(16, 3)
    one, two = nearest[map_BTM[0].argmax(0) == 0], nearest[map_BTM[0].argmax(0) == 1]
    assert len(np.unique(one, axis=0)) == len(np.unique(two, axis=0)) == 1
    assert one[0].tolist() != two[0].tolist()
    picture = draw.draw_sheet(sheet)
    assert picture.width == 2 * draw.MARGIN + 4 * 224 + 3 * draw.GAP
    drawn = np.asarray(picture)
    left = draw.MARGIN + 2 * (224 + draw.GAP)
    top = next(
        y for y in range(picture.height) if (drawn[y : y + 224, left : left + 224] == sheet.rows[0][2].picture).all()
    )
    assert 80 < top < 200


def test_long_captions_keep_to_their_tiles() -> None:
    tile = draw.Tile(np.zeros((56, 56, 3), dtype=np.uint8), "a very long note indeed " * 5)
    sheet = draw.Sheet("t" * 300, "many words " * 90, ["x" * 90], [[tile]], labels=[((9, 9, 9), "label " * 60)] * 3)
    drawn = np.asarray(draw.draw_sheet(sheet))
    assert (drawn[:, : draw.MARGIN - 2] == 255).all()
    assert (drawn[:, 2 - draw.MARGIN :] == 255).all()


# ---- the verb


def test_an_export_and_a_timm_model(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = write_timm(student(), tmp_path / "export")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    words = ["visualize", str(exported), "--data", str(scenes), "--images", "3", "--out", str(out), "--block", "1"]
    assert main([*words, "--patch", "1,2", "--foreground", "0.3"]) == 0
    results, printed = read_results(out / "results.json"), capsys.readouterr().out
    assert results["pictures"] == ["attention.png", "pca.png", "similarity.png"]
    assert results["backbone"]["fingerprint"] == load_backbone(BackboneSource(str(exported))).fingerprint
    assert results["settings"]["block"] == 1
    assert results["similarity"]["patches"] == [[1, 2]]
    assert 0 < results["pca"]["foreground"] < 1
    assert len(results["data"]["images"]) == 3
    for name, columns in {"attention.png": 5, "pca.png": 5, "similarity.png": 2}.items():
        with Image.open(out / name) as picture:
            assert picture.width == 2 * draw.MARGIN + columns * (224 + draw.GAP) - draw.GAP
            assert picture.height > 3 * 224
        assert str(out / name) in printed
    assert (out / "mine.txt").read_text() == "stays"

    files = [str(Index.open(scenes).file(i)) for i in (0, 9)]
    timm_words = ["visualize", "vit_tiny_patch16_224", "--untrained", "--image-size", "96", "--data", *files]
    assert main([*timm_words, "--out", str(tmp_path / "timm"), "--pictures", "similarity"]) == 0
    assert [path.name for path in sorted((tmp_path / "timm").iterdir())] == ["results.json", "similarity.png"]
    assert read_results(tmp_path / "timm" / "results.json")["settings"]["grid"] == [6, 6]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--block", "3"], 2, "There is no block 3"),
        (["--block", "-4"], 2, "There is no block -4"),
        (["--pictures", "text"], 2, "and no text"),
        (["--patch", "4,0"], 2, "outside the grid"),
        (["--text", "a red square"], 2, "--text needs a run"),
        (["--text", " "], 2, "A text is empty"),
        (["--data", "nowhere.jpg"], 3, "The image can't be read: No such file"),
        (["--data", "broken.png"], 3, "can't be used"),
        (["--data", "nowhere"], 3, "no index here"),
        (["--data", "."], 3, "no index here"),
        (["--data", "broken.png", "."], 2, "not a folder among others"),
        (["--images", "0"], 2, "0 images"),
        (["--foreground", "1.5"], 2, "must be in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str],
    code: int,
    message: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_timm(student(), tmp_path / "export")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in words else ["--data", str(scenes)]
    assert main(["visualize", "export", *data, *words]) == code
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["broken.png", "export"]
