from .checkpoint import CheckpointError, describe_mismatch, hash_weights, load_weights, read_checkpoint, read_state_dict
from .download import check_available, fetch_weights, is_transient
from .errors import UserError, did_you_mean
from .export import copy_pretrained, read_task_state, save_exit_cfg, save_pretrained
from .files import atomic_write, clean_partial_files, read_json, sha256_of, write_json
from .seeding import derive_seed, seeded

__all__ = [
    'CheckpointError',
    'UserError',
    'atomic_write',
    'check_available',
    'clean_partial_files',
    'copy_pretrained',
    'derive_seed',
    'describe_mismatch',
    'did_you_mean',
    'fetch_weights',
    'hash_weights',
    'is_transient',
    'load_weights',
    'read_checkpoint',
    'read_json',
    'read_state_dict',
    'read_task_state',
    'save_exit_cfg',
    'save_pretrained',
    'seeded',
    'sha256_of',
    'write_json',
]
