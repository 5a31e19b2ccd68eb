"""mvp_kernels: memory-bound operations of pre-training against frozen token features (arXiv 2203.05175), and attention.

    masked_gather   rows of a batch of token sequences by index, -1 pads
    token_norm      per-token normalisation: l2, layernorm without affine part, none
    cosine_loss     1 - cosine similarity, mean over tokens
    guided_loss     the three in one: gather the targets, normalise them, score the predictions
    patchify        uint8 images to normalised patches, for one model or two in one read

    relpos_attention      attention with a relative position bias that all images share, or with none
    relpos_attention_qkv  the same between two projections, without a copy
    relpos_bias           the bias of each pair of tokens from a table by relative position

The functions here run the implementation that `impl` or the environment variable MVP_KERNELS asks for (see
`mvp_kernels.registry`): the Triton kernels of `mvp_kernels.operators`, or plain torch of `mvp_kernels.reference`. The
package needs torch, and Triton for its kernels.
"""

from mvp_kernels.arguments import Normalization
from mvp_kernels.dispatch import (
    cosine_loss,
    guided_loss,
    masked_gather,
    patchify,
    relpos_attention,
    relpos_attention_qkv,
    relpos_bias,
    token_norm,
)
from mvp_kernels.registry import KernelUnavailable, last_used, record, reset_record, resolve

__all__ = [
    "KernelUnavailable",
    "Normalization",
    "cosine_loss",
    "guided_loss",
    "last_used",
    "masked_gather",
    "patchify",
    "record",
    "relpos_attention",
    "relpos_attention_qkv",
    "relpos_bias",
    "reset_record",
    "resolve",
    "token_norm",
]
