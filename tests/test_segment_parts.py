"""Segmentation's parts, each against a slow and obvious reference: network, windows, figures, noise, loss, schedule."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mvp_fast.config.schema import DataConfig, OptimConfig, TrainConfig
from mvp_fast.config.segment import SegmentConfig, SegmentSettings, check_segment, window_stride
from mvp_fast.errors import ConfigError
from mvp_fast.evaluate.backbone import Backbone, BackboneSource, load_backbone
from mvp_fast.evaluate.segment.legend import IGNORED
from mvp_fast.evaluate.segment.network import Noise, Segmenter, default_blocks, make_pyramid
from mvp_fast.evaluate.segment.noise import change_colours, draw_colours, draw_noise, slice_noise
from mvp_fast.evaluate.segment.plan import SegmentPlan
from mvp_fast.evaluate.segment.scores import Confusion
from mvp_fast.evaluate.segment.slide import predict, slide_scores, window_starts
from mvp_fast.evaluate.segment.source import load_at, resized
from mvp_fast.evaluate.segment.step import SegmentStep, pixel_loss
from mvp_fast.loaders.base import Batch
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import PlanRows
from mvp_fast.train.optim import build_optimizer, learning_rate
from tests.segment_cases import export, tiny_student

CPU = torch.device("cpu")


def tiny_backbone(image_size: int = 64) -> Backbone:
    return resized(load_backbone(BackboneSource("vit_tiny_patch16_224", untrained=True, image_size=64)), image_size)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported") / "network")


def rows_of(batch: int, epoch: int = 0) -> PlanRows:
    data = DataConfig(image_size=64)
    plan = SegmentPlan(Index.synthetic(images=50), seed=1, batch_size=batch, data=data, scale=(1.0, 1.0))
    return plan.rows(epoch, np.arange(batch))


def random_images(batch: int, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)


# The backbone


def test_features_at_the_own_size_are_those_of_the_backbone(exported: Path) -> None:
    """Neither resampling nor what the segmenter takes away changes them."""
    images_BHWC = random_images(2)
    whole, (backbone, origin) = load_backbone(BackboneSource(str(exported))), load_at(BackboneSource(str(exported)), 64)
    segmenter = Segmenter(backbone, 5, channels=8).eval()
    assert origin.fingerprint == whole.fingerprint
    with torch.no_grad():
        found = segmenter.features(backbone.pixels(images_BHWC))
        tokens = whole.tokens(images_BHWC)
    assert segmenter.blocks == (0, 1, 2, 3)
    for block, map_BDhw in zip(segmenter.blocks, found, strict=True):
        expected_BDhw = tokens[block].patches_BND.transpose(1, 2).reshape(2, 48, 4, 4)
        torch.testing.assert_close(map_BDhw, expected_BDhw)


def test_resampled_tables_are_timms_own(exported: Path) -> None:
    """As timm.create_model loads the same files at another size; and there and back is not the identity."""
    images_BHWC = random_images(2, 96)
    backbone, origin = load_at(BackboneSource(str(exported)), 96)
    assert (backbone.grid, backbone.image_size) == ((6, 6), 96)
    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=0, img_size=96).eval()
    with torch.no_grad():
        ours_BND = backbone.tokens(images_BHWC)[-1].patches_BND
        theirs_BND = Backbone(theirs, "timm's").tokens(images_BHWC)[-1].patches_BND
    torch.testing.assert_close(ours_BND, theirs_BND, atol=1e-5, rtol=1e-5)
    table = "blocks.0.attn.relative_position_bias_table"
    assert backbone.model.state_dict()[table].shape == (11 * 11 + 3, 3)
    assert origin.fingerprint == load_backbone(BackboneSource(str(exported))).fingerprint


def test_resampled_tables_keep_their_meaning(exported: Path) -> None:
    """A table that says how far down a key lies still says so: the same for itself, more further down, level across."""
    backbone = load_backbone(BackboneSource(str(exported)))
    with torch.no_grad():
        for block in backbone.model.blocks:
            down_XH = torch.arange(-3.0, 4)[:, None, None].expand(7, 7, 3).reshape(49, 3)
            block.attn.relative_position_bias_table.copy_(
                torch.cat([down_XH, torch.tensor([[7.0], [8], [9]]) + down_XH[:3] * 0])
            )
    table = resized(backbone, 96).model.blocks[2].attn.relative_position_bias_table.detach()
    assert table[-3:].tolist() == [[7.0] * 3, [8.0] * 3, [9.0] * 3]
    grid = table[:-3].reshape(11, 11, 3)
    torch.testing.assert_close(grid, grid[:, :1, :1].expand(11, 11, 3), atol=1e-4, rtol=0)
    assert grid[5, 5, 0].abs() < 1e-4
    assert (grid[:, 0, 0].diff() > 0.05).all()
    torch.testing.assert_close(grid[[0, 10], 0, 0], torch.tensor([-3.0, 3.0]), atol=1e-3, rtol=0)


def test_absolute_positions_are_resampled_too() -> None:
    backbone = tiny_backbone(96)
    assert backbone.model.pos_embed.shape == (1, 37, 192)
    assert tiny_backbone(64).model.pos_embed.shape == (1, 17, 192)


@pytest.mark.parametrize("kind", ["export", "timm"])
def test_fresh_weights_have_the_same_shape(exported: Path, kind: str) -> None:
    name = str(exported) if kind == "export" else "vit_tiny_patch16_224"
    fresh, origin = load_at(BackboneSource(name, seed=3), 64, from_scratch=True)
    again, _ = load_at(BackboneSource(name, seed=3), 64, from_scratch=True)
    other, _ = load_at(BackboneSource(name, seed=4), 64, from_scratch=True)
    assert fresh.fingerprint == again.fingerprint != other.fingerprint
    assert "seed 3" in origin.words
    if kind == "export":
        trained = load_backbone(BackboneSource(name)).model.state_dict()
        own = fresh.model.state_dict()
        assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in trained.items()}
        assert any(not torch.equal(value, trained[key]) for key, value in own.items())


def test_networks_that_do_not_fit(exported: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        load_at(BackboneSource(str(exported)), 72)
    with pytest.raises(ConfigError, match=r"no block 4 .* which has 4"):
        Segmenter(load_backbone(BackboneSource(str(exported))), 3, blocks=(0, 1, 2, 4))


# The network


def test_blocks_of_any_depth() -> None:
    assert default_blocks(12) == (3, 5, 7, 11)
    assert default_blocks(24) == (7, 11, 15, 23)
    assert default_blocks(6) == (1, 2, 3, 5)
    assert default_blocks(1) == (0, 0, 0, 0)


@pytest.mark.parametrize(("patch", "sizes"), [(16, [16, 8, 4, 2]), (14, [16, 8, 4, 2]), (8, [8, 4, 2, 1])])
def test_the_pyramid_has_beits_sizes(patch: int, sizes: list[int]) -> None:
    levels = make_pyramid(6, patch)
    map_BDhw = torch.randn(2, 6, 4, 4)
    assert [level(map_BDhw).shape[-1] for level in levels] == sizes
    assert levels[3](map_BDhw)[0, 0, 0, 0] == map_BDhw[0, 0, : 16 // sizes[0] * 2, : 16 // sizes[0] * 2].max()


def test_one_block_may_serve_twice() -> None:
    segmenter = Segmenter(tiny_backbone(), 3, blocks=(0, 0, 1, 2), channels=8).eval()
    first, second, *_ = segmenter.features(segmenter.backbone.pixels(random_images(1)))
    assert torch.equal(first, second)
    assert len(segmenter.backbone.model.blocks) == 3
    assert segmenter.scores(random_images(1)).shape == (1, 3, 64, 64)


def test_every_parameter_learns() -> None:
    """DistributedDataParallel would wait for one that does not; and the auxiliary head counts by its weight."""
    segmenter = Segmenter(tiny_backbone(), 4, channels=8, auxiliary=True).train()
    scores, auxiliary = segmenter(random_images(2))
    assert auxiliary is not None
    assert (scores.shape, auxiliary.shape) == ((2, 4, 16, 16), (2, 4, 4, 4))
    (scores.square().sum() + auxiliary.square().sum()).backward()
    assert [name for name, p in segmenter.named_parameters() if p.grad is None] == []
    assert Segmenter(tiny_backbone(), 4, channels=8, auxiliary=False).train()(random_images(2))[1] is None
    assert segmenter.eval()(random_images(1))[1] is None


def test_fresh_parts_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = Segmenter(tiny_backbone(), 3, channels=8, seed=5).state_dict()
    torch.manual_seed(2)
    same, other = (Segmenter(tiny_backbone(), 3, channels=8, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_layer_decay_is_beits(exported: Path) -> None:
    """Stem decay^(L + 1), block i decay^(L - i), all of ours at the full rate; weight decay where timm has it."""
    segmenter = Segmenter(load_backbone(BackboneSource(str(exported))), 3, channels=8)
    optimizer = build_optimizer(segmenter, OptimConfig(weight_decay=0.05), layer_decay=0.5)
    names = {parameter: name for name, parameter in segmenter.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == dict(segmenter.named_parameters()).keys()
    for name, (scale, decay) in found.items():
        if name.startswith("backbone.model.blocks."):
            assert scale == 0.5 ** (4 - int(name.split(".")[3])), name
        elif name.startswith("backbone."):
            assert scale == 0.5**5, name
        else:
            assert scale == 1, name
        matrix = dict(segmenter.named_parameters())[name].ndim > 1
        plain = matrix and "relative_position_bias_table" not in name and "cls_token" not in name
        assert decay == (0.05 if plain else 0), name


# Noise


def test_dropped_branches_are_timms_stochastic_depth() -> None:
    """The same factors put into timm's own sum of residuals, block by block."""
    segmenter = Segmenter(tiny_backbone(), 3, channels=8, blocks=(0, 1, 2, 3), drop_path=0.3).train()
    assert segmenter.depth.rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    scale_LSB = torch.rand(12, 2, 2)
    model, pixels = segmenter.backbone.model, segmenter.backbone.pixels(random_images(2))
    segmenter.depth.set(scale_LSB)
    found = segmenter.features(pixels)[-1]
    x = model._pos_embed(model.patch_embed(pixels))
    for block, (attention_B, mlp_B) in zip(model.blocks, scale_LSB[:4], strict=True):
        x = x + attention_B[:, None, None] * block.ls1(block.attn(block.norm1(x)))
        x = x + mlp_B[:, None, None] * block.ls2(block.mlp(block.norm2(x)))
    torch.testing.assert_close(found, x[:, 1:].transpose(1, 2).reshape(2, 192, 4, 4), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, timm.layers.DropPath) for module in segmenter.modules())
    kept = copy.deepcopy(segmenter)  # as averaging does: each has its own choice
    kept.depth.set(torch.zeros(12, 2, 2))
    assert torch.equal(segmenter.features(pixels)[-1], found)
    assert not torch.equal(kept.features(pixels)[-1], found)


def test_noise_has_its_rates_and_belongs_to_the_samples() -> None:
    rows = rows_of(40)
    noise = draw_noise(rows, [0.0, 0.5], (300, 200), 0.1, 7, CPU)
    assert noise.branch_LSB is not None
    assert noise.decoder_BD is not None
    assert noise.auxiliary_BD is not None
    assert noise.decoder_BD.shape == (40, 300)
    assert noise.auxiliary_BD.shape == (40, 200)
    assert noise.decoder_BD.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert float((noise.decoder_BD == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert noise.branch_LSB[0].unique().tolist() == [1]
    assert float(noise.branch_LSB[1].mean()) == pytest.approx(1, abs=0.3)
    # A part of the batch, drawn alone or cut out, has the same.
    cut, alone = slice_noise(noise, slice(8, 12)), draw_noise(rows.slice(8, 12), [0.0, 0.5], (300, 200), 0.1, 7, CPU)
    for one, other in zip(cut, alone, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert draw_noise(rows, [0.0], (3, 2), 0.0, 7, CPU) == Noise()


def test_dropped_channels_change_what_they_should() -> None:
    segmenter = Segmenter(tiny_backbone(), 3, channels=8).train()
    images_BHWC = random_images(2)
    plain, _ = segmenter(images_BHWC)
    none, _ = segmenter(images_BHWC, Noise(decoder_BD=torch.zeros(2, 8)))
    assert torch.allclose(none, segmenter.head[0].bias[None, :, None, None].expand_as(none))
    assert not torch.allclose(none, plain)


def test_colours_against_a_plain_reference() -> None:
    rng = np.random.default_rng(0)
    images_BHWC = torch.from_numpy(rng.integers(0, 256, (3, 8, 9, 3), dtype=np.uint8))
    colours_B4 = np.array([[1, 1, 1, 0], [1.1, 0.6, 1.4, 0], [0.9, 1, 1, 0.1]])
    found_BHWC = change_colours(images_BHWC, colours_B4)
    assert torch.equal(found_BHWC[0], images_BHWC[0].float()) or torch.allclose(
        found_BHWC[0], images_BHWC[0].float(), atol=1e-4
    )
    grey = torch.tensor([0.2989, 0.587, 0.114])
    image_HWC = (images_BHWC[1].float() / 255 * 1.1).clamp(0, 1)
    image_HWC = (0.6 * image_HWC + 0.4 * (image_HWC @ grey).mean()).clamp(0, 1)
    image_HWC = (1.4 * image_HWC - 0.4 * (image_HWC @ grey)[..., None]).clamp(0, 1)
    torch.testing.assert_close(found_BHWC[1], 255 * image_HWC, atol=0.05, rtol=0)
    # Hue keeps the greatest and the least channel of each pixel.
    bright_HWC = (images_BHWC[2].float() * 0.9).clamp(0, 255)
    for reduce in (torch.amax, torch.amin):
        torch.testing.assert_close(reduce(found_BHWC[2], -1), reduce(bright_HWC, -1), atol=0.1, rtol=0)
    assert (found_BHWC[2] - bright_HWC).abs().max() > 20


def test_colours_come_with_a_chance_of_one_half() -> None:
    colours_B4 = np.concatenate([draw_colours(rows_of(40, epoch), 3) for epoch in range(20)])
    changed_B4 = colours_B4 != np.array([1, 1, 1, 0])
    assert np.abs(changed_B4.mean(0) - 0.5).max() < 0.06
    limits = np.array([32 / 255, 0.5, 0.5, 0.1])
    assert (np.abs(colours_B4 - np.array([1, 1, 1, 0])) <= limits).all()
    assert (np.abs(colours_B4 - np.array([1, 1, 1, 0])).max(0) > 0.95 * limits).all()


# Loss and step


def test_the_loss_is_the_pixels_cross_entropy() -> None:
    scores_BChw = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    target_BHW = torch.randint(-1, 4, (2, 9, 10), dtype=torch.int16)
    found = pixel_loss(scores_BChw, target_BHW)
    scores_BCHW = F.interpolate(scores_BChw, size=(9, 10), mode="bilinear", align_corners=False)
    total = torch.zeros((), dtype=torch.float64)
    for b, y, x in np.ndindex(2, 9, 10):
        if target_BHW[b, y, x] != IGNORED:
            total = total - scores_BCHW[b, :, y, x].log_softmax(0)[target_BHW[b, y, x].long()]
    assert float(found.detach()) == pytest.approx(float(total.detach()) / 180, rel=1e-5)
    assert float(pixel_loss(scores_BChw, torch.full((2, 9, 10), IGNORED, dtype=torch.int16))) == 0


def settings_of(**segment: object) -> SegmentSettings:
    return SegmentSettings(
        data=DataConfig(image_size=64),
        segment=SegmentConfig(**segment),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1e-3, reference_batch_size=4),
        train=TrainConfig(batch_size=4, precision="fp32"),
    )


def step_of(settings: SegmentSettings, seed: int = 0) -> SegmentStep:
    segmenter = Segmenter(tiny_backbone(), 4, channels=8, drop_path=settings.segment.drop_path, seed=seed).train()
    optimizer = build_optimizer(segmenter, settings.optim, settings.segment.layer_decay)
    return SegmentStep(segmenter, segmenter, optimizer, settings, CPU)


def batch_of(size: int = 4) -> Batch:
    target_BHW = torch.randint(-1, 4, (size, 64, 64), dtype=torch.int16)
    return Batch(0, random_images(size), torch.zeros((size, 0), dtype=torch.int64), rows_of(size), target_BHW)


def test_a_step_is_a_plain_step() -> None:
    """Loss and gradient against the obvious code; noise and colours off."""
    settings = settings_of(photometric=False, dropout=0.0, drop_path=0.0, auxiliary=0.3)
    step, batch = step_of(settings), batch_of()
    plain = copy.deepcopy(step.model)
    result = step(batch)
    scores, auxiliary = plain(batch.images_BHWC)
    loss = pixel_loss(scores, batch.target) + 0.3 * pixel_loss(auxiliary, batch.target)
    loss.backward()
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    for setting, changed in (("photometric", True), ("dropout", 0.5), ("drop_path", 0.9)):
        noisy = step_of(replace(settings, segment=replace(settings.segment, **{setting: changed})))
        assert float(noisy(batch).loss) != float(result.loss), setting


def test_a_skipped_step_leaves_no_trace() -> None:
    step, batch = step_of(settings_of()), batch_of()
    step(batch)
    with torch.no_grad():
        step.model.pyramid[1].weight[0] = torch.inf
    before = {name: value.clone() for name, value in step.model.state_dict().items() if "num_batches" not in name}
    result = step(batch)
    assert not bool(result.finite)
    for name, value in before.items():
        assert torch.equal(step.model.state_dict()[name], value), name
    assert len(step.statistics) > 10


# Windows


@pytest.mark.parametrize(
    ("length", "starts"),
    [(8, [0]), (9, [0, 1]), (13, [0, 5]), (14, [0, 5, 6]), (40, [0, 5, 10, 15, 20, 25, 30, 32])],
)
def test_windows_reach_the_edge(length: int, starts: list[int]) -> None:
    assert window_starts(length, 8, 5) == starts
    assert window_stride(SegmentSettings()) == 341


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_slide_inference_against_a_slow_reference(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((4, 3, 8, 8), generator=generator)

    def score(images_KSSC: Tensor) -> Tensor:
        """A network whose scores depend on the place in the window."""
        return torch.einsum("kyxc,ncyx->knyx", images_KSSC.float() / 255, weight)

    for height, width in ((8, 8), (8, 21), (19, 14), (30, 9)):
        image_HWC = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        found_CHW = slide_scores(score, image_HWC, 8, 5, batch)
        corners = [
            (min(y, height - 8), min(x, width - 8)) for y in range(0, height - 3, 5) for x in range(0, width - 3, 5)
        ]
        for y, x in np.ndindex(height, width):
            values = [
                score(image_HWC[None, top : top + 8, left : left + 8])[0, :, y - top, x - left].double()
                for top, left in dict.fromkeys(corners)
                if top <= y < top + 8 and left <= x < left + 8
            ]
            torch.testing.assert_close(found_CHW[:, y, x].double(), torch.stack(values).mean(0), atol=1e-5, rtol=1e-5)


def test_predictions_have_the_masks_size() -> None:
    scores_CHW = torch.randn(3, 6, 8)
    assert torch.equal(predict(scores_CHW, (6, 8)), scores_CHW.argmax(0))
    larger_HW = predict(scores_CHW, (12, 17))
    assert larger_HW.shape == (12, 17)
    assert torch.equal(
        predict(scores_CHW.repeat_interleave(5, 1).repeat_interleave(5, 2), (6, 8)), scores_CHW.argmax(0)
    )


# Figures


@pytest.mark.parametrize("seed", range(3))
def test_figures_against_plain_counts_and_torchmetrics(seed: int) -> None:
    """Random masks with ignored pixels; class 5 is nowhere, class 4 predicted only, class 3 in the truth only."""
    rng = np.random.default_rng(seed)
    confusion = Confusion(6, CPU)
    metric = MulticlassJaccardIndex(num_classes=6, average="macro", ignore_index=IGNORED)
    accuracy = MulticlassAccuracy(num_classes=6, average="micro", ignore_index=IGNORED)
    counts_CC = np.zeros((6, 6))
    for _ in range(4):
        height, width = rng.integers(3, 30, 2)
        truth_HW = rng.choice([-1, 0, 1, 2, 3], (height, width)).astype(np.int16)
        predicted_HW = rng.choice([0, 1, 2, 4], (height, width))
        confusion.add(torch.from_numpy(predicted_HW), torch.from_numpy(truth_HW))
        metric.update(torch.from_numpy(predicted_HW), torch.from_numpy(truth_HW).long())
        accuracy.update(torch.from_numpy(predicted_HW), torch.from_numpy(truth_HW).long())
        for true, said in zip(truth_HW.ravel(), predicted_HW.ravel(), strict=True):
            if true != -1:
                counts_CC[true, said] += 1
    assert confusion.counts_CC.tolist() == counts_CC.tolist()
    figures = confusion.figures()
    iou = [
        counts_CC[c, c] / (counts_CC[c].sum() + counts_CC[:, c].sum() - counts_CC[c, c]) if c != 5 else None
        for c in range(6)
    ]
    assert figures.iou[:5] == pytest.approx(iou[:5])
    assert figures.iou[5] is None
    assert (figures.iou[3], figures.iou[4]) == (0, 0)
    assert figures.miou == pytest.approx(np.mean(iou[:5]))
    assert figures.miou == pytest.approx(float(metric.compute()))
    assert figures.pixel_accuracy == pytest.approx(float(accuracy.compute()))
    right = [counts_CC[c, c] / counts_CC[c].sum() for c in range(4)]
    assert figures.accuracy[:4] == pytest.approx(right)
    assert figures.accuracy[4:] == [None, None]
    assert figures.mean_accuracy == pytest.approx(np.mean(right))
    assert figures.pixels == counts_CC.sum(1).tolist()


def test_figures_of_nothing() -> None:
    confusion = Confusion(3, CPU)
    confusion.add(torch.zeros((4, 4), dtype=torch.int64), torch.full((4, 4), IGNORED, dtype=torch.int16))
    figures = confusion.figures()
    assert (figures.miou, figures.pixel_accuracy, figures.mean_accuracy) == (0, 0, 0)
    assert figures.iou == [None] * 3


# Schedule and settings


def test_the_poly_schedule_is_a_line() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_fraction=0.1, reference_batch_size=4, schedule="poly")
    rates = [learning_rate(step, 100, optim, 4) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:100] == pytest.approx([1 - i / 90 for i in range(90)])
    assert rates[99] > 0
    assert rates[100] == 0
    floor = replace(optim, min_lr=0.25)
    assert learning_rate(55, 100, floor, 8) == pytest.approx(0.25 + 1.75 / 2)


GOOD = SegmentConfig(model="vit_tiny_patch16_224", train="a", val="b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": replace(GOOD, model="")}, "There is no network"),
        ({"segment": replace(GOOD, train="")}, "segment.train is empty"),
        ({"segment": replace(GOOD, blocks=(1, 2, 3))}, "four numbers"),
        ({"segment": replace(GOOD, blocks=(3, 2, 4, 5))}, "ascending"),
        ({"segment": replace(GOOD, scale=(2.0, 1.0))}, "segment.scale"),
        ({"segment": replace(GOOD, stride=600)}, "at most data.image-size"),
        ({"segment": replace(GOOD, num_classes=1)}, "2 or more"),
        ({"segment": replace(GOOD, ignore=(70000,))}, "0 to 65535"),
        ({"segment": replace(GOOD, dropout=1.0)}, "below 1"),
        ({"segment": replace(GOOD, layer_decay=0.0)}, "segment.layer-decay"),
        ({"data": DataConfig(index="x")}, "data.index is x"),
        ({"train": TrainConfig(sharding="full")}, "train.sharding"),
        ({"train": TrainConfig(compile="blocks")}, "train.compile"),
        ({"train": TrainConfig(step_graph=True)}, "train.step-graph"),
    ],
)
def test_settings_that_can_not_be(changes: dict[str, object], message: str) -> None:
    check_segment(SegmentSettings(segment=GOOD))
    with pytest.raises(ConfigError, match=message):
        check_segment(replace(SegmentSettings(segment=GOOD), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["b", "l"])
def test_the_recipes_are_beits(name: str) -> None:
    from mvp_fast.config.load import load_settings

    root = Path(__file__).resolve().parents[1]
    found = load_settings(SegmentSettings, root / "configs" / f"segment_vit_{name}16_ade20k.yaml")
    segment, optim, train = found.segment, found.optim, found.train
    assert (train.steps, train.batch_size, round(train.steps * optim.warmup_fraction)) == (160_000, 16, 1500)
    assert (optim.schedule, optim.weight_decay, optim.min_lr, found.data.image_size) == ("poly", 0.05, 0.0, 512)
    assert window_stride(found) == 341
    depth = {"b": 12, "l": 24}[name]
    assert segment.blocks == default_blocks(depth)
    expected = {"b": (5e-5, 0.75, 0.15), "l": (4e-5, 0.9, 0.2)}[name]
    assert (optim.lr, segment.layer_decay, segment.drop_path) == expected
    if name == "b":
        assert optim == SegmentSettings().optim


def test_a_student_brings_its_weights(tmp_path: Path) -> None:
    """What the segmenter computes before any training is what the student would."""
    student = tiny_student().eval()
    from mvp_fast.export.timm_format import timm_model

    backbone = Backbone(timm_model(student).eval(), "the student")
    images_BHWC = random_images(2)
    with torch.no_grad():
        last = Segmenter(backbone, 3, channels=8).eval().features(backbone.pixels(images_BHWC))[-1]
        tokens_BND = student.encode(student.patches(images_BHWC))  # after the final norm
        found = student.norm(last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found, tokens_BND[:, 1:], atol=1e-4, rtol=1e-4)
    assert isinstance(student.norm, nn.LayerNorm)
