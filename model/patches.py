"""Clips to patches and back.

Legend: B batch, C channel, T frame, H height, W width, L token, K kept token, P values of one patch.

Properties that hold:
- Tokens are t-major: token = (t · H' + h) · W' + w, with T' = T / t_patch, H' = H / patch, W' = W / patch.
- Values inside a patch are in the order (frame in tube, row, column, channel); P = t_patch · patch² · C.
- `unpatchify` is the exact inverse of `patchify`. `gather_patches` equals `patchify` followed by a gather, but reads
  only the patches that it returns.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(clips_BCTHW: Tensor, t_patch: int, patch: int) -> Tensor:
    """[B, C, T, H, W] → patches_BLP [B, T'·H'·W', t_patch·patch·patch·C] of the same dtype."""
    return rearrange(clips_BCTHW, "b c (t u) (h p) (w q) -> b (t h w) (u p q c)", u=t_patch, p=patch, q=patch)


def unpatchify(patches_BLP: Tensor, grid_THW: tuple[int, int, int], t_patch: int, patch: int) -> Tensor:
    """[B, L, P] → clips_BCTHW [B, C, T'·t_patch, H'·patch, W'·patch]; `grid_THW` is (T', H', W')."""
    t, h, w = grid_THW
    return rearrange(
        patches_BLP,
        "b (t h w) (u p q c) -> b c (t u) (h p) (w q)",
        t=t,
        h=h,
        w=w,
        u=t_patch,
        p=patch,
        q=patch,
    )


def gather_patches(
    clips_BCTHW: Tensor, ids_BK: Tensor, t_patch: int, patch: int, frame_index_F: Tensor | None = None
) -> Tensor:
    """The patches of the tokens `ids_BK` (int64): [B, C, T, H, W] → patches_BKP, in the order of the ids.

    At 90 % masking a tenth of the clip is read and moved. With `frame_index_F` (int64 [T'·t_patch]) the patches are
    those of `clips_BCTHW[:, :, frame_index_F]`, without making that tensor.
    """
    # a view without a copy: axes of a patch's place first, then axes of the values inside it
    frames = rearrange(clips_BCTHW, "b c t (h p) (w q) -> b t h w p q c", p=patch, q=patch)
    height, width = frames.shape[2], frames.shape[3]
    batch_B11 = torch.arange(len(frames), device=ids_BK.device)[:, None, None]
    ids_BK1 = ids_BK[..., None]
    frame_BKU = ids_BK1 // (height * width) * t_patch + torch.arange(t_patch, device=ids_BK.device)
    if frame_index_F is not None:
        frame_BKU = frame_index_F[frame_BKU]
    kept = frames[batch_B11, frame_BKU, ids_BK1 // width % height, ids_BK1 % width]
    return kept.flatten(2)
