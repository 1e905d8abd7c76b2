"""Commands: convert the authors' weights, and publish folders on the Hub."""
import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..launch.parser import StrictParser
from ..utils import CheckpointError, read_json
from .catalog import CATALOG, Entry, find_entry, read_catalog
from .convert import convert, stage_bundled
from .publish import PublishError, check_login, check_permission, files_to_publish, publish, verify_published

Job = tuple[Entry | None, Path, str]  # entry in the catalog, folder, repository

_CONVERT = """\
Convert the authors' weights into a folder for the Hugging Face Hub: safetensors, config.json and a model card.

    timm-dynamic convert AUTHORS_FILE --model gfnet_resnet50_96
    timm-dynamic convert localizer=anchornet.pth resized=RESIZED.pth.tar patch=PATCH.pth.tar \\
        --model anchornet_patch_densenet201_95
"""
_PUBLISH = """\
Publish folders from convert.py or train.py --push-to-hub on the Hugging Face Hub, and verify the result.

    timm-dynamic publish --all --dry-run
    timm-dynamic publish output/hub/gfnet_resnet50_96.paper_in1k
    timm-dynamic publish output/train/RUN/hub --private

Log in first with `hf auth login`. A second run is safe: it sends only files that differ.
"""


def convert_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of hfhub/convert.py and `timm-dynamic convert`. Returns the exit status: 0, or 1 for an error."""
    parser = StrictParser(description=_CONVERT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='AUTHORS_FILE',
                        help='A file, a folder, or PART=FILE for each part of a model with several parts.')
    parser.add_argument('--model', required=True, help='Name of a model in the catalog, with or without its tag.')
    parser.add_argument('--out', metavar='FOLDER', help='Folder to write. Default: output/hub/MODEL.TAG')
    parser.add_argument('--catalog', default=CATALOG, help='Default: that of the package.')
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


def publish_main(argv: Sequence[str] | None = None) -> int:
    """Entry point of hfhub/publish.py and `timm-dynamic publish`. Returns the exit status: 0, or 1 for an error."""
    parser = StrictParser(description=_PUBLISH, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', metavar='FOLDER', help='Folder to publish.')
    parser.add_argument('--all', action='store_true',
                        help='Publish all models of the catalog that are in --root or come with the package.')
    parser.add_argument('--root', default='output/hub', metavar='FOLDER',
                        help='Output folder of convert.py. Default: %(default)s')
    parser.add_argument('--repo', metavar='ORG/NAME', help='Repository. Default: from the catalog or the run.')
    parser.add_argument('--dry-run', action='store_true', help='List files, sizes and repositories. Send nothing.')
    parser.add_argument('--private', action='store_true', help='Create private repositories.')
    parser.add_argument('--revision', metavar='BRANCH', help='Branch to publish to; created if needed. Default: main')
    parser.add_argument('--i-have-permission', action='store_true',
                        help='The authors permit the publication although they state no licence.')
    parser.add_argument('--catalog', default=CATALOG, help='Default: that of the package.')
    args = parser.parse_args(argv)
    if bool(args.folder) == args.all:
        parser.error('Expected either a FOLDER or --all.')
    if args.all and args.repo:
        parser.error('--repo needs one FOLDER. For --all, set the organisation with TIMM_DYNAMIC_HUB_ORG.')
    logging.basicConfig(format='%(message)s')

    with tempfile.TemporaryDirectory(prefix='timm_dynamic-') as staged:
        try:
            return _publish(_find_jobs(args, Path(staged)), args)
        except (PublishError, OSError, ValueError) as e:
            print(f'error: {e}', file=sys.stderr)
            return 1


def _find_jobs(args: argparse.Namespace, staged: Path) -> list[Job]:
    catalog = read_catalog(args.catalog)
    if args.all:
        return [(e, _folder_of(e, Path(args.root), staged), e.hub_id) for e in catalog.values()]
    folder = Path(args.folder)
    name = read_json(files_to_publish(folder)['config.json']).get('entry')
    entry = catalog.get(str(name))
    repo = args.repo or (entry.hub_id if entry else name)  # train.py stores the full id
    if not repo or '/' not in repo:
        raise PublishError(f"'{folder}' is not a model of the catalog. Name its repository with --repo.")
    return [(entry, folder, repo)]


def _folder_of(entry: Entry, root: Path, staged: Path) -> Path:
    """Folder of a model. Weights that come with the package need no conversion, only a card."""
    folder = root / entry.name
    return stage_bundled(entry, staged / entry.name) if entry.family == 'digits' and not folder.exists() else folder


def _publish(jobs: list[Job], args: argparse.Namespace) -> int:
    """Publish all jobs, also if some fail. Returns the exit status."""
    chosen, published, status = [], [], 0
    branch = f'@{args.revision}' if args.revision else ''
    for entry, folder, repo in jobs:
        if args.all and not folder.exists():
            print(f'{repo}: not converted yet (no {folder})')
            continue
        try:
            sizes = {name: path.stat().st_size for name, path in files_to_publish(folder).items()}
            if entry is not None:
                check_permission(entry, args.i_have_permission)
        except PublishError as e:
            # --all skips models that may not be published: this is not a failure.
            forbidden = args.all and entry is not None and entry.licence is None and not args.i_have_permission
            print(f'{repo}: {e}', file=sys.stdout if forbidden else sys.stderr)
            status = status if forbidden else 1
            continue
        print(f'{repo}{branch}: {sum(sizes.values()):,} bytes from {folder}')
        for name, size in sizes.items():
            print(f'    {name:<20}{size:>14,}', flush=True)
        chosen.append((folder, repo))
    if args.dry_run or not chosen:
        return status
    check_login(chosen[0][1])
    for folder, repo in chosen:
        try:
            report = publish(folder, repo, private=args.private, revision=args.revision, verify=False)
        except PublishError as e:
            print(f'{repo}{branch}: {e}', file=sys.stderr)
            status = 1
            continue
        sent = f"sent {', '.join(report['uploaded'])}" if report['uploaded'] else 'nothing changed, nothing sent'
        print(f"{repo}{branch}: {sent}; {report['url']}, commit {report['commit']}", flush=True)
        published.append((folder, repo, report['commit']))
    for repo, difference in verify_published(published).items():
        print(f'{repo}{branch}: verified: all hashes match, logits differ by {difference:.3g}')
    return status
