"""Weights on the Hugging Face Hub: catalog, conversion, model cards, publication and checks."""
from .card import render_card, write_card
from .catalog import Entry, find_entry, read_catalog
from .check import check_in_fresh_process, fixed_logits
from .commands import convert_main, publish_main
from .convert import convert, describe, match_tensors, stage_bundled
from .publish import PublishError, check_login, check_permission, files_to_publish, publish, verify_published
from .runs import describe_run

__all__ = [
    'Entry',
    'PublishError',
    'check_in_fresh_process',
    'check_login',
    'check_permission',
    'convert',
    'convert_main',
    'describe',
    'describe_run',
    'files_to_publish',
    'find_entry',
    'fixed_logits',
    'match_tensors',
    'publish',
    'publish_main',
    'read_catalog',
    'render_card',
    'stage_bundled',
    'verify_published',
    'write_card',
]
