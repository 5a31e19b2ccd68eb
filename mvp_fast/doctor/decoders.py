"""DALI and nvImageCodec, which decode the images: each on a small JPEG, on the CPU and, where there is one, on the GPU.

The functions that take options run in processes of their own (see `isolate`).

Shape legend: H and W pixels, C channels, 4 is a box: x, y, width, height.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mvp_fast.doctor.packages import check_pixels, small_jpeg
from mvp_fast.doctor.row import Row, State, installed, package, told

if TYPE_CHECKING:
    import torch

DALI, NVIMGCODEC = "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"
SIDE = 256
"""Pixels across and down of the small image: hardware decoders refuse tiny ones."""
GPU_NEAR = 6
"""Levels of 255: the GPU's inverse transform and chroma upsampling differ from libjpeg's."""


def dali_row(options: dict[str, Any]) -> list[Row]:
    """DALI, through the pipeline that the loader `dali` runs."""
    return [package("DALI", DALI, "data.loader dali, which decodes on the GPU", _dali, "nvidia.dali")]


def _dali() -> Row:
    import torch

    version = installed(DALI)
    _decode_by_dali(None)
    if not torch.cuda.is_available():
        return Row("DALI", State.OK, f"{version}, decodes on the CPU", facts={"gpu": False})
    try:
        _decode_by_dali(torch.device("cuda", 0))
    except Exception as error:
        words, fix = f"{version} decodes on the CPU alone: {told(error)}", "until it is mended: --data.decode cpu"
        return Row("DALI", State.BROKEN, words, "decoding on the GPU, which auto takes", fix, facts={"gpu": False})
    return Row("DALI", State.OK, f"{version}, decodes on the CPU and on the GPU", facts={"gpu": True})


def _decode_by_dali(device: torch.device | None) -> None:
    """A box of the small image, as large as the crop: nothing is resized, so the pixels are the decoder's."""
    import numpy as np

    from mvp_fast.config.schema import DataConfig
    from mvp_fast.loaders.dali_pipeline import CropPipeline

    data, expected_HWC = small_jpeg(SIDE, SIDE)
    side = SIDE // 2
    gpu = None if device is None else (device, DataConfig().hw_decoder_load)
    pipeline = CropPipeline(1, side, "bilinear", threads=1, depth=1, gpu=gpu)
    try:
        pipeline.feed([data], np.array([[16, 32, side, side]], np.int32), np.array([False]))
        image_HWC = pipeline.take()[0].cpu().numpy()
    finally:
        pipeline.close()
    check_pixels(image_HWC, expected_HWC[32 : 32 + side, 16 : 16 + side], near=2 if device is None else GPU_NEAR)


def nvimgcodec_rows(options: dict[str, Any]) -> list[Row]:
    """nvImageCodec, through the decoder of the loader `cpu`; and the GPU's JPEG hardware, where there is a GPU."""
    module = "nvidia.nvimgcodec"
    loses = "data.loader cpu, which auto takes without a GPU; --data.loader torchvision is slower"
    rows = [package("nvImageCodec", NVIMGCODEC, loses, _nvimgcodec, module)]
    try:
        import torch

        gpu = torch.cuda.is_available()
    except (Exception, SystemExit):
        gpu = False
    if gpu and rows[0].works:
        rows.append(package("hardware JPEG decoder", NVIMGCODEC, "", _hardware, module))
    return rows


def _nvimgcodec() -> Row:
    import numpy as np

    from mvp_fast.loaders.cpu import RegionCropper
    from mvp_fast.samples.plan import PlanRows

    data, expected_HWC = small_jpeg(SIDE, SIDE)
    zero_B = np.zeros(1, np.int64)
    x_B, y_B, width_B, height_B = (np.array([value], np.int32) for value in (16, 32, 128, 96))
    unmasked_BN, first_B = np.zeros((1, 1), np.bool_), zero_B.astype(np.int32)
    rows = PlanRows(zero_B, zero_B, zero_B, x_B, y_B, width_B, height_B, zero_B > 0, unmasked_BN, first_B)
    image_HWC = RegionCropper().decode(data, rows)
    if image_HWC is None:
        raise RuntimeError("it refuses a small JPEG")
    check_pixels(image_HWC, expected_HWC[32:128, 16:144])
    return Row("nvImageCodec", State.OK, f"{installed(NVIMGCODEC)}, decodes on the CPU")


def _hardware() -> Row:
    """The GPU's JPEG engine, asked alone: where there is none, nothing else may decode in its place."""
    from nvidia import nvimgcodec

    part, loses = "hardware JPEG decoder", "a share of the GPU's decoding rate: its multiprocessors decode all images"
    data, expected_HWC = small_jpeg(SIDE, SIDE)
    try:
        backend = nvimgcodec.Backend(nvimgcodec.HW_GPU_ONLY)
        image = nvimgcodec.Decoder(device_id=0, backends=[backend]).decode(data)
    except Exception as error:
        return Row(part, State.NOTE, f"does not answer: {told(error)}", loses)
    if image is None:
        return Row(part, State.NOTE, "this GPU has none, or it does not answer", loses)
    check_pixels(image.cpu(), expected_HWC, GPU_NEAR)
    return Row(part, State.OK, "decodes")
