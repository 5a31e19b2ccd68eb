"""Teachers other than CLIP: timm's towers against its own forward pass, pixels against a loop, HOG against skimage."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage.feature import hog
from timm.models import save_for_hf
from torch import Tensor, nn

import mvp_kernels
from mvp_fast.config.schema import StudentConfig, TeacherConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.export.timm_format import write_timm
from mvp_fast.models.patches import patches_of_both
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.base import Teacher, resize
from mvp_fast.models.teachers.build import build_teacher
from mvp_fast.models.teachers.hog import HogTeacher, gradients
from mvp_fast.models.teachers.timm_tower import TimmTeacher

GRID, PIXELS = (4, 4), 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
# name: has CLS, tokens before the patches, whether the last block is pruned, other arguments
FAMILIES: dict[str, tuple[bool, int, bool, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (True, 1, True, {}),
    "vit_base_patch16_clip_224": (True, 1, True, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "vit_small_patch14_reg4_dinov2": (True, 5, True, {}),
    "vit_base_patch16_siglip_224": (False, 0, True, {}),
    "aimv2_large_patch14_224": (False, 0, True, {}),
    "deit_tiny_distilled_patch16_224": (True, 2, True, {}),
    "beitv2_base_patch16_224": (True, 1, False, {}),
    "eva02_tiny_patch14_224": (True, 1, False, {}),
    "vit_small_patch16_dinov3": (True, 5, False, {}),
    "vit_base_patch16_rope_reg1_gap_256": (False, 1, False, {}),
}


def crops(count: int = 3, size: int = PIXELS) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def all_tokens(teacher: Teacher, count: int) -> Tensor:
    first = 0 if teacher.has_cls else 1
    return torch.arange(first, 1 + teacher.grid[0] * teacher.grid[1]).expand(count, -1)


def randomized(model: nn.Module) -> nn.Module:
    """Every weight matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def write_folder(folder: Path, name: str, **arguments: Any) -> Path:
    """A small model of timm's, saved by timm."""
    arguments = {**SMALL, **arguments}
    model = randomized(timm.create_model(name, num_classes=0, **arguments))
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder


def timm_teacher(path: Path | str, name: str = "vit_tiny_patch16_224", **options: Any) -> TimmTeacher:
    teacher = build_teacher(
        TeacherConfig(name, str(path), kind="timm"),
        **{"grid": GRID, "image_size": PIXELS, "impl": "reference", **options},
    )
    assert isinstance(teacher, TimmTeacher)
    return teacher


@torch.no_grad()
def features_by_timm(folder: Path, images_BHWC: Tensor) -> Tensor:
    """CLS where there is one and the patches, after the final norm, by timm's own loading and forward pass, float64."""
    patch = timm.create_model(f"local-dir:{folder}", pretrained=False).patch_embed.patch_size[0]
    side = GRID[0] * patch
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=side).eval().double()
    mean, std = (torch.tensor(model.pretrained_cfg[each], dtype=torch.float64) for each in ("mean", "std"))
    x_BCHW = ((resize(images_BHWC, (side, side)).double() / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens = model.forward_features(x_BCHW)
    if isinstance(model.norm, nn.Identity):
        tokens = model.fc_norm(tokens)
    patches = tokens[:, model.num_prefix_tokens :]
    return patches if model.cls_token is None else torch.cat((tokens[:, :1], patches), dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_timms(name: str, tmp_path: Path) -> None:
    has_cls, prefix, pruned, arguments = FAMILIES[name]
    folder = write_folder(tmp_path, name, **arguments)
    teacher = timm_teacher(folder).double()
    assert (teacher.has_cls, teacher.prefix, teacher.pruned) == (has_cls, prefix, pruned)
    assert (teacher.grid, teacher.width, len(teacher.blocks)) == (GRID, 48, 3)
    images = crops(2, 80)
    want = features_by_timm(folder, images)
    index = all_tokens(teacher, 2)
    torch.testing.assert_close(teacher(teacher.patches(images), index), want, rtol=0, atol=1e-9)
    order = torch.stack([torch.randperm(index.shape[1])[:5] for _ in range(2)])
    mvp_kernels.reset_record()
    some = teacher(teacher.patches(images), index.gather(1, order))
    assert mvp_kernels.record() == {"masked_gather": "reference", "patchify": "reference"}
    torch.testing.assert_close(some, want.gather(1, order[..., None].expand(-1, -1, 48)), rtol=0, atol=1e-9)


def test_an_exported_students_features_are_its_own(tmp_path: Path) -> None:
    config = StudentConfig(width=48, depth=2, heads=3)
    student = Student(config, target_width=8, image_size=PIXELS, seed=3)
    randomized(student)
    teacher = timm_teacher(write_timm(student, tmp_path / "export"), cls=True)
    assert (teacher.mean, teacher.std) == (student.mean, student.std) == (MEAN, STD)
    assert teacher.words == f"beitv2_base_patch16_224 ({tmp_path / 'export'})"
    images = crops()
    student_BNP, teacher_BNP = patches_of_both(images, student, teacher)
    with torch.no_grad():
        torch.testing.assert_close(
            teacher(teacher_BNP, all_tokens(teacher, 3)), student.encode(student_BNP), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beitv2_base_patch16_224"])
def test_lowered_towers_are_near_the_float64_one(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, name)
    teacher, images = timm_teacher(folder).lower(dtype), crops()
    got = teacher(teacher.patches(images), all_tokens(teacher, 3))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(teacher.patches(images), all_tokens(teacher, 3))
    assert got.dtype == teacher.dtype == dtype
    assert teacher.lowered
    assert torch.equal(under_autocast, got)
    cosine = torch.nn.functional.cosine_similarity(features_by_timm(folder, images), got.double(), -1)
    # Three blocks of a rounding of 2^-11 (fp16) or 2^-8 (bf16) each.
    assert cosine.min() > (1 - 1e-5 if dtype == torch.float16 else 1 - 1e-3)


def test_a_tower_stays_frozen(tmp_path: Path) -> None:
    teacher = timm_teacher(write_folder(tmp_path, "vit_tiny_patch16_224"))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(teacher.patches(crops()), all_tokens(teacher, 3)).requires_grad


# ---- where weights come from


def test_random_weights_are_decided_by_the_seed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = (timm_teacher("random") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    config = TeacherConfig("vit_tiny_patch16_224", "random", seed=1, kind="timm")
    other = build_teacher(config, grid=GRID, image_size=PIXELS)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    images, index = crops(), all_tokens(first, 3)
    assert not torch.allclose(first(first.patches(images), index), other(other.patches(images), index))
    assert other.words == "timm's vit_tiny_patch16_224, random weights (seed 1)"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {}, "state_dict_ema": state} | {"arch": "vit"},
        lambda state: {"model": {**state, "decoder_embed.weight": torch.zeros(3), "mask_token": torch.zeros(1, 1, 48)}},
        lambda state: {
            "student": {},
            "teacher": {
                **{f"module.backbone.{name}": tensor for name, tensor in state.items()},
                "module.head.mlp.0.weight": torch.zeros(3),
            },
        },
        lambda state: {**state, "head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)},
        lambda state: {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()},
    ],
    ids=["plain", "DDP", "average", "MAE", "DINO", "with a head", "norm for fc_norm"],
)
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "beit_base_patch16_224"])
def test_checkpoint_layouts(name: str, wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the small one that the folder describes; its weights come from another file."""
    folder = write_folder(tmp_path, name)
    plain = timm_teacher(folder)
    state = wrap(load_file(folder / "model.safetensors"))
    if "mask_token" in state.get("model", {}) and name.startswith("vit"):
        del state["model"]["mask_token"]  # timm takes it for a mark of DINOv2's format
    torch.save(state, tmp_path / "weights.pth")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, **named: create(*given, **{**SMALL, **named}))
    from_file = timm_teacher(tmp_path / "weights.pth", name)
    for (own, a), (_, b) in zip(from_file.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), own
    assert from_file.words == f"{name} ({tmp_path / 'weights.pth'})"


def test_positions_are_resampled_by_timm(tmp_path: Path) -> None:
    """A file trained at 14 x 14 on a student's 4 x 4: as timm loads it at that size."""
    state = randomized(timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=0)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    teacher = timm_teacher(tmp_path / "w.safetensors", "vit_tiny_patch16_224.augreg_in21k")
    assert (teacher.mean, teacher.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "the tag's statistics are not used"
    cfg = {"file": str(tmp_path / "w.safetensors"), "hf_hub_id": None}
    model = timm.create_model("vit_tiny_patch16_224", True, pretrained_cfg_overlay=cfg, num_classes=0, img_size=64)
    assert model.pos_embed.shape == (1, 17, 192)
    assert torch.equal(teacher.model.pos_embed, model.pos_embed)
    # Weights kept in half precision are widened first.
    half = {name: tensor.half() for name, tensor in state.items()}
    for name, kept in (("half", half), ("widened", {name: tensor.float() for name, tensor in half.items()})):
        save_file(kept, tmp_path / f"{name}.safetensors")
    first, second = (timm_teacher(tmp_path / f"{name}.safetensors") for name in ("half", "widened"))
    assert first.fingerprint == second.fingerprint


def test_timms_own_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder laid out as the hub's cache, so that no network is needed; without it, the way out is told."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "vit_tiny_patch16_224.augreg_in21k"
    with pytest.raises(EnvironmentProblem, match=r"not on this machine and could not be downloaded.*say `random`"):
        timm_teacher("timm", name)
    model = randomized(timm.create_model(name, num_classes=21843))
    cached = tmp_path / f"models--timm--{name}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    teacher = timm_teacher("timm", name)
    assert torch.equal(teacher.norm.weight, model.norm.weight)
    assert teacher.words == f"timm's {name}"
    save_file(model.state_dict(), tmp_path / "same.safetensors")
    assert timm_teacher(tmp_path / "same.safetensors", name).fingerprint == teacher.fingerprint


def test_fingerprints_tell_teachers_apart(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", "vit_tiny_patch16_224")
    plain = timm_teacher(folder).fingerprint
    assert timm_teacher(folder).fingerprint == plain
    seen = {plain, timm_teacher(folder, grid=(2, 2)).fingerprint}
    state = load_file(folder / "model.safetensors")
    state["blocks.1.norm1.bias"][3] = torch.nextafter(state["blocks.1.norm1.bias"][3], torch.tensor(torch.inf))
    save_file(state, folder / "model.safetensors")
    seen.add(timm_teacher(folder).fingerprint)
    settings = json.loads((folder / "config.json").read_text())
    settings["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.4]
    (folder / "config.json").write_text(json.dumps(settings))
    seen.add(timm_teacher(folder).fingerprint)
    settings["model_args"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(settings))
    seen.add(timm_teacher(folder).fingerprint)
    for kind in ("pixels", "hog"):
        for grid, size in ((GRID, 64), ((2, 2), 64), ((2, 2), 32)):
            seen.add(build_teacher(TeacherConfig(kind=kind), grid=grid, image_size=size).fingerprint)
    assert len(seen) == 5 + 6
    named = TeacherConfig("nonsense", "nowhere", kind="hog")
    assert build_teacher(named, grid=GRID, image_size=64).fingerprint in seen, "the name is not ignored"


# ---- what is refused


def refused(kind: type[Exception], *says: str, config: TeacherConfig, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        build_teacher(config, **{"grid": GRID, "image_size": PIXELS, **options})
    for text in says:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [
        ("vit_smal_patch16_224", "random", ("no model named 'vit_smal_patch16_224'", "Did you mean vit_small_patch")),
        ("qqqq", "random", ("no model named 'qqqq'", "vit_small_patch16_224")),
        ("vit_small_patch16_224.dinno", "timm", ("no weights for vit_small_patch16_224.dinno", "Did you mean")),
        ("vit_small_patch16_224.dinno", "random", ("no weights for", "Did you mean")),
        ("resnet50", "random", ("resnet50 can't be the teacher", "of another kind", "vit_small_patch16_224.dino")),
        ("swin_tiny_patch4_window7_224", "random", ("can't be the teacher",)),
        ("vit_base_r50_s16_224", "random", ("can't be the teacher",)),
        ("vit_small_patch16_224", "openai", ("no weights 'openai'", "Say `timm`")),
        ("vit_small_patch32_224", "random", ("patches of 32 px", "grid of 2x2, the student has 4x4", "at most 16 px")),
    ],
)
def test_wrong_names(name: str, pretrained: str, says: tuple[str, ...]) -> None:
    refused(ConfigError, *says, config=TeacherConfig(name, pretrained, kind="timm"))


def test_a_model_without_weights_at_timm() -> None:
    name = next(each for each in timm.list_models(module="vision_transformer") if not timm.is_model_pretrained(each))
    refused(ConfigError, f"no weights for {name}", "Its tags: none", config=TeacherConfig(name, "timm", kind="timm"))


@pytest.mark.parametrize("kind", ["pixels", "hog"])
def test_cls_of_what_has_none(kind: Any) -> None:
    says = (f"The teacher `{kind}`", "none for the CLS token", "Set objective.cls to False")
    refused(ConfigError, *says, config=TeacherConfig(kind=kind), cls=True)
    assert not build_teacher(TeacherConfig(kind=kind), grid=GRID, image_size=PIXELS).has_cls


def test_cls_of_a_tower_without_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "vit_base_patch16_siglip_224")
    says = ("siglip_224 has no CLS token", "Set objective.cls to False")
    refused(ConfigError, *says, config=TeacherConfig(pretrained=str(folder), kind="timm"), cls=True)


def test_patches_that_do_not_fit() -> None:
    says = ("patches of 20 px can't be cut into HOG's cells of 8 px",)
    refused(ConfigError, *says, config=TeacherConfig(kind="hog"), image_size=80)
    for kind in ("pixels", "hog"):
        refused(ConfigError, "70 px can't be cut into 4x4", config=TeacherConfig(kind=kind), image_size=70)  # type: ignore[arg-type]


def test_wrong_files(tmp_path: Path) -> None:
    small = TeacherConfig("vit_tiny_patch16_224", kind="timm")
    for missing in (tmp_path / "none.pth", "none.safetensors", "a/b"):
        config = replace(small, pretrained=str(missing))
        refused(DataError, "There is no such checkpoint file or folder", str(missing), config=config)
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08" * 100)
    torch.save({"state_dict": {"a.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    wide = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1).state_dict()
    torch.save(wide, tmp_path / "wide.pth")
    for file, *says in (
        ("damaged.safetensors", "The checkpoint can't be read", "Copy or download it again"),
        ("other.pth", "another model than vit_tiny_patch16_224", "weights do not fit", "Give in teacher.name"),
        ("list.pth", "holds no weights"),
        ("empty.pth", "holds no weights"),
        ("wide.pth", "another model than vit_tiny_patch16_224", "do not fit"),
    ):
        refused(DataError, *says, file, config=replace(small, pretrained=str(tmp_path / file)))


def test_wrong_folders(tmp_path: Path) -> None:
    def of(folder: Path) -> TeacherConfig:
        return TeacherConfig(pretrained=str(folder), kind="timm")

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(DataError, "a run's folder, not an export", "mvp-fast export", config=of(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    refused(DataError, "no model.safetensors and no config.json", config=of(tmp_path / "empty"))
    folder = write_folder(tmp_path / "good", "vit_tiny_patch16_224")
    settings = json.loads((folder / "config.json").read_text())
    for text, *says in (
        ("{", "not in timm's format"),
        ("{}", "config.json lacks 'architecture'"),
        (json.dumps({**settings, "architecture": 3}), "not in timm's format"),
        (json.dumps({**settings, "model_args": {"nonsense": 1}}), "timm can't build"),
        (json.dumps({**settings, "model_args": {**SMALL, "embed_dim": 36}}), "of another model", "do not fit"),
    ):
        (folder / "config.json").write_text(text)
        refused(DataError, *says, str(folder), config=of(folder))
    for architecture, say in (("resnet18", "can't be the teacher"), ("vit_tinny_patch16_224", "Did you mean vit_tiny")):
        (folder / "config.json").write_text(json.dumps({**settings, "architecture": architecture}))
        refused(ConfigError, say, config=of(folder))


# ---- pixels


def slow_pixels(image_HWC: np.ndarray, patch: int) -> np.ndarray:
    """(N, P), a patch and a value at a time, float64."""
    side = image_HWC.shape[0] // patch
    rows = []
    for row, column in itertools.product(range(side), repeat=2):
        values = [
            (float(image_HWC[row * patch + y, column * patch + x, c]) / 255 - MEAN[c]) / STD[c]
            for c, y, x in itertools.product(range(3), range(patch), range(patch))
        ]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        rows.append([(value - mean) / math.sqrt(variance + 1e-6) for value in values])
    return np.array(rows)


def some_pictures(scenes: Path, size: int = PIXELS) -> Tensor:
    """Noise, a real scene, one of few values, and one of a single colour."""
    files = sorted(scenes.rglob("*.jpg"))[:2]
    assert len(files) == 2
    real = [torch.from_numpy(np.array(Image.open(file).convert("RGB").resize((size, size)))) for file in files]
    flat = torch.full((size, size, 3), 7, dtype=torch.uint8)
    few = torch.randint(0, 3, (size, size, 3), dtype=torch.uint8)
    few[: size // 2] = 255
    return torch.stack([crops(1, size)[0], *real, few, flat])


def test_pixels_are_those_of_a_plain_loop(scenes: Path) -> None:
    images = some_pictures(scenes)
    teacher = build_teacher(TeacherConfig(kind="pixels"), grid=GRID, image_size=PIXELS, impl="reference")
    want = torch.from_numpy(np.stack([slow_pixels(image, 16) for image in images.numpy()]))
    found = teacher(teacher.patches(images), all_tokens(teacher, 5))
    assert found.dtype == torch.float32
    assert (teacher.width, found.shape) == (768, (5, 16, 768))
    # A difference of two values that float32 rounds to 1e-7, over a deviation of 1e-3 where a patch is of one colour.
    torch.testing.assert_close(found[:-1].double(), want[:-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-3)
    index = torch.stack([1 + torch.randperm(16)[:6] for _ in range(5)])
    mvp_kernels.reset_record()
    some = teacher(teacher.patches(images), index)
    assert mvp_kernels.record() == {"masked_gather": "reference", "patchify": "reference"}
    assert torch.equal(some, found.gather(1, (index - 1)[..., None].expand(-1, -1, 768)))


# ---- HOG


def skimage_hog(image_HWC: np.ndarray, grid: int, patch: int) -> np.ndarray:
    """(N, D) in the teacher's order; each colour by itself."""
    colours = [
        hog(
            image_HWC[..., c] / 256,
            orientations=9,
            pixels_per_cell=(8, 8),
            cells_per_block=(1, 1),
            block_norm="L2",
            feature_vector=False,
        )[:, :, 0, 0]
        for c in range(3)
    ]
    cells = patch // 8
    x = np.stack(colours).reshape(3, grid, cells, grid, cells, 9)
    return x.transpose(1, 3, 0, 2, 4, 5).reshape(grid * grid, -1)


@pytest.mark.parametrize(("grid", "size"), [(4, 64), (2, 16), (2, 64)])
def test_hog_is_skimages(grid: int, size: int, scenes: Path) -> None:
    images = some_pictures(scenes, size)
    teacher = build_teacher(TeacherConfig(kind="hog"), grid=(grid, grid), image_size=size, impl="reference")
    patch = size // grid
    assert teacher.width == 27 * (patch // 8) ** 2
    want = torch.from_numpy(np.stack([skimage_hog(image.astype(float), grid, patch) for image in images.numpy()]))
    patches = teacher.patches(images)
    wide = teacher(patches.double(), all_tokens(teacher, 5))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, want, rtol=0, atol=5e-7)  # skimage adds up in float32
    single = teacher(patches, all_tokens(teacher, 5))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=0, atol=1e-6)
    assert not want[-1].any(), "a single colour has gradients"
    assert want[0].any(-1).all()


def test_hog_of_some_tokens() -> None:
    images, teacher = crops(), build_teacher(TeacherConfig(kind="hog"), grid=GRID, image_size=PIXELS, impl="reference")
    index = torch.stack([1 + torch.randperm(16)[:6] for _ in range(3)])
    mvp_kernels.reset_record()
    some = teacher(teacher.patches(images), index)
    assert mvp_kernels.record() == {"masked_gather": "reference", "patchify": "reference"}
    every = teacher(teacher.patches(images), all_tokens(teacher, 3))
    assert torch.equal(some, every.gather(1, (index - 1)[..., None].expand(-1, -1, 108)))


def test_opposite_directions_share_a_bin() -> None:
    """Every pair of differences that bytes can have along the axes and at the bins' borders."""
    for down, across in itertools.product((-255, -3, -1, 0, 1, 2, 255), repeat=2):
        image = torch.zeros(1, 1, 3, 3)
        image[0, 0, 2, 1], image[0, 0, 1, 2] = down / 256, across / 256
        turned = gradients(-image)
        magnitude, number = gradients(image)
        assert number[0, 0, 1, 1] == turned[1][0, 0, 1, 1]
        assert magnitude[0, 0, 1, 1] == pytest.approx(math.hypot(down, across) / 256)
        if down or across:
            assert number[0, 0, 1, 1] == math.degrees(math.atan2(down, across)) % 180 // 20


def test_pixels_and_hog_stay_float32_whatever_is_asked() -> None:
    for kind in ("pixels", "hog"):
        teacher = build_teacher(TeacherConfig(kind=kind), grid=GRID, image_size=PIXELS)  # type: ignore[arg-type]
        images, index = crops(), all_tokens(teacher, 3)
        plain = teacher(teacher.patches(images), index)
        lowered = teacher.lower(torch.float16)
        assert not lowered.lowered
        with torch.autocast("cpu", torch.bfloat16):
            again = lowered(lowered.patches(images), index)
        assert torch.equal(again, plain)
        assert not teacher.train().training


def test_one_read_gives_both_models_their_patches() -> None:
    student = Student(StudentConfig(width=48, depth=1, heads=3), target_width=108, image_size=PIXELS, impl="reference")
    teacher = build_teacher(TeacherConfig(kind="hog"), grid=GRID, image_size=PIXELS, impl="reference")
    assert isinstance(teacher, HogTeacher)
    images = crops()
    mvp_kernels.reset_record()
    with torch.autocast("cpu", torch.bfloat16):
        student_BNP, teacher_BNP = patches_of_both(images, student, teacher)
    assert (student_BNP.dtype, teacher_BNP.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(teacher_BNP, teacher.patches(images))
