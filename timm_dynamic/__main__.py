"""The command timm-dynamic, also as python -m timm_dynamic:

    timm-dynamic train ...        train models, see train --help
    timm-dynamic validate ...     evaluate models, exits and budgets
    timm-dynamic predict ...      write predictions of images
    timm-dynamic benchmark ...    measure the speed of early exit
    timm-dynamic visualize ...    draw where a model looks
    timm-dynamic convert ...      convert the authors' weights
    timm-dynamic publish ...      publish weights on the Hub
    timm-dynamic SCRIPT ...       run a script with the models registered, e.g. timm's own validate.py

In several processes: accelerate launch -m timm_dynamic train ...
"""
import importlib
import runpy
import sys
from pathlib import Path

import timm_dynamic  # noqa: F401  registers the models

_COMMANDS = {
    'train': ('training', 'train_main'), 'validate': ('evaluation', 'validate_main'),
    'predict': ('evaluation', 'predict_main'), 'benchmark': ('benchmark', 'benchmark_main'),
    'visualize': ('visualize', 'main'), 'convert': ('hub', 'convert_main'), 'publish': ('hub', 'publish_main'),
}


def main() -> int:
    """Run a command or a script. Returns the exit status."""
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(__doc__.strip())
        return 0 if len(sys.argv) > 1 else 2
    name = sys.argv[1]
    if name in _COMMANDS:
        module, function = _COMMANDS[name]
        sys.argv = [f'timm-dynamic {name}', *sys.argv[2:]]  # as help and errors call it
        return getattr(importlib.import_module(f'timm_dynamic.{module}'), function)() or 0
    if not Path(name).is_file():
        print(f"timm-dynamic: '{name}' is neither a command ({', '.join(_COMMANDS)}) nor a script.", file=sys.stderr)
        return 1
    # The script gets its own arguments, and its folder is the first on the path, as with `python SCRIPT`.
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(name).resolve().parent)
    runpy.run_path(name, run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
