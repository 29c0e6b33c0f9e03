"""Video object segmentation with frozen features: the first frame's mask is propagated to the others; J and F.

    features_THWD + mask of frame 0 ── frame by frame: nearest patches of the context vote ── masks_TYX

The protocol is that of the space-time walk (arXiv 2006.14613) with the settings of DINO (arXiv 2104.14294), which MotionMAE
and others report on DAVIS-2017. The context is the first frame and the last 7. The 5 nearest patches by cosine vote, within
12 patches up, down and to either side, with weights of temperature 0.1. The measures are those of DAVIS (Perazzi et al.
2016; arXiv 1704.00675).

Properties that hold:
- pure functions of tensors; nothing is trained and no threshold is chosen;
- memory is for one row of patches against the context, whatever the height of the picture;
- the first frame's mask is returned as given, and the other masks hold only labels of the first.

Legend: T frame, C context frame, H × W patches, Y × X pixels, D width, N label (one of the mask's numbers).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reelmae.model.vit import Encoder

TOLERANCE = 0.008  # distance at which two boundaries still match, in diagonals of the picture


@torch.no_grad()
def propagate(
    features_THWD: Tensor,
    first_mask_YX: Tensor,
    *,
    context: int = 7,
    topk: int = 5,
    radius: int = 12,
    temperature: float = 0.1,
) -> Tensor:
    """Masks of all frames, int64 [T, Y, X], with the size and the labels of the first mask.

    `features_THWD`: float, one vector for each patch of each frame. `first_mask_YX`: integers, 0 is background.

    - A patch of frame 0 has the label of the pixel at its middle. An object smaller than a patch may be lost here, as in
      the protocol.
    - A patch of another frame has a soft label: the weighted mean over the `topk` patches whose cosine with it is largest,
      with weights softmax(cosine / `temperature`). Candidates are the patches of frame 0 and of the `context` frames
      before, within `radius` patches along both axes.
    - For the masks, soft labels are interpolated to pixels (bilinear), each label is stretched over its frame to 0 … 1,
      and the largest wins.

    ValueError names what does not fit.
    """
    _check(features_THWD, first_mask_YX, context=context, topk=topk, radius=radius, temperature=temperature)
    frames, height, width, _ = features_THWD.shape
    ids_N, place_YX = first_mask_YX.unique(return_inverse=True)
    onehot_NYX = F.one_hot(place_YX, len(ids_N)).permute(2, 0, 1).float()
    first_NHW = F.interpolate(onehot_NYX[None], size=(height, width), mode="nearest-exact")[0]
    features_THWD = F.normalize(features_THWD.float(), dim=-1)
    soft_HWN = [first_NHW.permute(1, 2, 0)]
    masks = [first_mask_YX.long()]
    for t in range(1, frames):
        seen = sorted({0, *range(max(0, t - context), t)})
        labels_HWN = vote(
            features_THWD[t],
            features_THWD[seen],
            torch.stack([soft_HWN[s] for s in seen]),
            topk=topk,
            radius=radius,
            temperature=temperature,
        )
        soft_HWN.append(labels_HWN)
        masks.append(ids_N[_winner(labels_HWN, first_mask_YX.shape)].long())
    return torch.stack(masks)


def _check(features_THWD: Tensor, mask_YX: Tensor, *, context: int, topk: int, radius: int, temperature: float) -> None:
    if features_THWD.dim() != 4 or 0 in features_THWD.shape:
        raise ValueError(f"features of {tuple(features_THWD.shape)}: give [T, H, W, D], one vector a patch")
    if mask_YX.dim() != 2 or mask_YX.is_floating_point() or mask_YX.numel() == 0:
        raise ValueError(f"first mask {mask_YX.dtype} {tuple(mask_YX.shape)}: give integers [Y, X]")
    if mask_YX.device != features_THWD.device:
        raise ValueError(f"first mask on {mask_YX.device}, features on {features_THWD.device}: give one device")
    for name, value, least in (("context", context, 0), ("topk", topk, 1), ("radius", radius, 0)):
        if value < least:
            raise ValueError(f"{name}={value}: give at least {least}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give more than 0")


def vote(
    target_HWD: Tensor,
    context_CHWD: Tensor,
    labels_CHWN: Tensor,
    *,
    topk: int,
    radius: int,
    temperature: float,
) -> Tensor:
    """Soft labels of one frame, float32 [H, W, N], from the context's; see `propagate`. Features have length 1."""
    _, height, width, dim = context_CHWD.shape
    columns_W = torch.arange(width, device=target_HWD.device)
    far_WW = (columns_W[:, None] - columns_W).abs() > radius
    rows = []
    for y in range(height):  # by rows: all patches against all would take gigabytes
        near = slice(max(0, y - radius), y + radius + 1)
        cosine_WS = target_HWD[y] @ context_CHWD[:, near].reshape(-1, dim).T
        far_WS = far_WW.repeat(1, cosine_WS.shape[1] // width)  # sources are (frame, row, column)
        best_WK, at_WK = cosine_WS.masked_fill(far_WS, -torch.inf).topk(min(topk, cosine_WS.shape[1]), dim=-1)
        weight_WK = (best_WK / temperature).softmax(
            dim=-1
        )  # 0 for patches that are too far, if fewer than topk are near
        votes_WKN = labels_CHWN[:, near].flatten(0, 2)[at_WK]
        rows.append((weight_WK[..., None] * votes_WKN).sum(1))
    return torch.stack(rows)


def _winner(labels_HWN: Tensor, size_YX: torch.Size) -> Tensor:
    """The label that is largest at each pixel, int64 [Y, X], after each label is stretched to 0 … 1."""
    soft_NYX = F.interpolate(
        labels_HWN.permute(2, 0, 1)[None], size=tuple(size_YX), mode="bilinear", align_corners=False
    )[0]
    low, high = soft_NYX.amin((1, 2), keepdim=True), soft_NYX.amax((1, 2), keepdim=True)
    # a label with the same value everywhere, such as one that was lost, cannot be stretched
    flat = high == low
    return torch.where(flat, soft_NYX, (soft_NYX - low) / (high - low).masked_fill(flat, 1)).argmax(0)


@torch.no_grad()
def video_features(encoder: Encoder, frames_TCYX: Tensor, *, step: int | None = None, batch: int = 1) -> Tensor:
    """Features of each frame from a video encoder: float32 [T, H, W, D] on the encoder's device.

    `frames_TCYX`: any number of frames, normalised, at the encoder's size. Squeeze a wide picture to the square;
    `propagate` takes and returns masks of any size.
    `step`: frames from the start of one clip to the next (default: half a clip). Clips have the encoder's length, and the
    last one ends with the video. A video shorter than a clip is lengthened by its last frame.
    `batch`: clips at a time.

    Each frame of a tube has the tube's feature. A frame in several clips has the mean of their features, so with a step
    below `t_patch` the frames of a tube differ. The class token is left out. ValueError where frames or step do not fit the
    encoder.
    """
    c = encoder.config
    step = max(1, c.frames // 2) if step is None else step
    if not 1 <= step <= c.frames:
        raise ValueError(f"step={step}: give 1 to {c.frames} frames, so that every frame is seen")
    if frames_TCYX.dim() != 4 or frames_TCYX.shape[0] == 0 or tuple(frames_TCYX.shape[1:]) != (3, c.size, c.size):
        raise ValueError(
            f"frames of {tuple(frames_TCYX.shape)}: this encoder takes [T, 3, {c.size}, {c.size}]; resize them"
        )
    device = next(encoder.parameters()).device
    total, (tubes, height, width) = frames_TCYX.shape[0], c.grid_THW
    last = max(0, total - c.frames)
    starts = [*range(0, last, step), last]
    shown = torch.arange(c.frames)
    sums_THWD = torch.zeros(total, height, width, c.dim, device=device)
    count_T = torch.zeros(total, device=device)
    for some in (starts[i : i + batch] for i in range(0, len(starts), batch)):
        clips = [frames_TCYX[(start + shown).clamp(max=total - 1)].transpose(0, 1) for start in some]
        tokens_BLD = encoder(torch.stack(clips).to(device))[:, encoder.n_prefix :].float()
        tubes_BTHWD = tokens_BLD.unflatten(1, (tubes, height, width))
        for start, clip_THWD in zip(some, tubes_BTHWD.repeat_interleave(c.t_patch, dim=1), strict=True):
            end = min(start + c.frames, total)
            sums_THWD[start:end] += clip_THWD[: end - start]
            count_T[start:end] += 1
    return sums_THWD / count_T[:, None, None, None]


# --- measures ----------------------------------------------------------------------------------------------------


class JF(NamedTuple):
    """J and F of each object, float64 [N], in the order of `objects`: means over the evaluated frames."""

    objects: list[int]
    j_N: Tensor
    f_N: Tensor

    @property
    def mean(self) -> float:
        """J&F of the video: the mean of both, over its objects. For a dataset, average over the objects of all videos."""
        return float((self.j_N.mean() + self.f_N.mean()) / 2)


def region_similarity(pred_TYX: Tensor, true_TYX: Tensor) -> Tensor:
    """J: intersection over union of two boolean masks, float64 [...]; 1 where both are empty."""
    _check_same_size(pred_TYX, true_TYX)
    both = (pred_TYX & true_TYX).sum((-2, -1)).double()
    either = (pred_TYX | true_TYX).sum((-2, -1)).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def boundary_f(pred_TYX: Tensor, true_TYX: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """F: harmonic mean of precision and recall of the boundaries of two boolean masks, float64 [...].

    A boundary pixel is right if a pixel of the other boundary lies within `tolerance` diagonals of the picture, rounded
    up to whole pixels. 1 if neither mask has a boundary, 0 if only one has.
    """
    _check_same_size(pred_TYX, true_TYX)
    reach = math.ceil(tolerance * math.hypot(*pred_TYX.shape[-2:]))
    pred, true = boundary(pred_TYX), boundary(true_TYX)
    n_pred, n_true = pred.sum((-2, -1)).double(), true.sum((-2, -1)).double()
    precision = (pred & _dilate(true, reach)).sum((-2, -1)) / n_pred.clamp(min=1)
    recall = (true & _dilate(pred, reach)).sum((-2, -1)) / n_true.clamp(min=1)
    f = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where((n_pred == 0) & (n_true == 0), 1.0, f)


def boundary(mask_TYX: Tensor) -> Tensor:
    """Pixels that differ from their right, lower, or lower right neighbour, boolean [..., Y, X].

    So a boundary is one pixel wide, on one side of an edge. Outside the picture its last row and column are repeated.
    """
    right = torch.cat((mask_TYX[..., 1:], mask_TYX[..., -1:]), -1)
    below = torch.cat((mask_TYX[..., 1:, :], mask_TYX[..., -1:, :]), -2)
    across = torch.cat((right[..., 1:, :], right[..., -1:, :]), -2)
    return (mask_TYX ^ right) | (mask_TYX ^ below) | (mask_TYX ^ across)


def _dilate(mask_TYX: Tensor, reach: int) -> Tensor:
    """True within `reach` pixels of a true pixel (Euclidean distance: a disk)."""
    offsets = torch.arange(-reach, reach + 1, device=mask_TYX.device)
    disk = (offsets[:, None] ** 2 + offsets**2 <= reach**2).float()
    flat = mask_TYX.reshape(-1, 1, *mask_TYX.shape[-2:]).float()
    return (F.conv2d(flat, disk[None, None], padding=reach) > 0.5).reshape(mask_TYX.shape)


def j_and_f(pred_TYX: Tensor, true_TYX: Tensor) -> JF:
    """J and F of each object of a video, as in the semi-supervised task of DAVIS-2017.

    Objects are the numbers above 0 in the true masks. The first frame, which was given, and the last are not evaluated.
    ValueError if sizes differ, fewer than three frames are given, the true masks hold no object, or the prediction holds
    an object that they do not.
    """
    _check_same_size(pred_TYX, true_TYX)
    if true_TYX.dim() != 3 or true_TYX.shape[0] < 3:
        raise ValueError(
            f"masks of {tuple(true_TYX.shape)}: give [T, Y, X] of at least 3 frames, the first and last are not evaluated"
        )
    objects = [n for n in true_TYX.unique().tolist() if n > 0]
    if not objects:
        raise ValueError("the true masks hold no object: give integers, 0 for background")
    unknown = sorted(set(pred_TYX.unique().tolist()) - {0, *objects})
    if unknown:
        raise ValueError(f"the prediction has objects {unknown}, the true masks only {objects}")
    pred, true = pred_TYX[1:-1], true_TYX[1:-1]
    j = [region_similarity(pred == n, true == n).mean() for n in objects]
    f = [boundary_f(pred == n, true == n).mean() for n in objects]
    return JF(objects, torch.stack(j), torch.stack(f))


def _check_same_size(pred_TYX: Tensor, true_TYX: Tensor) -> None:
    if pred_TYX.shape != true_TYX.shape:
        raise ValueError(
            f"predicted masks of {tuple(pred_TYX.shape)}, true ones of {tuple(true_TYX.shape)}: resize one"
        )
