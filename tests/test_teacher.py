"""The teacher against open_clip's own model: features, preprocessing, grids, sources of weights, what is refused."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mvp_kernels
from mvp_fast.config.schema import TeacherConfig
from mvp_fast.errors import ConfigError, DataError, EnvironmentProblem
from mvp_fast.models.teachers.base import Teacher, resize, teacher_dtype
from mvp_fast.models.teachers.build import build_teacher

TEXT = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "tiny-16": {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16}},
    "tiny-14": {"embed_dim": 24, "vision_cfg": {"image_size": 84, "layers": 2, "width": 64, "patch_size": 14}},
    "tiny-16-quickgelu": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "ls_init_value": 0.5},
    },
    "tiny-32": {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32}},
}
GRID, PIXELS = (4, 4), 64


@pytest.fixture(scope="module", autouse=True)
def towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small models registered the way users register theirs."""
    folder = tmp_path_factory.mktemp("model_configs")
    for name, config in TOWERS.items():
        (folder / f"{name}.json").write_text(json.dumps({**config, "text_cfg": TEXT}))
    open_clip.add_model_config(folder)


def randomized_clip(name: str) -> torch.nn.Module:
    """A whole CLIP whose every vision weight matters."""
    clip = open_clip.create_model(name).eval()
    with torch.no_grad():
        for parameter in clip.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return clip


def save(clip: torch.nn.Module, path: Path, wrap: Callable[[dict], Any] = lambda state: state) -> Path:
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrap(state), path)
    return path


def crops(count: int = 3, size: int = PIXELS) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def all_tokens(teacher: Teacher, count: int) -> Tensor:
    return torch.arange(1 + teacher.grid[0] * teacher.grid[1]).expand(count, -1)


def open_clip_input(clip: torch.nn.Module, images_BHWC: Tensor) -> Tensor:
    """open_clip's own evaluation transform, on PIL images."""
    settings = open_clip.get_model_preprocess_cfg(clip)
    transform = open_clip.image_transform(
        settings["size"], is_train=False, mean=settings["mean"], std=settings["std"], interpolation="bicubic"
    )
    return torch.stack([transform(Image.fromarray(image.numpy())) for image in images_BHWC])


def teacher_of(path: Path, name: str = "tiny-16", **options: Any) -> Teacher:
    return build_teacher(TeacherConfig(name, str(path)), **{"grid": GRID, "image_size": PIXELS, **options})


@torch.no_grad()
def check_parity(clip: torch.nn.Module, teacher: Teacher, pixels: Tensor) -> None:
    x = open_clip_input(clip, pixels)
    features = teacher(teacher.patches(pixels), all_tokens(teacher, len(pixels)))
    torch.testing.assert_close(features[:, 0], clip.encode_image(x), rtol=0, atol=1e-5)
    # The patch tokens two ways: of forward_intermediates, and of the output_tokens switch.
    last = clip.visual.forward_intermediates(x, indices=1, normalize_intermediates=True, output_fmt="NLC")
    torch.testing.assert_close(features[:, 1:], last["image_intermediates"][0] @ clip.visual.proj, rtol=0, atol=1e-5)
    clip.visual.output_tokens = True
    _, tokens = clip.visual(x)
    torch.testing.assert_close(features[:, 1:], tokens @ clip.visual.proj, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-16", "tiny-16-quickgelu"])
def test_features_are_open_clips(name: str, tmp_path: Path) -> None:
    clip = randomized_clip(name)
    check_parity(clip, teacher_of(save(clip, tmp_path / "w.safetensors"), name), crops())


def test_features_are_open_clips_at_full_size(tmp_path: Path) -> None:
    clip = randomized_clip("ViT-B-16")
    path = save(clip, tmp_path / "w.pt")
    teacher = build_teacher(TeacherConfig("ViT-B-16", str(path)))
    assert (teacher.width, teacher.grid, teacher.input_size) == (512, (14, 14), (224, 224))
    assert teacher.mean == (0.48145466, 0.4578275, 0.40821073)
    assert teacher.std == (0.26862954, 0.26130258, 0.27577711)
    assert sum(p.numel() for p in teacher.parameters()) < 90e6, "the text tower is kept"
    check_parity(clip, teacher, crops(1, 224))


@torch.no_grad()
def test_only_the_asked_tokens_in_their_order(tmp_path: Path) -> None:
    teacher = teacher_of(save(randomized_clip("tiny-16"), tmp_path / "w.pt"))
    pixels = crops()
    index = torch.stack([torch.randperm(17)[:6] for _ in range(3)])
    mvp_kernels.reset_record()
    some = teacher(teacher.patches(pixels), index)
    assert mvp_kernels.record() == {"masked_gather": "reference", "patchify": "reference"}
    every = teacher(teacher.patches(pixels), all_tokens(teacher, 3))
    torch.testing.assert_close(some, torch.stack([every[b, index[b]] for b in range(3)]))


def test_another_grid_resizes_pixels_and_positions(tmp_path: Path) -> None:
    """A patch-14 tower of 6 x 6 on a 4 x 4 student: it sees 56 px, its positions resized by open_clip."""
    path = save(randomized_clip("tiny-14"), tmp_path / "w.pt")
    teacher = teacher_of(path, "tiny-14")
    assert (teacher.grid, teacher.input_size, teacher.patch_size) == (GRID, (56, 56), 14)
    clip = open_clip.create_model("tiny-14", pretrained=str(path), force_image_size=56).eval()
    torch.testing.assert_close(teacher.visual.positional_embedding, clip.visual.positional_embedding, rtol=0, atol=0)
    check_parity(clip, teacher, crops(2, 56))  # at its own size nothing is resized
    pixels = crops(2, PIXELS)
    resized = teacher.patches(resize(pixels, (56, 56)))
    torch.testing.assert_close(teacher.patches(pixels), resized, rtol=0, atol=0)


def bicubic_weights(size: int, out: int) -> np.ndarray:
    """(out, size): Keys' cubic with a = -1/2, widened by the scale where it shrinks; each row sums to 1."""
    scale = max(size / out, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * size / out
    x = np.abs((np.arange(size)[None] + 0.5 - centre) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(56, 56), (196, 196), (80, 48), (300, 224)])
def test_resize_is_antialiased_bicubic(size: tuple[int, int]) -> None:
    pixels = crops(2, 224)
    rows, columns = (bicubic_weights(224, out) for out in size)
    want = np.einsum("yh,bhwc,xw->byxc", rows, pixels.double().numpy(), columns, optimize=True).clip(0, 255)
    got = resize(pixels, size)
    assert got.dtype == torch.uint8
    assert np.abs(got.numpy() - want).max() <= 0.5 + 0.02  # rounded to the nearest, from float32 weights


def test_resize_is_pils_on_pictures() -> None:
    """PIL, with which CLIP resizes, also rounds between its two passes: within 1 where no edge overshoots."""
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 20), size=(224, 224), mode="bilinear")
    pixels = (smooth * 200 + 25).to(torch.uint8).permute(0, 2, 3, 1)
    want = np.asarray(Image.fromarray(pixels[0].numpy()).resize((196, 196), Image.Resampling.BICUBIC))
    assert np.abs(resize(pixels, (196, 196))[0].numpy().astype(int) - want).max() <= 1
    assert resize(pixels, (224, 224)) is pixels


def test_frozen(tmp_path: Path) -> None:
    teacher = teacher_of(save(randomized_clip("tiny-16"), tmp_path / "w.pt"))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(teacher.patches(crops()), all_tokens(teacher, 3)).requires_grad


def test_autocast_decides_the_precision(tmp_path: Path) -> None:
    teacher = teacher_of(save(randomized_clip("tiny-16"), tmp_path / "w.pt"))
    pixels, index = crops(), all_tokens(teacher, 3)
    full = teacher(teacher.patches(pixels), index)
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher(teacher.patches(pixels), index)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    cosine = torch.nn.functional.cosine_similarity(full, half.float(), -1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-16", "tiny-16-quickgelu"])
def test_lowered_towers_are_near_the_float64_one(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Against open_clip's tower in float64; autocast changes nothing in a tower that has a type of its own."""
    clip = randomized_clip(name)
    teacher = teacher_of(save(clip, tmp_path / "w.safetensors"), name).lower(dtype)
    pixels = crops()
    x = open_clip_input(clip, pixels).double()
    clip.double().visual.output_tokens = True
    pooled, tokens = clip.visual(x)
    want = torch.cat([pooled[:, None], tokens @ clip.visual.proj], dim=1)
    got = teacher(teacher.patches(pixels), all_tokens(teacher, 3))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = teacher(teacher.patches(pixels), all_tokens(teacher, 3))
    assert got.dtype == teacher.dtype == dtype
    assert torch.equal(under_autocast, got)
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    cosine = torch.nn.functional.cosine_similarity(want, got.double(), -1)
    # Two blocks of a rounding of 2^-11 (fp16) or 2^-8 (bf16) each.
    assert cosine.min() > (1 - 1e-5 if dtype == torch.float16 else 1 - 1e-3)


def test_a_lowered_towers_patches_are_exact(tmp_path: Path) -> None:
    """Every value of a byte, in both types: (value - 128) / 256, without rounding."""
    path = save(randomized_clip("tiny-16"), tmp_path / "w.pt")
    pixels = torch.arange(256, dtype=torch.uint8).repeat(48)[: 3 * 64 * 64].reshape(1, 64, 64, 3)
    for dtype in (torch.float16, torch.bfloat16):
        patches = teacher_of(path).lower(dtype).patches(pixels)
        want = (pixels.double() - 128) / 256
        want = want.reshape(1, 4, 16, 4, 16, 3).permute(0, 1, 3, 5, 2, 4).reshape(1, 16, 768)
        assert patches.dtype == dtype
        assert torch.equal(patches.double(), want)


def test_the_type_that_a_teacher_computes_in() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert teacher_dtype("auto", "fp32", gpu) == torch.float32
    assert teacher_dtype("auto", "bf16", gpu) == torch.float16
    assert teacher_dtype("auto", "bf16", cpu) == torch.bfloat16
    assert teacher_dtype("fp32", "bf16", gpu) == torch.float32
    assert teacher_dtype("fp16", "fp32", cpu) == torch.float16


# ---- where weights come from


def test_random_weights_are_decided_by_the_seed() -> None:
    torch.manual_seed(1)
    config = TeacherConfig("tiny-16", "random", seed=3)
    first = build_teacher(config, grid=GRID, image_size=PIXELS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = build_teacher(config, grid=GRID, image_size=PIXELS)
    assert torch.equal(state, torch.get_rng_state())
    other = build_teacher(TeacherConfig("tiny-16", "random", seed=4), grid=GRID, image_size=PIXELS)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    pixels, index = crops(), all_tokens(first, 3)
    assert not torch.allclose(first(first.patches(pixels), index), other(other.patches(pixels), index))


def test_fingerprint(tmp_path: Path) -> None:
    clip = randomized_clip("tiny-16")
    plain = teacher_of(save(clip, tmp_path / "a.pt"))
    assert len(plain.fingerprint) == 64
    assert teacher_of(save(clip, tmp_path / "b.safetensors")).fingerprint == plain.fingerprint, "the file's name counts"
    seen = {plain.fingerprint}
    for name, parameter in clip.visual.named_parameters():  # one bit of any weight counts
        before = parameter.data.clone()
        flat = parameter.data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
        seen.add(teacher_of(save(clip, tmp_path / "c.pt")).fingerprint)
        parameter.data.copy_(before)
        if name.startswith("transformer.resblocks.1"):
            break
    changed = len(seen) - 1
    assert changed >= 15
    seen.add(teacher_of(tmp_path / "a.pt", grid=(2, 2)).fingerprint)  # so does the grid
    folder = tmp_path / "other"
    folder.mkdir()
    save(clip, folder / "a.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"mean": [0.5] * 3}}))
    seen.add(teacher_of(folder / "a.pt").fingerprint)  # and the preprocessing
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    seen.add(teacher_of(folder / "a.pt").fingerprint)  # and the activation
    assert len(seen) == 1 + changed + 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {k: v.half() if "in_proj" in k else v for k, v in state.items()},
        lambda state: {k: v for k, v in state.items() if k.startswith("visual.")},
        lambda state: {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")},
    ],
    ids=["training checkpoint", "half", "vision only", "bare tower"],
)
def test_checkpoint_layouts(wrap: Callable[[dict], Any], tmp_path: Path) -> None:
    clip = randomized_clip("tiny-16")
    plain = teacher_of(save(clip, tmp_path / "a.pt"))
    wrapped = teacher_of(save(clip, tmp_path / "b.pt", wrap))
    for (name, a), (_, b) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_settings_beside_a_file_are_used(tmp_path: Path) -> None:
    """A hub folder's open_clip_config.json tells statistics and activation."""
    clip = randomized_clip("tiny-16")
    path = save(clip, tmp_path / "w.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3}})
    )
    teacher = teacher_of(path)
    assert (teacher.mean, teacher.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    quick = open_clip.create_model(
        "tiny-16",
        force_quick_gelu=True,
        force_preprocess_cfg={"mean": [0.5] * 3, "std": [0.25] * 3},
        pretrained=str(path),
    )
    check_parity(quick.eval(), teacher, crops())
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(DataError, match=r"configuration can't be read"):
        teacher_of(path)


def test_a_tag_knows_its_activation_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights need QuickGELU even where the model is named plain ViT-B-16; some tags have other statistics.

    The download is the only thing replaced: open_clip's own table points to a local file (its key for that is `file`).
    """
    from open_clip import pretrained

    clip = randomized_clip("tiny-16")
    path = save(clip, tmp_path / "w.pt")
    tag = {"file": str(path), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "quick_gelu": True}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-16", {"openai": tag})
    teacher = build_teacher(TeacherConfig("tiny-16", "openai"), grid=GRID, image_size=PIXELS)
    assert (teacher.mean, teacher.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with pytest.warns(UserWarning, match=r"QuickGELU mismatch"):
        reference = open_clip.create_model("tiny-16", pretrained="openai", load_weights=False)
    quick = open_clip.create_model("tiny-16", pretrained="openai", force_quick_gelu=True).eval()
    assert type(quick.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert type(reference.visual.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    check_parity(quick, teacher, crops())


def test_openai_weights_of_the_plain_name_need_quick_gelu() -> None:
    """What the test above relies on, in open_clip's real table."""
    assert open_clip.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"]
    assert open_clip.get_pretrained_cfg("ViT-B-16-quickgelu", "openai")["quick_gelu"]
    assert not open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k").get("quick_gelu", False)


def test_a_tag_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        EnvironmentProblem, match=r"weights openai of ViT-B-16 are not on this machine.*local checkpoint"
    ):
        build_teacher(TeacherConfig("ViT-B-16", "openai"))


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("RN50", "is a ResNet"),
        ("ViT-B-16-SigLIP", "is timm's vit_base_patch16_siglip_224"),
        ("coca_ViT-B-32", "pools its tokens by attention"),
        ("ViT-L-14-CLIPA", "pools its tokens .avg. in place of a CLS token"),
    ],
)
def test_other_towers(name: str, obstacle: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} can't be the teacher: its vision tower {obstacle}.*Take a plain"):
        build_teacher(TeacherConfig(name, "random"))


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"no model named 'ViT-B16'.*Did you mean ViT-B-16"):
        build_teacher(TeacherConfig("ViT-B16", "random"))
    with pytest.raises(
        ConfigError, match=r"no weights 'openay' for ViT-B-16.*Did you mean openai\?.*laion2b_s34b_b88k"
    ):
        build_teacher(TeacherConfig("ViT-B-16", "openay"))


def test_a_grid_that_cannot_match() -> None:
    with pytest.raises(
        ConfigError, match=r"64 px crops give it a grid of 2x2, the student has 4x4.*at most 16 px, such as ViT-B-16"
    ):
        build_teacher(TeacherConfig("tiny-32", "random"), grid=GRID, image_size=PIXELS)
    assert build_teacher(TeacherConfig("tiny-32", "random"), grid=(2, 2), image_size=PIXELS).grid == (2, 2)
    with pytest.raises(ConfigError, match=r"at most 15 px, such as ViT-L-14 or ViT-H-14"):
        build_teacher(TeacherConfig("tiny-16", "random"), grid=GRID, image_size=60)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "folder/missing"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such checkpoint file.*missing"):
        teacher_of(tmp_path / name)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such checkpoint file"):
        teacher_of(tmp_path)


@pytest.mark.parametrize("other", ["tiny-14", "tiny-16-quickgelu", "ViT-S-16"])
def test_a_checkpoint_of_another_model(other: str, tmp_path: Path) -> None:
    path = save(randomized_clip(other), tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"of another model: [0-9]+ weights do not fit, first .*teacher.name"):
        teacher_of(path)


def test_a_checkpoint_without_a_tower(tmp_path: Path) -> None:
    torch.save({"vision_model.embeddings.weight": torch.zeros(2)}, tmp_path / "hf.pt")
    with pytest.raises(
        DataError, match=r"no vision tower of open_clip.*first names are vision_model.embeddings.weight"
    ):
        teacher_of(tmp_path / "hf.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match=r"no vision tower"):
        teacher_of(tmp_path / "list.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_file(suffix: str, keep: float, tmp_path: Path) -> None:
    path = save(randomized_clip("tiny-16"), tmp_path / f"w{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(DataError, match=r"(can't be read|damaged)"):
        teacher_of(path)


class Malice:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    buffer = io.BytesIO()
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}, "extra": Malice(mark)}, buffer)
    (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Malice(mark), protocol=2))
    for name in ("evil.pt", "plain.bin"):
        with pytest.raises(DataError, match=r"would run code when loaded"):
            teacher_of(tmp_path / name)
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists(), "the test's file is harmless, so the test shows nothing"


def test_torchscript_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """OpenAI's own files are such archives."""
    tower = randomized_clip("tiny-16").visual

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = tower

        def forward(self, x: Tensor) -> Tensor:
            return x

    path = tmp_path / "openai.pt"
    with warnings.catch_warnings():  # deprecated, but the format of OpenAI's files
        warnings.simplefilter("ignore")
        torch.jit.trace(Whole(), torch.zeros(1)).save(path)
    with pytest.raises(DataError, match=r"TorchScript archive, a program.*python -c") as caught:
        teacher_of(path)
    recipe = caught.value.fix.split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", recipe], cwd=tmp_path, check=True)
    teacher = teacher_of(tmp_path / "openai-weights.pt")
    torch.testing.assert_close(teacher.visual.proj, tower.proj)
