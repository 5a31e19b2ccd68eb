"""The parts of `teacher fit`: captions, the contrastive step, what is measured; each against a plain reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from mvp_fast.config.fit import ClipConfig, FitDataConfig, FitOptimConfig, FitTrainConfig, TeacherFitConfig, check_fit
from mvp_fast.config.load import load_settings
from mvp_fast.config.schema import MaskConfig
from mvp_fast.errors import ConfigError, DataError
from mvp_fast.loaders.base import Batch
from mvp_fast.models.normaliser import Normaliser
from mvp_fast.models.teachers.new_clip import MEAN, STD, clip_settings, new_clip
from mvp_fast.samples.index import Index
from mvp_fast.samples.plan import SamplePlan
from mvp_fast.samples.random import Stream, draws
from mvp_fast.samples.scenes.vocabulary import COLOURS, SHAPES
from mvp_fast.train.distributed import Ranks
from mvp_fast.train.fit.captions import Captions, read_captions, tokenize
from mvp_fast.train.fit.measure import prompt_features, recall, zero_shot
from mvp_fast.train.fit.scene_truth import TEMPLATES, Truth, check_held_out, read_truth
from mvp_fast.train.fit.step import GREATEST_SCALE, FitStep
from mvp_fast.train.optim import build_optimizer
from tests.conftest import REPO

SMALL = ClipConfig(
    *("ViT-S-16", 16),
    **{"width": 32, "layers": 1, "heads": 2, "patch_size": 8, "text_width": 32, "text_layers": 1, "text_heads": 2},
    context_length=40,
)
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def config_of(batch_size: int = 8, accumulate: int = 1) -> TeacherFitConfig:
    train = FitTrainConfig(batch_size=batch_size, accumulate=accumulate, precision="fp32", device="cpu")
    optim = FitOptimConfig(clip_grad=0.0)  # gradients are looked at as they are
    return TeacherFitConfig(data=FitDataConfig(image_size=32), model=SMALL, optim=optim, train=train)


def write_tsv(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("key\tcaption\n" + "".join(f"{key}\t{caption}\n" for key, caption in rows), encoding="utf-8")


# Captions


@pytest.fixture(scope="module")
def index(scenes: Path) -> Index:
    return Index.open(scenes)


@pytest.fixture(scope="module")
def captions(scenes: Path, index: Index) -> Captions:
    return read_captions(index, scenes / "scenes.parquet", 40)


def test_each_image_has_its_caption(scenes: Path, index: Index, captions: Captions) -> None:
    told = {row["key"]: row["caption"] for row in pq.read_table(scenes / "scenes.parquet").to_pylist()}
    tokens = open_clip.get_tokenizer("ViT-S-16", context_length=40)
    for i in range(len(index)):
        assert captions.start[i] == i
        assert captions.texts[i] == told[index.key(i).removesuffix(".jpg")]
        assert captions.tokens_KL[i].tolist() == tokens([captions.texts[i]])[0].tolist()


@pytest.mark.parametrize("suffix", [".parquet", ".tsv", ".jsonl"])
def test_tables_of_every_kind(suffix: str, index: Index, tmp_path: Path) -> None:
    """Keys with and without suffix, images that the index lacks, quotes, several captions of an image."""
    rows = [(index.key(i).removesuffix(".jpg" if i % 2 else ""), f'the "{i}"th') for i in reversed(range(len(index)))]
    rows += [("elsewhere/1.jpg", "none of these"), (index.key(4), "the fourth again")]
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"key": [key for key, _ in rows], "caption": [text for _, text in rows]}), path)
    elif suffix == ".tsv":
        write_tsv(path, rows)
    else:
        path.write_text("".join(json.dumps({"key": key, "caption": text, "x": 1}) + "\n" for key, text in rows))
    found = read_captions(index, path, 20)
    expected = [[f'the "{i}"th', *(["the fourth again"] if i == 4 else [])] for i in range(len(index))]
    assert found.texts == [text for texts in expected for text in texts]
    assert np.diff(found.start).tolist() == [len(texts) for texts in expected]


def test_one_of_several_captions_is_drawn(index: Index) -> None:
    count = 2 + np.arange(len(index)) % 3
    start = np.concatenate(([0], np.cumsum(count)))
    tokens_KL = np.arange(start[-1], dtype=np.int32)[:, None]
    several = Captions(["x"] * int(start[-1]), tokens_KL, start)
    data = FitDataConfig(image_size=32)
    plan = SamplePlan(index, seed=5, batch_size=96, data=data, mask=MaskConfig(patches=0), patch_size=8)
    times = np.zeros(start[-1], dtype=int)
    for step in range(60):
        rows = plan.step(step)
        for row, picked in enumerate(several.pick(rows, 9)[:, 0]):
            sample = rows.sample_B[row]
            assert start[sample] <= picked < start[sample + 1]
            times[picked] += 1
        word = int(draws(9, Stream.CAPTION, rows.epoch_B[-1], rows.position_B[-1], 0)[0, 0])
        assert several.pick(rows, 9)[-1, 0] == start[rows.sample_B[-1]] + word * int(count[rows.sample_B[-1]]) // 2**32
    assert times.sum() == 60 * 96
    expected = 60 / np.repeat(count, count)
    assert (np.abs(times - expected) < 6 * np.sqrt(expected)).all()


def test_short_captions_of_scenes(scenes: Path, index: Index, captions: Captions, tmp_path: Path) -> None:
    brief = read_captions(index, scenes / "scenes.parquet", 40, brief=True)
    truth = read_truth(index, scenes / "scenes.parquet")
    for i in range(len(index)):
        full, few, more = brief.texts[3 * i : 3 * i + 3]
        assert full == captions.texts[i]
        assert few == f"a {list(COLOURS)[truth.colour_N[i]]} {SHAPES[truth.shape_N[i]]}"
        assert full.startswith(more)
        assert more.endswith(few[1:])
    assert brief.fingerprint() != captions.fingerprint()
    write_tsv(tmp_path / "x.tsv", [(index.key(0), "x")])
    with pytest.raises(DataError, match=r"fit\.brief"):
        read_captions(index, tmp_path / "x.tsv", 40, brief=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "has no caption"),
        (lambda rows: [*rows[:-1], (rows[-1][0], "  ")], "has an empty caption"),
    ],
)
def test_an_image_without_a_caption(change: Any, message: str, index: Index, tmp_path: Path) -> None:
    write_tsv(tmp_path / "x.tsv", change([(index.key(i), "a thing") for i in range(len(index))]))
    with pytest.raises(DataError, match=message) as error:
        read_captions(index, tmp_path / "x.tsv", 20)
    assert index.key(len(index) - 1) in str(error.value)


def test_tables_that_are_none(index: Index, tmp_path: Path) -> None:
    for name, content in (("a.tsv", "key\ttext\nx\ty\n"), ("b.jsonl", "{"), ("c.parquet", "PAR1"), ("d.txt", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            read_captions(index, tmp_path / name, 20)
    pq.write_table(pa.table({"key": ["x"], "caption": [1]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="holds int64, not text"):
        read_captions(index, tmp_path / "e.parquet", 20)


def test_nothing_is_cut_off() -> None:
    text = "a red square on a wooden table"
    assert tokenize([text, "x"], 9, "here")[0, -1] == open_clip.SimpleTokenizer().eot_token_id
    with pytest.raises(ConfigError, match=r"has 9 tokens, the text tower takes 8.*model\.context-length to 9"):
        tokenize(["x", text], 8, "here")


# The step


def batch_of(index: Index, size: int, seed: int) -> Batch:
    data = FitDataConfig(image_size=32)
    plan = SamplePlan(index, seed=seed, batch_size=size, data=data, mask=MaskConfig(patches=0), patch_size=8)
    images = torch.randint(0, 256, (size, 32, 32, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return Batch(0, images, torch.empty(size, 0, dtype=torch.int64), plan.step(0))


class Frozen(torch.optim.SGD):
    """Leaves weights and gradients as they are, to be looked at."""

    def step(self, closure: Any = None) -> None:
        return None


def gradients(config: TeacherFitConfig, captions: Captions, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, dict]:
    clip = new_clip(clip_settings(config.model, 32), seed=4).to(dtype)
    step = FitStep(clip, Widened(clip), captions, Frozen(clip.parameters(), lr=0.0), config, ALONE)
    if dtype == torch.float64:
        step.clip = step.forward
    result = step(batch)
    return result.loss, {name: p.grad.clone() for name, p in clip.named_parameters()}


class Widened(nn.Module):
    """A CLIP that takes its images in its weights' type."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale

    def forward(self, images: Tensor, tokens: Tensor) -> Any:
        return self.clip(images.to(self.clip.visual.proj.dtype), tokens)


def plain_loss(clip: Any, batch: Batch, captions: Captions) -> Tensor:
    """Radford et al.'s loss by its formula, image by image and text by text."""
    image_BD = clip.visual(Normaliser(MEAN, STD)(batch.images_BHWC).double())
    text_BD = clip.encode_text(torch.from_numpy(captions.tokens_KL[batch.rows.sample_B]).long())
    image_BD, text_BD = (x / x.square().sum(1, keepdim=True).sqrt() for x in (image_BD, text_BD))
    size, total = len(image_BD), torch.zeros((), dtype=torch.float64)
    for i in range(size):
        to_texts = torch.stack([clip.logit_scale.exp() * image_BD[i] @ text_BD[j] for j in range(size)])
        to_images = torch.stack([clip.logit_scale.exp() * text_BD[i] @ image_BD[j] for j in range(size)])
        total = total - (to_texts[i] - to_texts.exp().sum().log()) / (2 * size)
        total = total - (to_images[i] - to_images.exp().sum().log()) / (2 * size)
    return total


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_loss_and_gradients_are_the_formulas(accumulate: int, index: Index, captions: Captions) -> None:
    """Whatever the micro-batches: each image is told from the captions of the whole batch."""
    batch, config = batch_of(index, 8, seed=11), config_of(8, accumulate)
    reference = new_clip(clip_settings(config.model, 32), seed=4).double()
    expected = plain_loss(reference, batch, captions)
    expected.backward()
    loss, found = gradients(config, captions, batch, torch.float64)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}"
        )
        assert parameter.grad.abs().max() > 0 or name == "visual.ln_pre.bias"
    loss32, found32 = gradients(config, captions, batch, torch.float32)
    assert loss32.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(found32["logit_scale"].double(), found["logit_scale"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(GREATEST_SCALE + 1, GREATEST_SCALE), (-1.0, 0.0), (2.0, 2.0)])
def test_the_temperature_stays_in_its_range(start: float, end: float, index: Index, captions: Captions) -> None:
    config = config_of(8)
    clip = new_clip(clip_settings(config.model, 32), seed=4)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    clip.logit_scale.data.fill_(start)
    FitStep(clip, clip, captions, Frozen(clip.parameters(), lr=0.0), config, ALONE)(batch_of(index, 8, 1))
    assert clip.logit_scale.item() == pytest.approx(end)


def test_a_pair_is_learnt(index: Index, captions: Captions) -> None:
    """Eight images and captions, seen again and again, are told apart."""
    config = config_of(8)
    clip = new_clip(clip_settings(config.model, 32), seed=4)
    optimizer = build_optimizer(clip, replace(config.optim, lr=3e-3))
    step, batch = FitStep(clip, clip, captions, optimizer, config, ALONE), batch_of(index, 8, 2)
    losses = [step(batch).loss.item() for _ in range(40)]
    assert losses[0] == pytest.approx(np.log(8), abs=1.5)  # at a temperature of 0.07
    assert losses[-1] < 0.1


# What is measured


def test_recall_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    images, texts = (torch.nn.functional.normalize(torch.randn(61, 4, generator=generator), dim=1) for _ in range(2))
    texts[7] = texts[30]
    same = torch.arange(61)
    same[7] = 30  # the same caption of two images
    found = recall(images, texts, same)
    for way, (queries, others) in {"image_to_text": (images, texts), "text_to_image": (texts, images)}.items():
        for k in (1, 5):
            hits = 0
            for i in range(61):
                nearest = sorted(range(61), key=lambda j: -float(queries[i] @ others[j]))[:k]
                hits += any(same[j] == same[i] for j in nearest)
            assert found[f"{way}_{k}"] == pytest.approx(hits / 61)
    assert recall(images, images, torch.arange(61))["image_to_text_1"] == 1.0
    blind = torch.ones(61, 4)
    assert set(recall(blind, blind, torch.arange(61)).values()) == {0.0}  # knows nothing, so finds nothing


def test_zero_shot_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(5)
    pairs = torch.nn.functional.normalize(torch.randn(len(COLOURS), len(SHAPES), 6, generator=generator), dim=-1)
    colours, shapes = (torch.randint(0, n, (200,), generator=generator) for n in (len(COLOURS), len(SHAPES)))
    images = pairs[colours, shapes] + 0.3 * torch.randn(200, 6, generator=generator)
    there = torch.arange(200) % 7 != 0
    found = zero_shot(images, there, Truth(colours.numpy(), shapes.numpy()), pairs)
    right = {"shape": 0, "colour": 0, "pair": 0}
    for n in torch.nonzero(there)[:, 0].tolist():
        means = {
            "shape": [torch.stack([pairs[c, s] for c in range(10)]).mean(0) for s in range(10)],
            "colour": [torch.stack([pairs[c, s] for s in range(10)]).mean(0) for c in range(10)],
            "pair": [pairs[c, s] for c in range(10) for s in range(10)],
        }
        true = {"shape": shapes[n], "colour": colours[n], "pair": colours[n] * 10 + shapes[n]}
        for name, classes in means.items():
            near = [float(images[n] @ each / each.norm()) for each in classes]
            right[name] += int(np.argmax(near) == int(true[name]))
    assert found == pytest.approx({name: count / int(there.sum()) for name, count in right.items()})
    assert found["pair"] > 0.3


def test_prompts_are_in_their_places() -> None:
    config = config_of()
    clip = new_clip(clip_settings(config.model, 32), seed=4).eval()
    with torch.no_grad():
        found = prompt_features(clip, config, ALONE)
        tokenizer = open_clip.SimpleTokenizer(context_length=40)
        for colour, shape in ((0, 0), (7, 3), (9, 9)):
            texts = [each.format(f"{list(COLOURS)[colour]} {SHAPES[shape]}") for each in TEMPLATES]
            mean = clip.encode_text(tokenizer(texts), normalize=True).mean(0)
            torch.testing.assert_close(found[colour, shape], mean / mean.norm())


def test_a_pair_of_the_training_set_is_not_held_out(scenes: Path) -> None:
    table = scenes / "scenes.parquet"
    check_held_out(None, table)
    with pytest.raises(ConfigError, match=r"pairs of colour and shape are in the training set.*--pairs seen"):
        check_held_out(table, table)


# The model's settings


def test_sizes_in_place_of_the_named_models() -> None:
    settings = clip_settings(ClipConfig(), 96)
    named = open_clip.get_model_config("ViT-S-16")
    named["vision_cfg"] |= {"image_size": 96, "head_width": 64}
    assert settings == named
    clip = new_clip(clip_settings(SMALL, 32), 0)
    assert (clip.visual.grid_size, clip.visual.output_dim, clip.context_length) == ((4, 4), 16, 40)
    assert [len(tower.resblocks) for tower in (clip.visual.transformer, clip.transformer)] == [1, 1]
    assert [tower.resblocks[0].attn.num_heads for tower in (clip.visual.transformer, clip.transformer)] == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "ViT-S-61"}, "no model named 'ViT-S-61'.*ViT-S-16"),
        ({"name": "RN50"}, "is a ResNet"),
        ({"name": "xlm-roberta-base-ViT-B-32"}, "text tower"),
        ({"heads": 3}, r"width of 32 does not divide into 3 heads \(model.width\)"),
        ({"heads": None}, "Give model.heads"),
        ({"text_heads": 5}, r"divide into 5 heads \(model.text-width\)"),
        ({"name": "."}, "holds no CLIP"),
    ],
)
def test_models_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        clip_settings(replace(SMALL, **change), 32)


def test_the_shipped_config_is_valid() -> None:
    config = load_settings(TeacherFitConfig, REPO / "configs" / "mini" / "clip.yaml")
    check_fit(config)
    settings = clip_settings(config.model, config.data.image_size)
    assert new_clip(settings, 0).visual.grid_size == (6, 6)
    assert config.data.flip == 0.0  # where a file has a part of a section, the rest is this task's defaults


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"layers": 0}, "model.layers is 0"),
        ("model", {"context_length": 2}, "model.context-length is 2"),
        ("fit", {"evaluate_every": -1}, "fit.evaluate-every"),
        ("train", {"sharding": "full"}, "train.sharding"),
        ("train", {"step_graph": True}, "train.step-graph"),
        ("data", {"loader": "synthetic"}, "no captions"),
        ("train", {"batch_size": 1}, "2 or more"),
    ],
)
def test_settings_out_of_range(section: str, change: dict[str, Any], message: str) -> None:
    config = TeacherFitConfig()
    check_fit(config)
    with pytest.raises(ConfigError, match=message):
        check_fit(replace(config, **{section: replace(getattr(config, section), **change)}))
