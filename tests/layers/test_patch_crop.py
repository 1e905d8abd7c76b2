import pytest
import torch
from torch.autograd import gradcheck

from timm_dynamic.layers import crop_patches, crop_patches_bilinear, get_glance, get_patch_coords


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ('batch', 'channels', 'side', 'size'), [(5, 3, 20, 7), (1, 1, 9, 9), (0, 3, 12, 4), (3, 4, 8, 1)])
def test_crop_is_slicing(memory_format, batch, channels, side, size):
    images = torch.randn(batch, channels, side, side).contiguous(memory_format=memory_format)
    coords = torch.randint(0, side - size + 1, (batch, 2))
    patches = crop_patches(images, coords, size)
    assert patches.shape == (batch, channels, size, size)
    for image, (row, column), patch in zip(images, coords.tolist(), patches):
        assert torch.equal(patch, image[:, row:row + size, column:column + size])
    if batch and channels > 1 and size > 1:
        assert patches.is_contiguous(memory_format=memory_format)


def test_crop_of_bytes_half_and_rectangles():
    coords = torch.tensor([[1, 5], [0, 0]])
    for images in (torch.randint(0, 255, (2, 3, 8, 12), dtype=torch.uint8), torch.randn(2, 3, 8, 12).half()):
        assert torch.equal(crop_patches(images, coords, 4)[0], images[0, :, 1:5, 5:9])


def test_coords_are_row_and_column_floored():
    # free space 128: 0.5 -> 64; 0.999 -> 127.87 -> 127; 1 -> 128; outside goes to the edge
    actions = torch.tensor([[0.5, 0.999], [1.0, 0.0], [-0.1, 1.1]])
    assert get_patch_coords(actions, 224, 96).tolist() == [[64, 127], [128, 0], [0, 128]]
    assert get_patch_coords(torch.rand(3, 2), 96, 96).tolist() == [[0, 0]] * 3
    assert get_patch_coords(torch.full((1, 2), torch.nan), 224, 96).tolist()[0][0] in range(129)


def test_bilinear_crop_on_and_between_pixels():
    images = torch.arange(36.).view(1, 1, 6, 6)  # pixel (r, c) is 6r + c
    # free space 4: action (0.25, 0.5) is pixel (1, 2) exactly
    on = crop_patches_bilinear(images, torch.tensor([[0.25, 0.5]]), 2)
    assert torch.equal(on, crop_patches(images, torch.tensor([[1, 2]]), 2))
    # position (1.5, 2.25): 6 * 1.5 + 2.25 = 11.25 in the corner
    between = crop_patches_bilinear(images, torch.tensor([[0.375, 0.5625]]), 2)
    torch.testing.assert_close(between, torch.tensor([[[[11.25, 12.25], [17.25, 18.25]]]]))
    # the last row and column
    end = crop_patches_bilinear(images, torch.ones(1, 2), 2)
    assert torch.equal(end, images[..., 4:, 4:])
    # a patch as large as the image
    assert torch.equal(crop_patches_bilinear(images, torch.rand(1, 2), 6), images)


def test_bilinear_crop_is_that_of_grid_sample():
    images, actions, size, side = torch.randn(4, 3, 17, 17, dtype=torch.float64), torch.rand(4, 2).double(), 6, 17
    pixels = (actions.float() * (side - size)).double()[:, None, :] + torch.arange(size)[None, :, None]  # [4, 6, 2]
    grid = pixels / (side - 1) * 2 - 1
    rows, columns = grid[:, :, None, 0].expand(-1, -1, size), grid[:, None, :, 1].expand(-1, size, -1)
    expected = torch.nn.functional.grid_sample(images, torch.stack([columns, rows], dim=-1), align_corners=True)
    torch.testing.assert_close(crop_patches_bilinear(images, actions, size), expected, rtol=0, atol=1e-5)


def test_bilinear_crop_has_the_gradient_of_the_position():
    images = torch.arange(36.).view(1, 1, 6, 6)
    actions = torch.tensor([[0.3, 0.6]], requires_grad=True)
    crop_patches_bilinear(images, actions, 2).mean().backward()
    # moving by one row adds 6, by one column 1; the free space of 4 scales both
    torch.testing.assert_close(actions.grad, torch.tensor([[24., 4.]]))
    images = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: crop_patches_bilinear(x, torch.tensor([[0.3, 0.7], [1., 0.]]), 3), images)


def test_glance():
    images = torch.randn(2, 3, 10, 10)
    for mode in ('bicubic', 'bilinear'):
        glance = get_glance(images, 4, mode)
        assert glance.shape == (2, 3, 4, 4)
        torch.testing.assert_close(glance[..., 0, 0], images[..., 0, 0])  # corners are aligned
        torch.testing.assert_close(glance[..., -1, -1], images[..., -1, -1], rtol=0, atol=1e-5)
    assert get_glance(images, 10) is images
    assert get_glance(images[:0], 4).shape == (0, 3, 4, 4)
