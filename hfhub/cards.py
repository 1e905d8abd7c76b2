#!/usr/bin/env python3
"""Write the model cards of the weights that come with the package to hfhub/cards, as examples.

    python hfhub/cards.py
"""
import shutil
import tempfile
from pathlib import Path

from timm_dynamic.hub import read_catalog, stage_bundled

HERE = Path(__file__).parent


def write_cards(folder: Path) -> None:
    """Write FOLDER/MODEL.TAG/README.md and its plot for every model of the family 'digits'."""
    for entry in read_catalog().values():
        if entry.family == 'digits':
            with tempfile.TemporaryDirectory() as staged:
                stage_bundled(entry, staged)
                (folder / entry.name).mkdir(parents=True, exist_ok=True)
                for name in ('README.md', 'curve.png'):
                    if (Path(staged) / name).exists():
                        shutil.copyfile(Path(staged) / name, folder / entry.name / name)


if __name__ == '__main__':
    write_cards(HERE / 'cards')
