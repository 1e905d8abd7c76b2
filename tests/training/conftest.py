import pytest

from timm_dynamic.training import run_folder


@pytest.fixture(autouse=True)
def no_curve(request, monkeypatch):
    """A picture of the epochs so far takes longer than an epoch of a tiny model: only where a test asks for `curve`."""
    if 'curve' not in request.fixturenames:
        monkeypatch.setattr(run_folder, 'plot_curve', lambda *args: False)


@pytest.fixture
def curve():
    """Runs draw curve.png, as they do for users."""
