"""What the tests of the options of train.py and validate.py share: names, checks, tiny data and weights."""
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState

from timm_dynamic.launch import accelerator
from timm_dynamic.utils import save_pretrained


def timm_options(script: str) -> list[str]:
    """Names of the options of timm's script; several spellings of one are separated by spaces."""
    text = (Path(__file__).parent / 'training' / 'timm_options.txt').read_text(encoding='utf-8')
    return text.partition(f'[{script}]\n')[2].partition('\n\n')[0].splitlines()


def spellings(table: Iterable[str]) -> list[Any]:
    """Parameters (name, spelling) for a test that is run for every spelling of every option."""
    return [pytest.param(name, flag, id=flag) for name in table for flag in name.split()]


def named(parser: Any) -> set[str]:
    """All that a parser accepts, refused options included."""
    return {s for a in parser._actions for s in a.option_strings or [a.dest]} - {'-h', '--help', '--help-all'}


def effect(start: str, probe: Callable, *value: str, gives: Any, base: Iterable = (), drop: Iterable = ()):
    """Make a check: what `probe` sees with the option is as it should be, and is not without it.

    Args:
        start: Method of the lab that takes options and gives what is probed.
        probe: Looks at it.
        *value: Of the option.
        gives: What the probe sees with the option, or a function that says whether it is right.
        base: Options that are needed beside.
        drop: Options of the lab's own to be left out.
    """
    def right(seen: Any) -> bool:
        return bool(gives(seen) if callable(gives) else seen == gives)

    def check(lab: Any, flag: str) -> None:
        option = [flag] if flag.startswith('-') else []
        seen = probe(getattr(lab, start)(*base, *option, *value, drop=drop))
        assert right(seen), seen
        without = probe(getattr(lab, start)(*base, drop=drop))
        assert not right(without), f'so it is without {flag}, too: {without}'

    return check


def refused(*advice: str):
    """Make a check: the option is an error that names what replaces it."""
    def check(lab: Any, flag: str) -> None:
        for given in ([flag], [flag, 'value'], [f'{flag}=value']):
            with pytest.raises(SystemExit, match='2'):
                lab.parser.parse_args(given)
            message = lab.capsys.readouterr().err
            assert f'{flag} is not supported.' in message
            assert all(text in message for text in advice), message

    return check


def has(text: str) -> Callable[[Any], bool]:
    return lambda seen: text in str(seen)


def fresh_accelerate() -> None:
    """Forget Accelerate's state, which is one per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator_kwargs(monkeypatch: Any, args: Any) -> dict[str, Any]:
    """What reaches Accelerate where there is a GPU."""
    kwargs: dict[str, Any] = {}

    class Recorder:
        num_processes, device = 1, torch.device('cpu')

        def __init__(self, **given: Any) -> None:
            kwargs.update(given)

    with monkeypatch.context() as m:
        m.setattr(accelerator, 'Accelerator', Recorder)
        m.setattr(torch.accelerator, 'current_accelerator', lambda **_: torch.device('cuda'))
        accelerator.create_accelerator(args)
    return kwargs


def make_weights(folder: Path, value: float = 0.25, **kwargs: Any) -> Path:
    """Export a `test_resnet` for three classes that can be recognised by `marks`."""
    model: Any = timm.create_model('test_resnet', num_classes=3, **kwargs)
    with torch.no_grad():
        model.conv1[0].weight.fill_(value)
        model.fc.bias.fill_(value)
    save_pretrained(model, folder)
    return folder


def make_dynamic(folder: Path, kept: bool = False) -> Path:
    """Export a GFNet of three steps for three classes, at will with one budget that it keeps."""
    torch.manual_seed(0)
    model: Any = timm.create_model('test_gfnet', num_classes=3, img_size=32, patch_size=16)
    with torch.no_grad():
        model.classifier.heads['rnn'].weight.mul_(30)  # images differ in confidence
    if kept:
        model.store_budgets([{'gmacs': model.step_macs[2] / 1e9, 'policy': [2., 2., 0.], 'evaluated': {'top1': 77}}])
    save_pretrained(model, folder)
    return folder


def make_cascade(folder: Path) -> Path:
    """Export a cascade for three classes, whose members disagree."""
    torch.manual_seed(0)
    model: Any = timm.create_model('test_clcnet', num_classes=3, img_size=32)
    with torch.no_grad():
        for net in model.members:
            net.fc.weight.mul_(300)
    save_pretrained(model, folder)
    return folder


def marks(model: Any) -> tuple[float, float]:
    """First convolution's and classifier's mark; (0.25, 0.25) of `make_weights`."""
    return tuple(round(p.mean().item(), 6) for p in (model.conv1[0].weight, model.fc.bias))
