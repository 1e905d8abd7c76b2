"""Run a script with timm_dynamic's models registered: python -m timm_dynamic SCRIPT ARGS...

For scripts that use timm but not this package, e.g. timm's own train.py, validate.py or benchmark.py.
"""
import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        sys.exit(f"python -m timm_dynamic: there is no script '{script}'.")
    # The script gets its own arguments, and its folder is the first on the path, as with `python SCRIPT`.
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    import timm_dynamic  # noqa: F401  registers the models

    main()
