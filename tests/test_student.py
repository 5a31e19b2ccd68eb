"""The student against timm's own BEiT: the same encoder, exact shortcuts, planned stochastic depth, seeded weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import mvp_kernels
from mvp_fast.config.schema import StudentConfig
from mvp_fast.errors import ConfigError
from mvp_fast.models.student import Student, build_beit, patch_size_of

SMALL = StudentConfig(width=48, depth=3, heads=4, drop_path=0.2)


def randomized(student: Student) -> Student:
    """Weights whose every part matters: relative position tables, biases, norms and layer scales are not constants."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.5)
    return student


def small(image_size: int = 64, **options: object) -> Student:
    return randomized(Student(replace(SMALL, **options), target_width=24, image_size=image_size))


def timm_twin(student: Student) -> torch.nn.Module:
    """timm's model with the student's encoder, its shared table and the norm on all tokens."""
    beit = build_beit(student.config, student.image_size, global_pool="", shared_rel_pos_bias=True)
    beit.load_state_dict({k: v for k, v in student.state_dict().items() if k in beit.state_dict()})
    return beit.eval()


def images(student: Student, count: int) -> Tensor:
    return torch.randint(0, 256, (count, student.image_size, student.image_size, 3), dtype=torch.uint8)


def timm_input(beit: torch.nn.Module, images_BHWC: Tensor) -> Tensor:
    """Normalised as timm's own transforms do it: from the statistics of the model's pretrained_cfg."""
    settings = timm.data.resolve_model_data_config(beit)
    mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    return ((images_BHWC / 255 - mean) / std).permute(0, 3, 1, 2)


def some_tokens(student: Student, count: int, masked: int) -> tuple[Tensor, Tensor]:
    """mask_BN and index_BM: CLS and the masked patches, as in training."""
    patches = student.grid[0] * student.grid[1]
    masked_BM = torch.stack([torch.randperm(patches)[:masked].sort().values for _ in range(count)])
    mask_BN = torch.zeros(count, patches, dtype=torch.bool).scatter_(1, masked_BM, True)
    return mask_BN, F.pad(masked_BM + 1, (1, 0))


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        (SMALL, 64),
        (replace(SMALL, name="beit_large_patch16_384"), 48),
        (replace(SMALL, layer_scale=0.0), 32),
        (StudentConfig(), 224),
    ],
    ids=["small", "beit", "no-layer-scale", "B/16"],
)
@torch.no_grad()
def test_encoder_is_timms(config: StudentConfig, image_size: int) -> None:
    student = Student(config, target_width=8, image_size=image_size)
    tables = {"rel_pos_bias.relative_position_bias_table": 1.0, "gamma": 0.2}
    for name, parameter in student.named_parameters():
        if parameter.ndim == 1 or name in tables:
            parameter.add_(torch.randn_like(parameter), alpha=tables.get(name, 0.2))
    pixels = images(student, 2)
    twin = timm_twin(student)
    want = twin.forward_features(timm_input(twin, pixels))
    torch.testing.assert_close(student.encode(student.patches(pixels)), want, rtol=0, atol=1e-5)


def test_state_dict_has_timms_names() -> None:
    ours = set(small().state_dict())
    own = {"mask_token", "predictor.weight", "predictor.bias"}
    assert ours - own == set(timm_twin(small()).state_dict())
    assert own <= ours


def test_sizes_and_statistics() -> None:
    student = Student(SMALL, target_width=24, image_size=64)
    assert (student.width, student.patch_size, student.grid) == (48, 16, (4, 4))
    assert student.mean == (0.485, 0.456, 0.406)
    assert student.std == (0.229, 0.224, 0.225)
    assert Student(replace(SMALL, name="beit_base_patch16_224"), target_width=1).mean == (0.5, 0.5, 0.5)
    assert len(student.blocks) == 3
    assert student.blocks[0].attn.num_heads == 4
    assert student.rel_pos_bias.relative_position_bias_table.shape == (7 * 7 + 3, 4)
    large = Student(StudentConfig("beitv2_large_patch16_224", depth=1), target_width=1)
    assert large.width == 1024
    assert large.rel_pos_bias.relative_position_bias_table.shape == (732, 16)
    assert patch_size_of("beit_large_patch16_512") == 16


@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop-path"])
def test_forward_is_the_slow_way(drop: bool) -> None:
    """Against timm's blocks one image at a time, with norm and predictor on all tokens: value and every gradient."""
    student = small().double()
    twin = timm_twin(small()).double()
    twin.load_state_dict({k: v for k, v in student.state_dict().items() if k in twin.state_dict()})
    patches_BNP = student.patches(images(student, 3))
    mask_BN, index_BM = some_tokens(student, 3, 6)
    scale_LSB = torch.randint(0, 2, (3, 2, 3)).double() / 0.8 if drop else torch.ones(3, 2, 3, dtype=torch.float64)
    mvp_kernels.reset_record()
    pred = student(patches_BNP, mask_BN, index_BM, scale_LSB if drop else None)
    ops = ("masked_gather", "relpos_attention", "relpos_attention_qkv", "relpos_bias")
    assert mvp_kernels.record() == dict.fromkeys(ops, "reference")

    bias, rows = twin.rel_pos_bias(), []
    for b in range(3):
        x = twin.patch_embed.proj(patches_BNP[b].reshape(16, 3, 16, 16)).reshape(16, -1)
        x = torch.stack([student.mask_token[0, 0] if mask_BN[b, n] else x[n] for n in range(16)])
        x = torch.cat([twin.cls_token[0], x])[None]
        for block, (attention, mlp) in zip(twin.blocks, scale_LSB[:, :, b].tolist(), strict=True):
            x = x + attention * block.gamma_1 * block.attn(block.norm1(x), shared_rel_pos_bias=bias)
            x = x + mlp * block.gamma_2 * block.mlp(block.norm2(x))
        rows.append(student.predictor(twin.norm(x))[0][index_BM[b]])
    slow = torch.stack(rows)
    torch.testing.assert_close(pred, slow, rtol=1e-10, atol=1e-10)

    upstream = torch.randn_like(slow)
    names = [name for name, _ in student.named_parameters()]
    fast_gradients = torch.autograd.grad((pred * upstream).sum(), list(student.parameters()))
    slow_parameters = {**dict(student.named_parameters()), **dict(twin.named_parameters())}
    slow_gradients = torch.autograd.grad((slow * upstream).sum(), [slow_parameters[name] for name in names])
    for name, fast, want in zip(names, fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(fast, want, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert drop or (fast != 0).any(), f"{name} has no gradient"


@torch.no_grad()
def test_masked_pixels_are_not_seen() -> None:
    student = small()
    pixels = images(student, 1)
    mask_BN, index_BM = some_tokens(student, 1, 5)
    patches = student.patches(pixels)
    other = torch.where(mask_BN[..., None], torch.randn_like(patches), patches)
    torch.testing.assert_close(student(patches, mask_BN, index_BM), student(other, mask_BN, index_BM), rtol=0, atol=0)
    seen = torch.where(mask_BN[..., None], patches, torch.randn_like(patches))
    assert (student(patches, mask_BN, index_BM) - student(seen, mask_BN, index_BM)).abs().max() > 1e-3


@torch.no_grad()
def test_a_dropped_branch_touches_no_other_image() -> None:
    student = small()
    patches = student.patches(images(student, 4))
    mask_BN, index_BM = some_tokens(student, 4, 5)
    scale = torch.ones(3, 2, 4)
    whole = student(patches, mask_BN, index_BM, scale)
    torch.testing.assert_close(whole, student(patches, mask_BN, index_BM))
    for block, branch in itertools.product(range(3), range(2)):
        dropped = scale.clone()
        dropped[block, branch, 2] = 0
        out = student(patches, mask_BN, index_BM, dropped)
        torch.testing.assert_close(out[[0, 1, 3]], whole[[0, 1, 3]])
        assert (out[2] - whole[2]).abs().max() > 1e-3


def test_drop_path_rates_rise_linearly() -> None:
    assert Student(replace(SMALL, depth=5), target_width=1, image_size=32).drop_path_rates == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2]
    )
    assert Student(replace(SMALL, depth=1), target_width=1, image_size=32).drop_path_rates == (0.0,)


def test_initial_weights() -> None:
    """BEiT's: normal 0.02 cut at one sigma (which leaves 0.5396 of it); the output layers of block l over sqrt(2 l)."""
    student = Student(StudentConfig(width=384, heads=6, depth=4), target_width=512)
    cut = 0.02 * 0.5396
    for layer in (student.patch_embed.proj, student.predictor, *(b.mlp.fc1 for b in student.blocks)):
        assert layer.weight.std().item() == pytest.approx(cut, rel=0.02)
        assert layer.weight.abs().max() <= 0.02
        assert (layer.bias == 0).all()
    for token in (student.cls_token, student.mask_token):
        assert token.std().item() == pytest.approx(cut, rel=0.2)
    for number, block in enumerate(student.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(cut / (2 * number) ** 0.5, rel=0.02)
        assert (block.gamma_1 == 0.1).all()
        assert (block.gamma_2 == 0.1).all()
    assert (student.rel_pos_bias.relative_position_bias_table == 0).all()


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = Student(SMALL, target_width=24, image_size=32, seed=7).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = Student(SMALL, target_width=24, image_size=32, seed=7).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    other = Student(SMALL, target_width=24, image_size=32, seed=8).state_dict()
    wider = Student(SMALL, target_width=99, image_size=32, seed=7).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if not name.startswith("predictor"):
            assert torch.equal(tensor, wider[name]), f"{name} depends on the target's width"
    for name in ("cls_token", "mask_token", "patch_embed.proj.weight", "blocks.2.mlp.fc2.weight", "predictor.weight"):
        assert not torch.equal(first[name], other[name])


def test_weights_without_decay() -> None:
    student = small()
    many = {name for name, parameter in student.named_parameters() if parameter.ndim > 1}
    assert student.no_weight_decay() <= many
    decayed = many - student.no_weight_decay()
    assert all(name.endswith(".weight") for name in decayed)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compile_takes_the_whole_graph(precision: torch.dtype) -> None:
    student = small(32, depth=2)
    patches = student.patches(images(student, 2))
    mask_BN, index_BM = some_tokens(student, 2, 2)
    scale = torch.tensor([0.0, 1.25]).expand(2, 2, 2)
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        want, got = student(patches, mask_BN, index_BM, scale), compiled(patches, mask_BN, index_BM, scale)
    assert got.dtype == precision
    tolerance = 1e-5 if precision == torch.float32 else 0.1
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_compiled_blocks_compute_the_same() -> None:
    """By the default compiler, with its own code for the CPU: value and every gradient."""
    student = small(32, depth=2)
    patches = student.patches(images(student, 2))
    mask_BN, index_BM = some_tokens(student, 2, 2)
    scale = torch.tensor([0.0, 1.25]).expand(2, 2, 2)

    def value_and_gradients() -> list[Tensor]:
        pred = student(patches, mask_BN, index_BM, scale)
        return [pred, *torch.autograd.grad(pred.square().sum(), list(student.parameters()))]

    plain = value_and_gradients()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    student.compile_blocks()
    compiled = value_and_gradients()
    # Two graphs: of the blocks before, and of the last one with its tokens; as many however deep the student is.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for got, want in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_recomputing_keeps_less_and_changes_no_bit() -> None:
    student = small(32, depth=3)
    patches = student.patches(images(student, 2))
    mask_BN, index_BM = some_tokens(student, 2, 2)
    scale = torch.tensor([0.0, 1.25]).expand(3, 2, 2)
    kept: list[int] = []

    def value_and_gradients() -> list[Tensor]:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            pred = student(patches, mask_BN, index_BM, scale)
        kept.append(sum(sizes))
        return [pred, *torch.autograd.grad(pred.square().sum(), list(student.parameters()))]

    plain = value_and_gradients()
    student.recompute_blocks()
    again = value_and_gradients()
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(got, want) for got, want in zip(again, plain, strict=True))


@pytest.mark.parametrize(
    ("options", "image_size", "message"),
    [
        (
            {"name": "beitv2_base_patch16"},
            64,
            "no BEiT named 'beitv2_base_patch16'.*Did you mean beitv2_base_patch16_224",
        ),
        (
            {"name": "vit_base_patch16_224"},
            64,
            "no BEiT named 'vit_base_patch16_224'.*Did you mean beit.*_base_patch16",
        ),
        ({"name": "resnet50"}, 64, "no BEiT named 'resnet50'.*Did you mean beit"),
        ({"width": 50}, 64, "width 50 can't be split among 4 attention heads"),
        ({"heads": None, "width": 64}, 64, "width 64 can't be split among 12 attention heads"),
        ({}, 65, "Images of 65 px can't be cut into beitv2_base_patch16_224's patches of 16 px"),
        ({}, 8, "Images of 8 px can't be cut"),
    ],
)
def test_what_does_not_fit_is_a_configuration_error(options: dict, image_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Student(replace(SMALL, **options), target_width=24, image_size=image_size)
