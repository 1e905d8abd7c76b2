import os

# Before torch is imported: tests run beside each other on few cores, and results must not depend on their number.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MKL_NUM_THREADS', '1')

import gc
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import make_images


def pytest_addoption(parser):
    parser.addini('max_skipped', 'number of tests that a run of CI may skip', default='0')


def pytest_xdist_auto_num_workers(config):
    """One process for each of up to four cores; none beside this one for tests given by name, as to debug them."""
    return 0 if any('::' in arg for arg in config.args) else min(os.cpu_count() or 1, 4)


def pytest_collection_finish(session):
    gc.freeze()  # Accelerate collects garbage after each stage: let it not look at all that was imported


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """On CI, fail if more tests are skipped than pyproject.toml allows: something that they need is missing."""
    terminal = session.config.pluginmanager.get_plugin('terminalreporter')
    if terminal is None or not os.environ.get('CI'):
        return
    skipped, allowed = len(terminal.stats.get('skipped', [])), int(session.config.getini('max_skipped'))
    if skipped > allowed:
        terminal.write_line(f'\n{skipped} tests were skipped, max_skipped in pyproject.toml is {allowed}.', red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
