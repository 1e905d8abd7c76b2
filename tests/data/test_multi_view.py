import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_dynamic.data import MultiViewLoader, collate_views, create_multi_view_transform

VIEWS = [
    dict(input_size=(3, 32, 32), interpolation='bicubic', crop_pct=0.875, crop_mode='center',
         mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    dict(input_size=(3, 48, 48), interpolation='bilinear', crop_pct=1.0, crop_mode='squash',
         mean=(0., 0., 0.), std=(1., 1., 1.)),
]


def make_images(count=5):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 50 + i, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize('normalise', [False, True])
def test_each_view_is_what_its_own_transform_gives(normalise):
    transform = create_multi_view_transform(VIEWS, normalise)
    samples = [(transform(image), i) for i, image in enumerate(make_images())]
    loader = MultiViewLoader(torch.utils.data.DataLoader(samples, 2, collate_fn=collate_views), VIEWS)
    batches = list(loader)
    assert [len(target) for _, target in batches] == [2, 2, 1]
    assert torch.cat([target for _, target in batches]).tolist() == list(range(5))
    for t, view in enumerate(VIEWS):
        own = create_transform(**view)
        seen = torch.cat([views[t] for views, _ in batches])
        torch.testing.assert_close(seen, torch.stack([own(image) for image in make_images()]), rtol=0, atol=2e-6)


def test_dtype():
    transform = create_multi_view_transform(VIEWS)
    batch = collate_views([(transform(image), 0) for image in make_images(2)])
    (small, large), target = next(iter(MultiViewLoader([batch], VIEWS, dtype=torch.float16)))
    assert small.dtype == large.dtype == torch.float16
    assert target.dtype == torch.int64
    assert batch[0][0].dtype == torch.uint8  # four times less to move
