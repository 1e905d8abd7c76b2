"""Every snippet of README.md and docs/ runs, or is at least parsed by the real parser of its script."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from helpers import ROOT, authors_checkpoint, make_images, run_python, write_clcnet_zip
from snippets import PAGES, Command, blocks_of, commands_of, script_and_args

from benchmarks.__main__ import parser as benchmarks_parser
from timm_dynamic import visualize
from timm_dynamic.benchmark import create_benchmark_parser
from timm_dynamic.evaluation import predict_main, validate_main
from timm_dynamic.hub import convert_main, publish_main
from timm_dynamic.launch.options import create_predict_parser, create_validate_parser
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.models.builder import check_model_name
from timm_dynamic.training import train_main
from timm_dynamic.utils import save_pretrained

# Stand-ins for what is large: text of a snippet, and what is run instead.
SUBSTITUTIONS = {
    # the user's trained model: the fixture `files` puts test_gfnet there
    'model.set_budget(gmacs=0.15)': 'model.set_budget(gmacs=0.008)',
    # the authors' files of DenseNet-201 are large: the fixture makes those of a ResNet-18
    "'anchornet_patch_densenet201_95', ": "'anchornet_patch', backbone='resnet18', patch_size=95, ",
    # commands that are run
    '--model gfnet_mobilenetv3_large_100_96 --data-dir DATA --epochs 20':
        '--model test_gfnet --data-dir DATA --epochs 1 --batch-size 24 --workers 0 --device cpu --no-aug',
    'best --data-dir DATA --curve': 'best --data-dir DATA --workers 0 --device cpu --curve',
    '--data-dir IMAGES --budget 0.15': '--data-dir IMAGES --budget 0.012 --workers 0 --device cpu',
}

# Python blocks that do not run here, by a line of theirs.
RUN_ELSEWHERE = {
    "model = timm.create_model('gfnet_regnety_006_96', pretrained=True).eval()": (
        'needs a Hub: tests/hub/scenarios.py runs it against a local one'),
    '# two_exit_resnet.py': 'the tests of the family of the guide run the files of this page',
    '# two_exit_resnet.py, continued': 'as above',
    '# use_two_exit_resnet.py': 'as above',
    '# test_two_exit_resnet.py': 'as above',
}

# Blocks of commands that are marked as text, by their beginning: no parser of this package knows them.
TEXT = {
    'python -m timm_dynamic /path/to/pytorch-image-models/validate.py': "timm's scripts are not in its package",
    'PYTHONPATH=.:CLONE/tests/models python -m pytest': 'a test of the family of the guide runs it',
}

# Commands of other programs.
OTHER_PROGRAMS = {
    'python3 -m venv .venv': 'run by .ci/run',
    '. .venv/bin/activate': 'run by .ci/run',
    'pip install': 'run by .ci/run',
    'python -m pytest': 'run by .ci/run',
    'hf auth login': 'asks for a token',
}

# Commands that are run here, by page; the others are only parsed.
RUN = {
    'README.md': ('--experiment mine', 'curve.png', 'predictions.csv'),
    'docs/anchornet.md': ('--demo 4',),
    'docs/migration.md': ('',),  # all, by test_migration.py
}
ONLY_PARSED = {
    'README.md': 1, 'docs/anchornet.md': 6, 'docs/clcnet.md': 13, 'docs/focusnet.md': 7, 'docs/gfnet.md': 6,
    'docs/hub.md': 5, 'docs/own-data.md': 8, 'docs/quickstart.md': 4, 'docs/speed.md': 2, 'docs/validate.md': 4,
}


def substitute(text: str) -> str:
    for old, new in SUBSTITUTIONS.items():
        text = text.replace(old, new)
    return text


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [
    block for block in BLOCKS
    if block.language == 'python' and not any(line in RUN_ELSEWHERE for line in block.text.splitlines())]


def is_run(command: Command) -> bool:
    return any(part in command.text for part in RUN.get(command.page, ()))


def is_of_other_program(command: Command) -> bool:
    return command.text.startswith(tuple(OTHER_PROGRAMS))


COMMANDS = [command for block in BLOCKS if block.language == 'sh' for command in commands_of(block)]


def parse(script: str, args: list[str]) -> None:
    """Parse arguments with the real parser of a script. It exits on an error."""
    model = ''
    if script == 'train':
        options = TrainOptions(args)
        model = options.base.model if not options.base.device_modules else ''
    elif script in ('validate', 'predict'):
        parser = create_validate_parser() if script == 'validate' else create_predict_parser()
        model = parser.parse_args(args).model
    elif script == 'visualize':
        model = visualize.create_parser().parse_args(args).model
    elif script == 'benchmark':
        create_benchmark_parser().parse_args(args)
    elif script == 'benchmarks':
        benchmarks_parser.parse_args(args)
    elif script in ('convert', 'publish'):  # without a catalog, they stop after parsing
        assert {'convert': convert_main, 'publish': publish_main}[script]([*args, '--catalog', 'none.json']) == 1
    elif script == 'cards':
        assert args == []
    else:
        assert (ROOT / f"{script.replace('.', '/')}.py").is_file(), f"Unknown program '{script}'."
    if model and not model.startswith(('local-dir:', 'hf-hub:')):
        check_model_name(model)


def run(script: str, args: list[str]) -> None:
    """Run a script in this process."""
    mains = {'train': train_main, 'validate': validate_main, 'predict': predict_main, 'visualize': visualize.main}
    assert not mains[script](args)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with what the snippets read: a trained model, and authors' files in their layouts."""
    folder = tmp_path_factory.mktemp('docs')
    save_pretrained(timm.create_model('test_gfnet', pretrained=True), folder / 'runs/mine/best')
    torch.save({'state_dict': timm.create_model('resnet18').state_dict()},
               folder / 'clonalnet_resnet18_model_best.pth.tar')
    gfnet = timm.create_model('gfnet_mobilenetv3_large_100_96').eval()
    torch.save(authors_checkpoint(gfnet, 'mobilenetv3_large_100', steps=3), folder / 'AUTHORS.pth.tar')
    anchornet = timm.create_model('anchornet_patch', backbone='resnet18', patch_size=95)
    (folder / 'FOLDER').mkdir()
    for part, name in (('localizer', 'anchornet.pth'), ('resized', 'densenet201_resized_95_best.pth.tar'),
                       ('patch', 'densenet201_patch_95_best.pth.tar')):
        torch.save(getattr(anchornet, part).state_dict(), folder / name)
        (folder / 'FOLDER' / name).symlink_to(folder / name)
    (folder / 'WEIGHTS').mkdir()
    write_clcnet_zip(folder / 'WEIGHTS/CLCNet_imagenet_split_1(MSE_0.1097).zip')
    return folder


@pytest.mark.parametrize('page', sorted({block.page for block in PYTHON}))
def test_python_runs(page, files, monkeypatch):
    """The blocks of a page, one after another, as a reader would."""
    monkeypatch.chdir(files)
    names: dict = {}
    for block in PYTHON:
        if block.page == page:
            code = '\n' * (block.line - 1) + substitute(block.text)
            exec(compile(code, page, 'exec'), names)


@pytest.mark.parametrize('command', [c for c in COMMANDS if not is_of_other_program(c)], ids=lambda c: c.text[:60])
def test_commands_are_parsed(command, tmp_path, monkeypatch):
    script, args = script_and_args(command.words)
    monkeypatch.chdir(tmp_path)
    parse(script, args)


def test_own_folder(tmp_path, monkeypatch):
    """The commands of README, on a small folder: train, validate, predict with a budget."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / 'DATA', {'train': 16, 'val': 16}, classes=3, size=(96, 96))
    (tmp_path / 'IMAGES').symlink_to(tmp_path / 'DATA/val')
    for command in COMMANDS:
        if command.page == 'README.md' and is_run(command):
            run(*script_and_args(shlex.split(substitute(command.text))))
    assert (tmp_path / 'curve.png').stat().st_size > 1000
    rows = (tmp_path / 'predictions.csv').read_text().splitlines()
    assert len(rows) == 1 + 3 * 16


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = [c for c in COMMANDS if c.page == 'docs/anchornet.md' and is_run(c)]
    run(*script_and_args(command.words))
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 4


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    """The files of docs/your-own-family.md in a folder."""
    folder = tmp_path_factory.mktemp('family')
    files: dict[str, str] = {}
    for block in BLOCKS:
        name = re.match(r'# (\w+\.py)', block.text)
        if block.page == 'docs/your-own-family.md' and name:
            files[name[1]] = files.get(name[1], '') + block.text + '\n\n'
    for name, text in files.items():
        (folder / name).write_text(text)
    assert sorted(files) == ['test_two_exit_resnet.py', 'two_exit_resnet.py', 'use_two_exit_resnet.py']
    return folder


def environment(folder: Path) -> dict[str, str]:
    paths = [ROOT, folder, ROOT / 'tests/models']
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, paths))}


def test_the_family_of_the_guide_passes_the_shared_tests(family):
    """In a process of its own: the models stay registered. pytest also runs the file that uses the model."""
    (family / 'pytest.ini').write_text('[pytest]\n')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'test_two_exit_resnet.py',
         'use_two_exit_resnet.py'], cwd=family, env=environment(family), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 30


def test_the_family_of_the_guide_trains(family, tmp_path):
    (command,) = [c for c in COMMANDS if 'two_exit_tiny' in c.text]
    _, args = script_and_args(command.words)
    make_images(tmp_path / 'data', {'train': 16, 'val': 16}, size=(96, 96))
    done = run_python(
        'train.py', *args, '--data-dir', tmp_path / 'data', '--num-classes', 3, '--epochs', 1, '--batch-size', 24,
        '--workers', 0, '--device', 'cpu', '--output', tmp_path, '--experiment', 'run', env=environment(family))
    assert 'step 2' in done.stdout + done.stderr
    config = json.loads((tmp_path / 'run/best/config.json').read_text())
    assert config['architecture'] == 'two_exit_tiny'
    assert config['model_args']['exit_cfg']['budgets']


def test_only_these_commands_are_not_run():
    """A new command is run, or counted here."""
    counts: dict[str, int] = {}
    for command in COMMANDS:
        if not is_of_other_program(command) and not is_run(command) and 'two_exit_tiny' not in command.text:
            counts[command.page] = counts.get(command.page, 0) + 1
    assert counts == ONLY_PARSED, f'{sum(counts.values())} of {len(COMMANDS)} commands are only parsed: {counts}'


def test_every_block_has_a_language_or_is_output():
    assert {block.language for block in BLOCKS} == {'python', 'sh', 'text', ''}
    texts = [block.text for block in BLOCKS if block.language == 'text']
    assert all(text.startswith(tuple(TEXT)) for text in texts)
    assert len(texts) == len(TEXT)
    for block in BLOCKS:  # what has no language is printed by a program, or a tree of files
        assert block.language or not re.match(r'(python|pip|accelerate|torchrun|timm-dynamic|import|from) ', block.text)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_links(page):
    """Pages and headings that are linked exist."""
    text = page.read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)]+)\)', text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith(('https://', 'http://')):
            continue
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f'{page.name} links {link}'
        if anchor:
            headings = re.findall(r'^#+ (.+)$', target.read_text(encoding='utf-8'), re.MULTILINE)
            slugs = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings]
            assert anchor in slugs, f'{page.name} links {link}, headings are {slugs}'


def test_readme_lists_all_pages_and_is_short():
    readme = PAGES[0].read_text(encoding='utf-8')
    missing = [page.name for page in PAGES[1:] if f'(docs/{page.name})' not in readme]
    assert missing == []
    assert len(readme.split()) < 1100
