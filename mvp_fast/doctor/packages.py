"""The packages that training runs on: found, imported, and each tried on something small and real.

Every function here runs in a process of its own (see `isolate`) and takes the options of the verb.

Shape legend: H and W pixels, C channels, M tokens, D channels of a token.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from mvp_fast.doctor.row import Row, State, importable, install, installed, package, told

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What the others stand on, by the name that is installed and the one that is imported.
LIBRARIES = {
    "numpy": "numpy",
    "numba": "numba",
    "pyarrow": "pyarrow",
    "pillow": "PIL.Image",
    "safetensors": "safetensors.torch",
    "pyyaml": "yaml",
    "cattrs": "cattrs",
    "rich": "rich",
    "tyro": "tyro",
    "tensorboard": "torch.utils.tensorboard",
}
NEAR = 2
"""Levels of 255 by which a decoder may differ from Pillow's on the small image."""
APEX_LOSES = "optim.name fusedadam, fusedadamw and fusedlamb; adamw, the default, is fused without it"


def torch_row(options: dict[str, Any]) -> list[Row]:
    """torch, and what `auto` takes on this machine."""
    return [package("torch", "torch", "everything", _torch)]


def _torch() -> Row:
    import torch

    from mvp_fast.config.schema import DataConfig
    from mvp_fast.loaders.registry import describe
    from mvp_kernels import dispatch

    a_MM = torch.randn(64, 64)
    if not torch.isfinite(a_MM @ a_MM).all():
        raise ArithmeticError("a small product of matrices is not finite")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {"device": device, "loader": describe(DataConfig(), device), "cuda": torch.version.cuda}
    try:
        facts["kernels"] = dispatch.resolve("auto", device)
    except dispatch.KernelUnavailable as error:
        return Row("torch", State.BROKEN, f"{torch.__version__}: {error}", "runs", "unset MVP_KERNELS", facts=facts)
    if torch.version.cuda is None:
        fix = f"{install('torch', '--force-reinstall')}, and torchvision with it"
        return Row("torch", State.NOTE, f"{torch.__version__}, built without CUDA", "the GPU", fix, facts=facts)
    return Row("torch", State.OK, f"{torch.__version__}, built for CUDA {torch.version.cuda}", facts=facts)


def library_row(options: dict[str, Any]) -> list[Row]:
    """The smaller packages, in one row."""
    faults, missing = [], []
    for name, module in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                missing.append(name)
            else:
                faults.append((name, told(error)))
        except (Exception, SystemExit) as error:
            faults.append((name, told(error)))
    facts = {name: installed(name) for name in LIBRARIES}
    if faults or missing:
        words = [f"{name} does not load: {why}" for name, why in faults]
        words += [f"{name} is not installed" for name in missing]
        fixes = [install(name, "--force-reinstall") for name, _ in faults] + [install(name) for name in missing]
        state = State.BROKEN if faults else State.MISSING
        return [Row("libraries", state, "; ".join(words), "training", "; ".join(fixes), facts=facts)]
    return [Row("libraries", State.OK, ", ".join(f"{name} {version}" for name, version in facts.items()), facts=facts)]


def torchvision_row(options: dict[str, Any]) -> list[Row]:
    """torchvision: timm imports it, the reference loader runs on it."""

    def try_it() -> Row:
        import torch
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)  # its compiled part
        return Row("torchvision", State.OK, torchvision.__version__)

    return [package("torchvision", "torchvision", "timm and open_clip don't load", try_it)]


def timm_row(options: dict[str, Any]) -> list[Row]:
    """timm, whose BEiT is the student."""

    def try_it() -> Row:
        import timm

        if not timm.is_model("beitv2_base_patch16_224"):
            raise LookupError("it knows no beitv2_base_patch16_224")
        return Row("timm", State.OK, timm.__version__)

    return [package("timm", "timm", "there is no student", try_it)]


def open_clip_row(options: dict[str, Any]) -> list[Row]:
    """open_clip, whose vision towers are the teachers."""

    def try_it() -> Row:
        import open_clip

        if "ViT-B-16" not in open_clip.list_models():
            raise LookupError("it knows no ViT-B-16")
        return Row("open_clip", State.OK, open_clip.__version__)

    return [package("open_clip", "open_clip_torch", "there is no CLIP teacher", try_it, "open_clip")]


def triton_row(options: dict[str, Any]) -> list[Row]:
    """Triton: one of this project's kernels, compiled on a GPU, interpreted where there is none."""
    loses = "the fused kernels: plain torch runs in their place on the CPU, and a run on a GPU is refused"
    return [package("Triton", "triton", loses, _triton)]


def _triton() -> Row:
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import triton

    from mvp_kernels import dispatch

    start = time.perf_counter()
    tokens_MD = torch.randn(37, 96, device="cuda" if gpu else "cpu")
    try:
        out_MD = dispatch.token_norm(tokens_MD, "layernorm", impl="triton")
        torch.testing.assert_close(out_MD, dispatch.token_norm(tokens_MD, "layernorm", impl="reference"))
    except Exception as error:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
        if gpu and compiler is None:  # Triton compiles its launcher anew on each machine
            fix = "apt-get install gcc python3-dev"
            return Row("Triton", State.BROKEN, "there is no C compiler, which Triton calls", "runs on the GPU", fix)
        raise RuntimeError(f"its kernel token_norm failed: {told(error)}") from error
    took, version = time.perf_counter() - start, triton.__version__
    if not gpu:
        return Row("Triton", State.OK, f"{version}, in its interpreter: there is no GPU to compile for")
    if dispatch.resolve("auto", "cuda") != "triton":
        words = f"{version}, but auto runs {dispatch.resolve('auto', 'cuda')} kernels"
        return Row("Triton", State.NOTE, words, "the fused kernels", "unset TRITON_INTERPRET MVP_KERNELS")
    return Row("Triton", State.OK, f"{version}, a kernel compiled and run in {took:.1f} s")


def small_jpeg(width: int, height: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A smooth JPEG and what Pillow decodes it to, uint8 RGB (H, W, C)."""
    import numpy as np
    from PIL import Image

    y_H1, x_1W = np.mgrid[:height, :width].astype(np.float32)
    image_HWC = np.stack([x_1W * 255 / width, y_H1 * 255 / height, (x_1W + y_H1) * 255 / (width + height)], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(image_HWC.astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue(), np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))


def check_pixels(image_HWC: Any, expected_HWC: NDArray[np.uint8], near: int = NEAR) -> None:
    """ArithmeticError where an image is not, within `near` levels, what Pillow decodes."""
    import numpy as np

    found_HWC = np.asarray(image_HWC)
    if found_HWC.shape != expected_HWC.shape:
        raise ArithmeticError(f"it decodes a small JPEG to the shape {found_HWC.shape}")
    furthest = int(np.abs(found_HWC.astype(int) - expected_HWC.astype(int)).max())
    if furthest > near:
        raise ArithmeticError(f"it decodes a small JPEG to pixels that are up to {furthest} of 255 from Pillow's")


def ffcv_row(options: dict[str, Any]) -> list[Row]:
    """FFCV's compiled library, as the loader `ffcv` calls it."""
    from mvp_fast.errors import EnvironmentProblem

    loses = "data.loader ffcv and data convert --to beton"
    try:
        from mvp_fast.loaders.ffcv_library import Cropper, need_ffcv

        data, expected_HWC = small_jpeg(96, 80)
        need_ffcv("doctor")
        cropper = Cropper()
        check_pixels(cropper.decode(data, 96, 80), expected_HWC, near=4)  # the fast inverse transform
        cropper.close()
    except EnvironmentProblem as error:
        if not importable("ffcv"):
            return [Row("FFCV", State.MISSING, "not installed", loses, error.fix)]
        return [Row("FFCV", State.BROKEN, f"{installed('ffcv')}: {error.what}", loses, error.fix)]
    except (Exception, SystemExit) as error:
        return [Row("FFCV", State.BROKEN, f"{installed('ffcv')}, does not work: {told(error)}", loses, "make install")]
    return [Row("FFCV", State.OK, f"{installed('ffcv')}, its library decodes")]


def apex_row(options: dict[str, Any]) -> list[Row]:
    """Which `apex` this is."""
    from mvp_fast.train.apex import ApexKind, describe, find_apex, remedy

    found = find_apex()
    states = {ApexKind.COMPILED: State.OK, ApexKind.BROKEN: State.BROKEN, ApexKind.OTHER: State.NOTE}
    state = states.get(found.kind, State.MISSING)
    loses, fix = ("", "") if state is State.OK else (APEX_LOSES, remedy(found))
    return [Row("apex", state, describe(found), loses, fix, facts={"kind": found.kind.name.lower()})]


def wandb_row(options: dict[str, Any]) -> list[Row]:
    """Weights & Biases, the extra `wandb`."""

    def try_it() -> Row:
        import wandb

        return Row("wandb", State.OK, str(wandb.__version__))

    return [package("wandb", "wandb", "run.wandb_project; metrics.jsonl and TensorBoard need none of it", try_it)]
