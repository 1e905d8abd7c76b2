#!/usr/bin/env python3
"""Convert the authors' weights into a folder for the Hugging Face Hub: safetensors, config.json and a model card.

    python hfhub/convert.py AUTHORS_FILE --model gfnet_resnet50_96
    python hfhub/convert.py localizer=anchornet.pth resized=RESIZED.pth.tar patch=PATCH.pth.tar \\
        --model anchornet_patch_densenet201_95
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_dynamic.hub import convert, find_entry, read_catalog
from timm_dynamic.utils import CheckpointError

CATALOG = Path(__file__).parent / 'catalog.json'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='AUTHORS_FILE',
                        help='A file, a folder, or PART=FILE for each part of a model with several parts.')
    parser.add_argument('--model', required=True, help='Name of a model in the catalog, with or without its tag.')
    parser.add_argument('--out', metavar='FOLDER', help='Folder to write. Default: output/hub/MODEL.TAG')
    parser.add_argument('--catalog', default=CATALOG, help='Default: catalog.json beside this script.')
    args = parser.parse_args(argv)
    parts = dict(file.split('=', 1) for file in args.files if '=' in file)
    if len(parts or args.files[:1]) != len(args.files):
        parser.error('Expected one file, one folder, or PART=FILE once for each part.')
    try:
        entry = find_entry(read_catalog(args.catalog), args.model)
        folder = Path(args.out or Path('output/hub') / entry.name)
        report = convert(parts or args.files[0], entry, folder)
    except (CheckpointError, ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(f"{entry.name}: {report['kept']} tensors kept" +
          (f"; {report['elsewhere']} tensors of the model are not in the files" if report['elsewhere'] else ''))
    for reason, keys in report['dropped'].items():
        print(f"left out, {reason}: {len(keys)}")
        for key in keys[:20]:
            print(f'    {key}')
        if keys[20:]:
            print(f'    ... {len(keys) - 20} more')
    print(f"Loaded in a fresh process: logits differ from the source's by {report['difference']:.3g}.\n{folder}")
    if entry.licence is None:
        print(f'Publishing it needs permission: {entry.licence_note}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
