"""The objective of MVP (arXiv 2203.05175): predict the teacher's feature of every masked token, and of CLS.

With `mse` and no normalisation it is MAE's for pixels (2111.06377) and MaskFeat's for HOG (2112.09133).

Shape legend: B images, N patches, M masked patches, K tokens in the loss, D channels of a feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mvp_fast.config.schema import ObjectiveConfig
from mvp_kernels import dispatch

# Where smooth L1 turns from square to straight: 2, as in data2vec (2202.03555) and Feature Distillation (2205.14141).
SMOOTH_L1_BETA = 2.0


class Objective:
    """Which tokens are in the loss, how targets are normalised, and the loss itself.

    Args:
        config: tokens, cls, target_norm and loss.
        impl: implementation of mvp_kernels: auto, triton or reference.
    """

    def __init__(self, config: ObjectiveConfig, impl: str = "auto") -> None:
        self.config, self.impl = config, impl

    def token_index(self, masked_BM: Tensor, patches: int) -> Tensor:
        """The tokens in the loss, as student and teacher number them: 0 is CLS, 1 + n is patch n.

        Args:
            masked_BM: int64 patch numbers.
            patches: N.

        Returns:
            index_BK, int64, on masked_BM's device: CLS first where it is in the loss, then the masked patches in their
            order, or all.
        """
        images = masked_BM.shape[0]
        if self.config.tokens == "all":
            first = 0 if self.config.cls else 1
            return torch.arange(first, 1 + patches, device=masked_BM.device).expand(images, -1)
        index_BK = masked_BM + 1
        return F.pad(index_BK, (1, 0)) if self.config.cls else index_BK

    def __call__(self, pred_BKD: Tensor, features_BKD: Tensor, upstream: float = 1.0) -> Tensor:
        """Score predictions against the teacher's features of the same tokens; float32 arithmetic, also under autocast.

        Args:
            pred_BKD: the student's predictions.
            features_BKD: the teacher's features, without normalisation.
            upstream: the gradient that backward() will bring for the result, such as 1 / micro-batches; see
                `mvp_kernels.guided_loss`.

        Returns:
            The mean over all tokens in the loss: float32 (float64 for float64 input), ().
        """
        if pred_BKD.shape != features_BKD.shape:
            raise ValueError(f"predictions {tuple(pred_BKD.shape)} and features {tuple(features_BKD.shape)} differ")
        if self.config.loss != "cosine":
            return self._distance(pred_BKD, features_BKD)
        return dispatch.guided_loss(
            pred_BKD, features_BKD, None, self.config.target_norm, upstream=upstream, impl=self.impl
        )

    def _distance(self, pred_BKD: Tensor, features_BKD: Tensor) -> Tensor:
        # Widened before the normalisation, which returns its input's type.
        target_BKD = dispatch.token_norm(_wide(features_BKD), self.config.target_norm, impl=self.impl)
        if self.config.loss == "mse":
            return F.mse_loss(_wide(pred_BKD), target_BKD)
        return F.smooth_l1_loss(_wide(pred_BKD), target_BKD, beta=SMOOTH_L1_BETA)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
