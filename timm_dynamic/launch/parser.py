"""The parser of the scripts: a short help, suggestions for unknown options, reasons for unsupported ones."""
import argparse
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ..models.builder import model_arguments
from ..utils import did_you_mean


def hint_model_argument(option: str, model: str) -> str:
    """Suggest --model-kwargs for an unknown option that is an argument of the model, e.g. --patch-size; else empty."""
    name = option.lstrip('-').replace('-', '_')
    return f' It is an argument of {model}: --model-kwargs {name}=...' if name in model_arguments(model) else ''


class OptionParser(argparse.ArgumentParser):
    """Parser of a script.

    `--help` shows the common options, `--help-all` all of them. For an unknown option it suggests the nearest one; it
    does not accept abbreviations.

    Args:
        common: Names of the options that `--help` shows, as attributes, e.g. 'batch_size'.
        **kwargs: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, common: Collection[str], **kwargs: Any) -> None:
        super().__init__(
            usage='%(prog)s [options]', allow_abbrev=False, add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.common = frozenset(common)
        self._model = ''
        self.add_argument('-h', '--help', action=_ShortHelp, help='show the common options and exit')
        self.add_argument('--help-all', action='help', default=argparse.SUPPRESS, help='show all options and exit')

    def format_common_help(self) -> str:
        """Help text of the common options."""
        hidden = [a for a in self._actions if a.dest not in {'help', 'help_all', *self.common}]
        texts = [a.help for a in hidden]
        epilog = self.epilog
        more = sum(text is not argparse.SUPPRESS for text in texts)
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            self.epilog = f'{more} more options: --help-all'
            descriptions = [(g, g.description) for g in self._action_groups]
            for group, _ in descriptions:  # a group with a description is shown even if it is empty
                if all(a in hidden for a in group._group_actions):
                    group.description = None
            return self.format_help()
        finally:
            self.epilog = epilog
            for action, text in zip(hidden, texts):
                action.help = text
            for group, description in descriptions:
                group.description = description

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, rest = super().parse_known_args(args, namespace)
        self._model = str(getattr(parsed, 'model', ''))
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments'):
            known = [s for a in self._actions for s in a.option_strings]
            for word in message.split(': ', 1)[1].split():
                if not word.startswith('--'):
                    continue
                name = word.split('=')[0]
                hint = hint_model_argument(name, self._model) or did_you_mean(name, known)
                if hint:
                    message += f'.{hint}'
                    break
        super().error(message)

    def refuse(self, advice: Mapping[str, str]) -> None:
        """Add options that end the program, with the sentence that says what to use instead."""
        for name, why in advice.items():
            self.add_argument(
                name, action=_Refuse, nargs='*', const=why, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _ShortHelp(argparse.Action):
    def __init__(self, option_strings: Any, dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None):
        assert isinstance(parser, OptionParser)
        print(parser.format_common_help(), end='')
        parser.exit()


class _Refuse(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None):
        parser.error(f'{option_string} is not supported. {self.const}')
