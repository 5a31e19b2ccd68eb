"""The parts of fine-tuning, each against an obvious reference: rates, augmentation, stochastic depth, tests."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mvp_fast.config.finetune import AugmentationConfig, FinetuneConfig, ModelConfig, check_finetune
from mvp_fast.config.load import load_settings
from mvp_fast.config.schema import DataConfig, MaskConfig, OptimConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.evaluate.drop_path import PlannedDepth
from mvp_fast.evaluate.finetune import augment_worker
from mvp_fast.evaluate.finetune.augment import RandAugmentLoader
from mvp_fast.evaluate.finetune.mixing import Erasing, Mixing, pair_order
from mvp_fast.evaluate.finetune.score import Counts, Score, Stopped, count
from mvp_fast.evaluate.network import give_head
from mvp_fast.loaders.registry import make_loader
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.samples.centre import CentrePlan
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.samples.random import Stream, draws
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.optim import build_optimizer, set_learning_rate

POLICY = "rand-m9-mstd0.5-inc1"
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPO = Path(__file__).resolve().parents[1]


def small_beit(depth: int = 3, classes: int = 10) -> Any:
    model = timm.create_model(
        "beitv2_base_patch16_224", img_size=64, embed_dim=48, depth=depth, num_heads=3, num_classes=classes
    )
    give_head(model, classes, 1.0, seed=1)
    return model


def plan_of(index: Index, batch_size: int = 8, seed: int = 3, rank: int = 0, world: int = 1) -> SamplePlan:
    data, mask = DataConfig(image_size=64), MaskConfig(patches=0)
    return SamplePlan(index, seed=seed, batch_size=batch_size, data=data, mask=mask, rank=rank, world=world)


@pytest.mark.parametrize(("depth", "decay"), [(3, 0.65), (5, 0.8), (2, 1.0)])
def test_layer_decay_is_beits(depth: int, decay: float) -> None:
    """decay ** (layers above): the embedding is layer 0, block i layer i + 1, the rest layer depth + 1."""
    model = small_beit(depth)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0), decay)
    set_learning_rate(optimizer, 2.0)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith(("cls_token", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        assert groups[parameter]["lr"] == pytest.approx(2.0 * decay ** (depth + 1 - layer)), name
        plain = parameter.ndim <= 1 or name == "cls_token" or "bias_table" in name
        assert groups[parameter]["weight_decay"] == (0 if plain else 0.05), name
    assert len(groups) == len(list(model.parameters()))
    assert optimizer.defaults["fused"]


@pytest.mark.parametrize(("size", "repeat"), [(2, 1), (12, 1), (12, 2), (12, 3)])
def test_neighbours_are_pairs(size: int, repeat: int) -> None:
    order = pair_order(size, repeat)
    assert sorted(order.tolist()) == list(range(size))
    for place in range(size):
        one, other = sorted((order[place], order[size - 1 - place]))
        assert other - one == repeat
        assert one // (2 * repeat) == other // (2 * repeat)


def test_mixing_against_a_slow_reference() -> None:
    """Images and targets pixel by pixel; both kinds of mixing and none come; a half of the batch is mixed alike."""
    config = AugmentationConfig(mixup=0.8, cutmix=1.0, mixup_prob=0.75, switch_prob=0.5, label_smoothing=0.1)
    size, classes, side, seed = 8, 5, 9, 7
    mixing, kinds = Mixing(config, classes, seed), set()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for step in range(14):
        images_BCHW, label_B = torch.randn(size, 3, side, side), torch.randint(0, classes, (size,))
        found_BCHW, target_BK = mixing(images_BCHW.clone(), label_B, step)
        draw = np.random.RandomState(draws(seed, Stream.MIXUP, 0, step, 0)[0])
        share, box = 1.0, None
        if draw.rand() < config.mixup_prob:
            cut = draw.rand() < config.switch_prob
            share = float(draw.beta(1.0, 1.0) if cut else draw.beta(0.8, 0.8))
            if cut:
                edge = int(side * np.sqrt(1 - share))
                y, x = draw.randint(0, side), draw.randint(0, side)
                box = [max(y - edge // 2, 0), min(y + (edge + 1) // 2, side)]
                box += [max(x - edge // 2, 0), min(x + (edge + 1) // 2, side)]
                share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / side**2
        kinds.add("cut" if box else "mix" if share < 1 else "none")
        for i in range(size):
            j = i ^ 1
            expected_K = torch.full((classes,), 0.1 / classes)
            for row, weight in ((i, share), (j, 1 - share)):
                expected_K[label_B[row]] += 0.9 * weight
            torch.testing.assert_close(target_BK[i], expected_K, atol=1e-6, rtol=1e-5)
            mixed_CHW = torch.empty(3, side, side)
            for y in range(side):
                for x in range(side):
                    inside = box is not None and box[0] <= y < box[1] and box[2] <= x < box[3]
                    own, other = images_BCHW[i, :, y, x], images_BCHW[j, :, y, x]
                    mixed_CHW[:, y, x] = (other if inside else own) if box else own * share + other * (1 - share)
            torch.testing.assert_close(found_BCHW[i], mixed_CHW, atol=1e-6, rtol=1e-5)
        half = slice(4, 8)
        half_BCHW, half_BK = mixing(images_BCHW[half].clone(), label_B[half], step)
        assert torch.equal(half_BCHW, found_BCHW[half])
        assert torch.equal(half_BK, target_BK[half])
    assert kinds == {"cut", "mix", "none"}
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_erasing(scenes: Path) -> None:
    """A box of noise in a quarter of the images, by seed, epoch and position alone; the global states stay."""
    rows = plan_of(Index.open(scenes), batch_size=96).step(1)
    erase = Erasing(0.25, "pixel", 5, CPU)
    images_BCHW = torch.full((96, 3, 32, 32), 9.0)
    states = random.getstate(), torch.get_rng_state()
    erased_BCHW = erase(images_BCHW.clone(), rows)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    changed_BHW = (erased_BCHW != images_BCHW).all(1)
    assert torch.equal(changed_BHW, (erased_BCHW != images_BCHW).any(1))
    touched_B = changed_BHW.flatten(1).any(1)
    assert 12 <= int(touched_B.sum()) <= 36
    for changed_HW in changed_BHW[touched_B]:
        rows_of, columns = torch.where(changed_HW)
        area = (rows_of.max() - rows_of.min() + 1) * (columns.max() - columns.min() + 1)
        assert int(changed_HW.sum()) == int(area)
    noise = erased_BCHW[erased_BCHW != 9.0]
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    part = slice(40, 60)
    assert torch.equal(erase(images_BCHW[part].clone(), rows.slice(40, 60)), erased_BCHW[part])
    other = Erasing(0.25, "pixel", 6, CPU)(images_BCHW.clone(), rows)
    assert not torch.equal(other, erased_BCHW)


def augmented(index: Index, workers: int, start: int, steps: int, **plan: Any) -> list[Any]:
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    inner = make_loader("torchvision", data)
    loader = RandAugmentLoader(inner, POLICY, mean=MEAN, interpolation="bicubic", seed=3, workers=workers)
    batches = loader.batches(plan_of(index, **plan), start)
    try:
        return [next(batches) for _ in range(steps)]
    finally:
        batches.close()  # type: ignore[attr-defined]
        loader.close()


def test_rand_augment_does_not_depend_on_its_processes(scenes: Path) -> None:
    """One process, three, another first step, a rank's half: all give what a plain loop gives."""
    index = Index.open(scenes)
    one = augmented(index, 1, 0, 4)
    for batch, other in zip(one[1:], augmented(index, 3, 1, 3), strict=True):
        assert batch.step == other.step
        assert torch.equal(batch.images_BHWC, other.images_BHWC)
    (half,) = augmented(index, 1, 2, 1, rank=1, world=2)
    assert torch.equal(half.images_BHWC, one[2].images_BHWC[4:])
    plain = make_loader("torchvision", DataConfig(image_size=64, threads=1)).batches(plan_of(index), 0)
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(255 * value) for value in MEAN)
    settings = {"translate_const": int(64 * 0.45), "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    transform, changed = rand_augment_transform(POLICY, settings), 0
    for batch in one:
        untouched = next(plain)
        rows = untouched.rows
        assert rows.sample_B.tolist() == batch.rows.sample_B.tolist()
        seeds_B4 = draws(3, Stream.RAND_AUGMENT, rows.epoch_B, rows.position_B, 0)
        for image_HWC, found_HWC, seed_4 in zip(untouched.images_BHWC, batch.images_BHWC, seeds_B4, strict=True):
            expected_HWC = augment_worker.augment(transform, image_HWC.numpy(), seed_4)
            assert np.array_equal(found_HWC.numpy(), expected_HWC)
            changed += not torch.equal(image_HWC, found_HWC)
    assert 10 < changed < 32
    plain.close()  # type: ignore[attr-defined]


def test_every_magnitude_can_be_drawn() -> None:
    """At the greatest, timm posterizes to 0 bits, which Pillow refuses: the image is black then."""
    transform = augment_worker.make_transform("rand-m10-p1-n1-inc1", 16, MEAN, "bicubic")
    image_HWC = np.random.default_rng(0).integers(1, 255, (16, 16, 3), dtype=np.uint8)
    seeds_B4 = draws(0, Stream.RAND_AUGMENT, 0, np.arange(150), 0)
    found = [augment_worker.augment(transform, image_HWC, seed_4) for seed_4 in seeds_B4]
    black = sum(not each.any() for each in found)
    assert 1 <= black <= 25
    (op,) = (op for op in transform.ops if op.name == "PosterizeIncreasing")
    for bits in (1, 4, 8):
        expected_HWC = image_HWC & (256 - 2 ** (8 - bits))
        assert np.array_equal(np.asarray(op.aug_fn(Image.fromarray(image_HWC), bits)), expected_HWC)


def test_a_process_that_dies_is_told(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_worker, "work", _die)
    with pytest.raises(EnvironmentProblem, match="augments images died"):
        augmented(Index.open(scenes), 1, 0, 1)


def _die(*_: Any) -> float:
    import os

    os._exit(1)


def test_planned_depth_against_a_plain_loop() -> None:
    """In training each branch is multiplied by each image's factor; in evaluation nothing is."""
    model, depth, size = small_beit(), 3, 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.double()
    images_BCHW = torch.randn(size, 3, 64, 64, dtype=torch.float64)
    plain_BK = model.eval()(images_BCHW)
    planned = PlannedDepth(model, 0.3, "finetune.drop-path")
    assert planned.rates == pytest.approx([0.0, 0.15, 0.3])
    scale_LSB = torch.rand(depth, 2, size) * (torch.rand(depth, 2, size) > 0.4)
    planned.set(scale_LSB)
    assert torch.equal(model(images_BCHW), plain_BK)
    x_BND = model.patch_embed(images_BCHW)
    x_BND = torch.cat((model.cls_token.expand(size, -1, -1), x_BND), 1)
    for block, scale_SB in zip(model.blocks, scale_LSB.double()[..., None, None], strict=True):
        x_BND = x_BND + scale_SB[0] * block.gamma_1 * block.attn(block.norm1(x_BND))
        x_BND = x_BND + scale_SB[1] * block.gamma_2 * block.mlp(block.norm2(x_BND))
    expected_BK = model.forward_head(model.norm(x_BND))
    torch.testing.assert_close(model.train()(images_BCHW), expected_BK, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(expected_BK, plain_BK)
    untouched = small_beit()
    assert PlannedDepth(untouched, 0.0, "finetune.drop-path").rates == []
    assert isinstance(untouched.blocks[0].drop_path1, nn.Identity)


@pytest.mark.parametrize("share", [1.0, 0.875])
def test_a_test_equals_a_plain_loop(scenes: Path, share: float) -> None:
    """Counts of two ranks together, odd batch included, are those of images taken one by one."""
    index = Index.open(scenes)
    classes = len(index.classes)
    models = {"test": small_beit(classes=classes), "ema": small_beit(2, classes)}
    models["test"].train()
    normalise = Normaliser(MEAN, STD)
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    label_N = index.label.astype(np.int64)
    ranks = Ranks(0, 1, 1, CPU)
    parts = []
    for rank in (0, 1):
        plan = CentrePlan(index, batch_size=22, image_size=64, share=share, rank=rank, world=2)
        parts.append(count(models, normalise, plan, data, label_N, classes, CPU))
    assert models["test"].training
    whole = CentrePlan(index, batch_size=1, image_size=64, share=share)
    for name, model in models.items():
        both = parts[0][name]
        for field in ("seen_K", "right_K", "right5", "loss"):
            setattr(both, field, getattr(both, field) + getattr(parts[1][name], field))
        score = Score.of(both, ranks)
        model.eval()
        right, right5, losses, by_class = 0, 0, [], {k: [] for k in range(classes)}  # type: ignore[var-annotated]
        inner = make_loader("torchvision", data).batches(whole, 0)
        with torch.no_grad():
            for n in range(len(index)):
                image_HWC = next(inner).images_BHWC[0].double() / 255
                image_CHW = ((image_HWC - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).float()
                logits_K = model(image_CHW[None])[0]
                ranked = logits_K.argsort(descending=True).tolist()
                right += ranked[0] == label_N[n]
                right5 += label_N[n] in ranked[:5]
                losses.append(-float(F.log_softmax(logits_K.double(), 0)[label_N[n]]))
                by_class[int(label_N[n])].append(ranked[0] == label_N[n])
        inner.close()  # type: ignore[attr-defined]
        assert (score.images, score.accuracy, score.accuracy_top5) == (96, right / 96, right5 / 96)
        assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert score.per_class == [float(np.mean(by_class[k])) for k in range(classes)]
        assert 0 < right5 < 96


def test_a_test_can_be_broken_off(scenes: Path) -> None:
    index, model = Index.open(scenes), small_beit()
    data = DataConfig(loader="torchvision", image_size=64, threads=1)
    plan = CentrePlan(index, batch_size=16, image_size=64)
    answers = iter([False, False, True])
    normalise = Normaliser(MEAN, STD)
    with pytest.raises(Stopped):
        count({"": model}, normalise, plan, data, index.label.astype(np.int64), 10, CPU, stopped=lambda: next(answers))
    assert model.training
    with pytest.raises(DataError, match="No image"):
        Score.of(Counts.none(3, CPU), Ranks(0, 1, 1, CPU))


@pytest.mark.parametrize("name", ["finetune_vit_b16_in1k", "finetune_vit_l16_in1k"])
def test_shipped_recipes(name: str) -> None:
    """Recipe B is the defaults; L differs in length, layer decay and drop path."""
    found = load_settings(FinetuneConfig, REPO / "configs" / f"{name}.yaml")
    given = {"model": ModelConfig("runs/x"), "data": replace(found.data, index="a")}
    check_finetune(replace(found, finetune=replace(found.finetune, test="b"), **given))  # type: ignore[arg-type]
    base = FinetuneConfig()
    epochs, warmup, decay, drop = (100, 20, 0.65, 0.1) if "_b16_" in name else (50, 5, 0.8, 0.2)
    assert (found.train.epochs, found.optim.warmup_fraction) == (epochs, pytest.approx(warmup / epochs))
    assert (found.finetune.layer_decay, found.finetune.drop_path) == (decay, drop)
    assert found.augmentation == base.augmentation
    assert replace(found.optim, warmup_fraction=base.optim.warmup_fraction) == base.optim
    assert found.data == base.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": AugmentationConfig(rand_augment="rand-m9-q3")}, "no RandAugment 'rand-m9-q3'"),
        ({"augmentation": AugmentationConfig(mixup_prob=1.5)}, "augmentation.mixup-prob is 1.5"),
        ({"augmentation": AugmentationConfig(label_smoothing=1.0)}, "label-smoothing is 1.0"),
        ({"model": ModelConfig("")}, "nothing in model.name"),
        ({"data": DataConfig()}, "nothing in data.index"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    sound = FinetuneConfig(model=ModelConfig("runs/x"), data=DataConfig(index="a"))
    sound = replace(sound, finetune=replace(sound.finetune, test="b"))
    check_finetune(sound)
    with pytest.raises(ConfigError, match=message):
        check_finetune(replace(sound, **changes))
