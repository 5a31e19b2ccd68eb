"""Words on patches: how near the student's predicted feature of each patch is to a text's feature.

The student predicts features of CLIP's space, in which texts have features too; so no label is used. What comes out is
no better than the teacher's own patch features agree with its texts (arXiv 2112.01071 discusses it).

Shape legend: B images, H and W pixels, C colours, M patches, T texts, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.errors import ConfigError, DataError
from mvp_fast.evaluate.backbone import BackboneSource
from mvp_fast.models.student import Student
from mvp_fast.models.teachers.clip import ClipTeacher, build_clip
from mvp_fast.models.teachers.clip_text import build_whole_clip, text_features
from mvp_fast.train.checkpoint import find_checkpoint, load_student, read_state
from mvp_kernels import dispatch


@dataclass(frozen=True)
class TextSide:
    """What maps of texts are made of.

    Attributes:
        student: of the run.
        teacher: its vision tower, of the same CLIP as the texts' features.
        text_TD: features of the texts, of length 1.
        target_norm: how the objective normalised the teacher's features for the student.
        weights: the file that the CLIP came from.
    """

    student: Student
    teacher: ClipTeacher
    text_TD: Tensor
    target_norm: str
    weights: Path


def load_text_side(
    source: BackboneSource,
    texts: Sequence[str],
    templates: Sequence[str],
    clip_weights: Path | None,
    device: torch.device,
) -> TextSide:
    """Load the student of a run and the CLIP that taught it.

    Args:
        source: of a run.
        clip_weights: a file with the CLIP, where the run's configuration names none that is here and whole.

    Raises:
        ConfigError: the teacher is no CLIP that language taught, or a text is empty or too long.
        DataError: the checkpoint is missing or has no text tower, or is of another CLIP than the teacher.
        EnvironmentProblem: the weights would have to be downloaded, and can't be.
    """
    if clip_weights is not None and not clip_weights.is_file():
        raise DataError("There is no such file", where=f"--clip-weights {clip_weights}")
    run = Path(source.name).expanduser()
    student, config, _ = load_student(run, source.checkpoint, source.ema)
    if config.teacher.kind != "clip":
        raise ConfigError(
            f"The run's teacher is no CLIP but `{config.teacher.kind}`, and no text has a place among its targets",
            where=f"--text, {run}",
            fix="Take a run whose teacher.kind is clip, or leave --text out",
        )
    clip = build_whole_clip(config.teacher, clip_weights)
    teacher = build_clip(config.teacher, grid=student.grid, image_size=config.data.image_size, weights=clip_weights)
    trained_by = str(read_state(find_checkpoint(run, source.checkpoint))["teacher"])
    if teacher.fingerprint != trained_by:
        raise DataError(
            f"The run's teacher was another CLIP: its fingerprint is {trained_by[:12]}, this one's"
            f" {teacher.fingerprint[:12]}, so its texts mean nothing to the student",
            where=str(clip.path),
            fix="Give the checkpoint that the run was trained against with --clip-weights FILE",
        )
    text_TD = text_features(clip, texts, templates, device)
    return TextSide(student.to(device).eval(), teacher.to(device), text_TD, config.objective.target_norm, clip.path)


@torch.no_grad()
def student_map(side: TextSide, images_BHWC: Tensor) -> Tensor:
    """The cosine of each patch's predicted feature with each text's: float32 (B, T, M).

    The image is whole: nothing is masked. Texts are normalised as the objective normalised its targets.

    Args:
        images_BHWC: uint8 crops of the student's size, on the device.
    """
    patches_BMP = side.student.patches(images_BHWC)
    images, patches = patches_BMP.shape[:2]
    nothing_BM = torch.zeros(images, patches, dtype=torch.bool, device=images_BHWC.device)
    features_BMD = side.student(patches_BMP, nothing_BM, _every_patch(images_BHWC, patches))
    return _cosines(features_BMD, dispatch.token_norm(side.text_TD[None], side.target_norm)[0])


@torch.no_grad()
def teacher_map(side: TextSide, images_BHWC: Tensor) -> Tensor:
    """The same of the teacher's own patch features: what the student could reach."""
    patches_BMP = side.teacher.patches(images_BHWC)
    return _cosines(side.teacher(patches_BMP, _every_patch(images_BHWC, patches_BMP.shape[1])), side.text_TD)


def _every_patch(images_BHWC: Tensor, patches: int) -> Tensor:
    return torch.arange(1, 1 + patches, device=images_BHWC.device).expand(len(images_BHWC), -1)


def _cosines(features_BMD: Tensor, text_TD: Tensor) -> Tensor:
    unit_BMD, unit_TD = F.normalize(features_BMD.float(), dim=-1), F.normalize(text_TD.float(), dim=-1)
    return (unit_BMD @ unit_TD.T).transpose(1, 2)


def check_run(is_run: bool, name: str) -> None:
    """ConfigError where there is no student whose head predicts CLIP's space."""
    if not is_run:
        raise ConfigError(
            "--text needs a run: only its checkpoint has the head that predicts CLIP's features",
            where=name,
            fix="Give the folder of a run with a CLIP teacher, or leave --text out",
        )
