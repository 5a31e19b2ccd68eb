"""The training step and the teacher as one would write them with the usual libraries, eager or through torch.compile.

timm's BEiT with its blocks, norm and predictor over all tokens; open_clip's tower over all tokens; boolean indexing of
the tokens in the loss; autocast; torch's AdamW; clip_grad_norm_; loss and gradient norm read back at every step, as
BEiT's and EVA's engines do. Compiled: both models through `torch.compile`, as timm's and open_clip's training scripts
do where they are asked to (--torchcompile); the rest of the step stays eager there, too.

Both start from the weights of our student and teacher, so that the results can be held against ours.

Shape legend: B images, H and W pixels, C channels, N patches, T tokens (CLS first, then the patches), M masked patches,
X tokens in the loss of all images, D channels of a token.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvp_fast.config.schema import Config
from mvp_fast.models.student import Student, beit_overrides
from mvp_fast.models.teachers.clip import ClipTeacher


class PlainStudent(nn.Module):
    """timm's BEiT with a mask token and a linear predictor, on all tokens."""

    def __init__(self, student: Student, config: Config) -> None:
        super().__init__()
        self.beit: Any = timm.create_model(
            config.student.name,
            pretrained=False,
            num_classes=0,
            global_pool="",
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            init_values=config.student.layer_scale,
            drop_path_rate=config.student.drop_path,
            **beit_overrides(config.student, config.data.image_size),
        )
        state = student.state_dict()
        self.beit.load_state_dict({name: state[name] for name in self.beit.state_dict()})
        self.mask_token = nn.Parameter(student.mask_token.detach().clone())
        self.predictor = copy.deepcopy(student.predictor)
        self.normalise = Normalise(student.mean, student.std)

    def forward(self, images_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
        """Predictions for all tokens: (B, T, D)."""
        x_BND = self.beit.patch_embed(self.normalise(images_BCHW))
        x_BND = torch.where(mask_BN[..., None], self.mask_token.to(x_BND.dtype), x_BND)
        cls_B1D = self.beit.cls_token.expand(x_BND.shape[0], -1, -1).to(x_BND.dtype)
        x_BTD = torch.cat((cls_B1D, x_BND), dim=1)
        bias_HTT = self.beit.rel_pos_bias()
        for block in self.beit.blocks:
            x_BTD = block(x_BTD, shared_rel_pos_bias=bias_HTT)
        predicted_BTD: Tensor = self.predictor(self.beit.norm(x_BTD))
        return predicted_BTD


class PlainTeacher(nn.Module):
    """open_clip's own forward, with the tokens that it gives out projected as it projects CLS."""

    def __init__(self, teacher: ClipTeacher) -> None:
        super().__init__()
        self.tower: Any = copy.deepcopy(teacher.visual)
        self.tower.output_tokens = True
        self.normalise = Normalise(teacher.mean, teacher.std)
        self.eval().requires_grad_(False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features of all tokens: (B, T, D)."""
        pooled_BD, tokens_BND = self.tower(self.normalise(images_BCHW))
        return torch.cat((pooled_BD[:, None], tokens_BND @ self.tower.proj), dim=1)


class Normalise(nn.Module):
    """uint8 to float32, of the model's colour statistics."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.float() / 255 - self.mean) / self.std


class PlainStep:
    """One optimizer step: `step(images_BHWC, masked_BM) -> (loss, gradient norm before clipping)`, as Python numbers.

    Args:
        student, teacher: whose weights to start from; they are copied.
        config: sizes and optimizer; the learning rate is `config.optim.lr` as it is.
        device: where the step runs.
        compiled: whether both models go through torch.compile.
    """

    def __init__(
        self, student: Student, teacher: ClipTeacher, config: Config, device: torch.device, compiled: bool = False
    ) -> None:
        self.config, self.device = config, device
        plain_student, plain_teacher = (
            PlainStudent(student, config).to(device).train(),
            PlainTeacher(teacher).to(device),
        )
        self.parameters = list(plain_student.parameters())
        self.student: Any = torch.compile(plain_student) if compiled else plain_student
        self.teacher: Any = torch.compile(plain_teacher) if compiled else plain_teacher
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
        )

    def __call__(self, images_BHWC: Tensor, masked_BM: Tensor) -> tuple[float, float]:
        images_BCHW, mask_BN = images_BHWC.permute(0, 3, 1, 2), self._mask_BN(masked_BM)
        with autocast(self.config, self.device):
            with torch.no_grad():
                target_BTD = self.teacher(images_BCHW)
            predicted_BTD = self.student(images_BCHW, mask_BN)
        in_loss_BT = F.pad(mask_BN, (1, 0), value=True)
        predicted_XD, target_XD = predicted_BTD[in_loss_BT].float(), target_BTD[in_loss_BT].float()
        loss = (1 - F.cosine_similarity(predicted_XD, target_XD, dim=-1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_grad)
        self.optimizer.step()
        return loss.item(), norm.item()

    def _mask_BN(self, masked_BM: Tensor) -> Tensor:
        patches = (self.config.data.image_size // 16) ** 2
        mask_BN = torch.zeros(len(masked_BM), patches, dtype=torch.bool, device=self.device)
        return mask_BN.scatter_(1, masked_BM, True)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """As the configuration's precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if config.train.precision == "bf16" else nullcontext()
