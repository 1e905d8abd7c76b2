"""Glances and patches of images.

Positions follow the released code of GFNet: an action in [0, 1]² is (row, column), and the top-left corner of a patch
of side P in an image of side S is floor(action * (S - P)).
"""
import torch
import torch.nn.functional as F


def get_glance(images: torch.Tensor, size: int, mode: str = 'bicubic') -> torch.Tensor:
    """Scale whole images down, with aligned corners and without antialiasing, as GFNet's weights were trained.

    Args:
        images: Images [B, C, S, S].
        size: Side of the glance P.
        mode: 'bicubic' or 'bilinear'.

    Returns:
        Glances [B, C, P, P].
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode=mode, align_corners=True)


def get_patch_coords(actions: torch.Tensor, img_size: int, patch_size: int) -> torch.Tensor:
    """Turn actions into the corners of patches.

    Args:
        actions: Row and column in [0, 1] [B, 2], floating point. Values outside are clamped.
        img_size: Side of the images S.
        patch_size: Side of the patches P <= S.

    Returns:
        Top-left row and column [B, 2], int64, in 0..S - P.
    """
    free = img_size - patch_size
    return (actions.detach().float() * free).floor().long().clamp(0, free)


def crop_patches(images: torch.Tensor, coords: torch.Tensor, size: int) -> torch.Tensor:
    """Cut one patch out of every image, bit for bit equal to slicing.

    All windows of an image are a view of it, and one gather takes B of them: no loop, and no index per pixel.

    Args:
        images: Images [B, C, H, W].
        coords: Top-left row and column [B, 2], int64, in 0..H - P and 0..W - P.
        size: Side of the patches P.

    Returns:
        Patches [B, C, P, P], in the memory format of the images.
    """
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # [B, C, H - P + 1, W - P + 1, P, P]
    rows = torch.arange(images.shape[0], device=images.device)  # no len(): a trace would keep the batch size
    patches = windows[rows, :, coords[:, 0], coords[:, 1]]
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return patches.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def crop_patches_bilinear(images: torch.Tensor, actions: torch.Tensor, size: int) -> torch.Tensor:
    """Cut one patch out of every image at a position between pixels, differentiable in the position.

    A patch is not scaled, so all its pixels have the same offset from those of the image: the patch and its neighbours
    one pixel down and to the right are interpolated with two fractions. At whole pixels it equals `crop_patches`.

    Args:
        images: Images [B, C, S, S].
        actions: Row and column in [0, 1] [B, 2], floating point.
        size: Side of the patches P <= S.

    Returns:
        Patches [B, C, P, P], in the dtype of the images.
    """
    free = images.shape[-1] - size
    position = actions.float() * free
    # Not the last corner, so that there is a neighbour. If there is only one position, the gradient is zero.
    coords = position.detach().floor().long().clamp(0, max(free - 1, 0))
    row, column = (position - coords).to(images.dtype)[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    if free == 0:
        return crop_patches(images, coords, size) + 0 * (row + column)
    wider = crop_patches(images, coords, size + 1)
    wider = torch.lerp(wider[:, :, :-1], wider[:, :, 1:], row)
    return torch.lerp(wider[..., :-1], wider[..., 1:], column)
