import os

# Before torch is imported: tests run beside each other on few cores, and results must not depend on their number.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MKL_NUM_THREADS', '1')

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import make_images


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's state is one per process; every test begins without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """24 images to train on, 11 (an odd number) to validate on, per class of 3."""
    return make_images(tmp_path_factory.mktemp('images'), {'train': 24, 'val': 11})
