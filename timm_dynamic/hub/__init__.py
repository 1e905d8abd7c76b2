"""Weights on the Hugging Face Hub: what is published, how it is converted, described, published and checked."""
from .card import render_card, write_card
from .catalog import Entry, find_entry, read_catalog
from .check import check_in_fresh_process, fixed_logits
from .convert import account, convert, export, finish

__all__ = [
    'Entry',
    'account',
    'check_in_fresh_process',
    'convert',
    'export',
    'find_entry',
    'finish',
    'fixed_logits',
    'read_catalog',
    'render_card',
    'write_card',
]
