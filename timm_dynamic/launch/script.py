"""Common parts of the scripts: logging, one-line errors, exit status."""
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence

import torch
from timm.utils import setup_default_logging

from ..utils import UserError
from ..utils.signals import Stopped


def import_modules(names: Sequence[str] | None) -> None:
    """Import the modules of `--device-modules`: they may add a device, or register models.

    Raises:
        ValueError: There is no such module.
    """
    for name in names or ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            raise ValueError(f'--device-modules {name}: {e}.') from e


def run_script(script: Callable[[], int]) -> int:
    """Run the body of a script with logging to the terminal. User errors are printed as one line.

    Returns:
        Exit status: that of the body; 1 for an error; 128 + signal number if a signal stopped it.
    """
    if not logging.root.handlers:
        setup_default_logging()
        for handler in logging.root.handlers:
            handler.setStream(sys.stdout)  # type: ignore[attr-defined]
    try:
        return script()
    except (UserError, ValueError, FileNotFoundError) as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr)
        return 1
    except Stopped as e:
        name = signal.Signals(e.signum).name
        print(f'Stopped by {name}; the state is saved. Continue with --resume auto.', file=sys.stderr)
        return 128 + e.signum
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
