"""The parsers of the scripts: a short help, suggestions for unknown options, reasons for unsupported ones."""
import argparse
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ..models.builder import model_arguments
from ..utils import did_you_mean


def hint_model_argument(option: str, model: str) -> str:
    """Suggest --model-kwargs for an unknown option that is an argument of the model, e.g. --patch-size; else empty."""
    name = option.lstrip('-').replace('-', '_')
    return f' It is an argument of {model}: --model-kwargs {name}=...' if name in model_arguments(model) else ''


class StrictParser(argparse.ArgumentParser):
    """Parser that accepts no abbreviations. For an unknown option it suggests the nearest ones.

    Args:
        **kwargs: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{'allow_abbrev': False, **kwargs})

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments'):
            names = [word.split('=')[0] for word in message.split(': ', 1)[1].split() if word.startswith('--')]
            message += next((f'.{hint}' for name in names if (hint := self.hint(name))), '')
        super().error(message)

    def hint(self, option: str) -> str:
        """Suggestion for an unknown option; empty if there is none."""
        return did_you_mean(option, self._known_options())

    def _known_options(self) -> list[str]:
        """All options, also those of sub-commands, whose unknown options are the error of the parser above them."""
        commands = [parser for action in self._actions if isinstance(action, argparse._SubParsersAction)
                    for parser in action.choices.values()]
        return [s for parser in (self, *commands) for action in parser._actions for s in action.option_strings]


class OptionParser(StrictParser):
    """Parser of a script. `--help` shows the common options, `--help-all` all of them.

    Args:
        common: Names of the options that `--help` shows, as attributes, e.g. 'batch_size'.
        **kwargs: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, common: Collection[str], **kwargs: Any) -> None:
        super().__init__(
            usage='%(prog)s [options]', add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs)
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

    def hint(self, option: str) -> str:
        return hint_model_argument(option, self._model) or super().hint(option)

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
