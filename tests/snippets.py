"""The fenced blocks of README.md and docs/, and the commands in them."""
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from torch.distributed.run import get_args_parser

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = path.read_text(encoding='utf-8')
    return [
        Block(path.relative_to(ROOT).as_posix(), text[:m.start()].count('\n') + 2, m[1], m[2])
        for m in re.finditer(r'^ *```(\w*)\n(.*?)^ *```$', text, re.DOTALL | re.MULTILINE)]


@dataclass
class Command:
    page: str
    words: list[str]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def commands_of(block: Block) -> list[Command]:
    lines = block.text.replace('\\\n', ' ').splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [Command(block.page, w) for w in words if w]


def script_and_args(words: list[str]) -> tuple[str, list[str]]:
    """The name of our script and its arguments. Launchers are parsed by their own parsers."""
    words = [w for i, w in enumerate(words) if not (re.fullmatch(r'[A-Z_]+=\S*', w) and i < 2)]  # environment
    if words[:2] == ['accelerate', 'launch']:
        args = launch_command_parser().parse_args(words[2:])
        words = ['python', *(['-m'] if args.module else []), args.training_script, *args.training_script_args]
    elif words[0] == 'torchrun':
        args = get_args_parser().parse_args(words[1:])
        words = ['python', args.training_script, *args.training_script_args]
    if words[:2] == ['python', '-m']:
        words = [words[2], *words[3:]] if words[2] != 'timm_dynamic' else ['timm-dynamic', *words[3:]]
    elif words[0] == 'python':
        assert (ROOT / words[1]).is_file(), f'no script {words[1]}'
        return Path(words[1]).stem, words[2:]
    return (words[1], words[2:]) if words[0] == 'timm-dynamic' else (words[0], words[1:])
