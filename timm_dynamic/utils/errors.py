"""Errors that scripts show as one line."""
import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix: scripts print the message without a traceback."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Suggest up to three names close to a mistyped one: ' Did you mean A or B?'; '' if none is close."""
    near = difflib.get_close_matches(name, list(candidates), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ''
