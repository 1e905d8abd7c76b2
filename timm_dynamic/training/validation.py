"""Whole validations: from a command line to a table of models."""
import argparse
import glob
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import RealLabelsImagenet, resolve_data_config
from timm.layers import apply_test_time_pool
from timm.models import is_model, list_pretrained
from timm.task import evaluation_sample_limit
from timm.utils import check_batch_size_retry, decay_batch_step, reparameterize_model
from torch import nn

from ..models._builder import checkpoint_filter_of
from ..utils import CheckpointError, load_weights, seeded
from .accelerator import create_accelerator
from .build import build_eval_loader, build_model, model_dtype, uses_demo_data
from .evaluate import evaluate
from .options import create_validate_parser
from .report import format_table, write_rows
from .run import run_script

_logger = logging.getLogger(__name__)


class _Predictions:
    """The best five classes of every sample, in the order of the dataset, over all processes."""

    def __init__(self, limit: int | None, accelerator: Accelerator) -> None:
        self.limit, self.accelerator = limit, accelerator
        self.top5: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []

    def add(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.top5.append(output.topk(min(5, output.shape[1]), dim=1).indices)
        self.target.append(target)

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather [N, 5] classes and [N] targets."""
        top5, target = torch.cat(self.top5)[:self.limit], torch.cat(self.target)[:self.limit]
        if self.accelerator.num_processes == 1:
            return top5, target
        # Process r has samples r, r + R, ...; all but the first few may have one less.
        both = torch.cat([top5, target[:, None]], dim=1)
        count = self.accelerator.reduce(torch.tensor([len(both)], device=both.device), 'sum')
        both = self.accelerator.gather(self.accelerator.pad_across_processes(both, dim=0))
        both = both.unflatten(0, (self.accelerator.num_processes, -1)).transpose(0, 1).flatten(0, 1)[:int(count)]
        return both[:, :-1], both[:, -1]


def _restricted(model: nn.Module, valid_labels: list[int] | None) -> Any:
    if valid_labels is None:
        return model
    index = torch.tensor(valid_labels)

    def restricted(x: torch.Tensor) -> torch.Tensor:
        return model(x)[:, index.to(x.device)]

    return restricted


def validate_model(args: argparse.Namespace, name: str, checkpoint: str, accelerator: Accelerator) -> dict[str, Any]:
    """Evaluate one model.

    Args:
        args: Options of validate.py.
        name: Model name, as `timm.create_model` takes it.
        checkpoint: File with its weights; empty for pretrained ones.
        accelerator: Processes, device, precision.

    Returns:
        A row of the table, with timm's column names.
    """
    args = argparse.Namespace(**{**vars(args), 'model': name})
    with seeded(args.seed, 'model'):  # a classifier that the weights do not fit has initial values
        model = build_model(args, pretrained=args.pretrained or not checkpoint)
    if checkpoint:
        filter_fn = checkpoint_filter_of(model.pretrained_cfg['architecture'])
        load_weights(model, checkpoint, filter_fn, use_ema=args.use_ema)
    if args.reparam:
        model = reparameterize_model(model)
    num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    pooled = False
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, data_config)
    params = sum(p.numel() for p in model.parameters())
    model = model.eval().to(device=accelerator.device, dtype=model_dtype(args))
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)

    valid_labels = None
    if args.valid_labels:
        valid_labels = [int(line) for line in Path(args.valid_labels).read_text(encoding='utf-8').split()]
        num_classes = max(len(valid_labels), 1)
    if pooled:
        data_config['crop_pct'] = 1.0
    loader = build_eval_loader(
        args, args.split, data_config, num_classes, accelerator.device, accelerator.num_processes,
        samples=args.num_samples, crop_border_pixels=args.crop_border_pixels, tf_preprocessing=args.tf_preprocessing)
    predictions = _Predictions(evaluation_sample_limit(loader), accelerator)
    metrics = evaluate(
        _restricted(model, valid_labels), loader, accelerator, channels_last=args.channels_last, desc=name,
        log_freq=args.log_freq, dtype=model_dtype(args),
        on_batch=predictions.add if args.real_labels or args.metrics_avg else None)

    if args.real_labels:
        dataset = loader.dataset
        real = RealLabelsImagenet(dataset.filenames(basename=True), real_json=args.real_labels)
        top5, _ = predictions.gather()
        ranks = torch.arange(top5.shape[1], 0, -1, dtype=torch.float32, device=top5.device)
        for part in top5.split(1024):  # scores that rank the classes as the model did
            scores = torch.zeros(len(part), 1000, device=part.device)
            real.add_result(scores.scatter_(1, part, ranks.expand(len(part), -1)))
        metrics['top1'], metrics['top5'] = real.get_accuracy(k=1), real.get_accuracy(k=5)
    row = {
        'model': name, 'top1': round(metrics['top1'], 4), 'top1_err': round(100 - metrics['top1'], 4),
        'top5': round(metrics['top5'], 4), 'top5_err': round(100 - metrics['top5'], 4),
        'loss': round(metrics['loss'], 5), 'images': metrics['count'], 'param_count': round(params / 1e6, 2),
        'img_size': data_config['input_size'][-1], 'crop_pct': data_config['crop_pct'],
        'interpolation': data_config['interpolation'],
    }
    if checkpoint:
        row['checkpoint'] = checkpoint
    if args.metrics_avg:
        from sklearn.metrics import precision_recall_fscore_support
        top5, target = predictions.gather()
        precision, recall, f1, _ = precision_recall_fscore_support(
            target.cpu().numpy(), top5[:, 0].cpu().numpy(), average=args.metrics_avg, zero_division=0)
        row.update(precision=round(100 * precision, 4), recall=round(100 * recall, 4), f1_score=round(100 * f1, 4))
    return row


def _with_retry(args: argparse.Namespace, name: str, checkpoint: str, accelerator: Accelerator) -> dict[str, Any]:
    batch_size = args.batch_size
    while True:
        try:
            smaller = argparse.Namespace(**{**vars(args), 'batch_size': batch_size})
            return validate_model(smaller, name, checkpoint, accelerator)
        except RuntimeError as e:
            if not args.retry or accelerator.num_processes > 1 or batch_size <= 1 or not check_batch_size_retry(str(e)):
                raise
            batch_size = decay_batch_step(batch_size)
            _logger.warning(f'{name}: {str(e).splitlines()[0]} - trying again with batch size {batch_size}.')


def _jobs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Model names and checkpoint files to evaluate."""
    name, checkpoint = args.model, args.checkpoint
    if checkpoint and Path(checkpoint).is_dir():
        folders = sorted(p.parent for p in Path(checkpoint).glob('**/config.json'))
        files = sorted(f for s in ('*.pth.tar', '*.pth', '*.safetensors') for f in glob.glob(f'{checkpoint}/{s}'))
        if not folders and not files:
            raise CheckpointError(f"--checkpoint: there are no weights in '{checkpoint}'.")
        if folders:
            yield from ((f'local-dir:{folder}', '') for folder in folders)
        else:
            yield from ((name, file) for file in files)
    elif checkpoint:
        yield name, checkpoint
    elif name == 'all':
        # The pretrained ones whose images are of ordinary size, as timm does
        skip = ['*_in21k', '*_in22k', '*in12k', '*_dino', '*fcmae']
        yield from ((n, '') for n in list_pretrained('*', exclude_filters=skip))
    elif name and not name.startswith(('local-dir:', 'hf-hub:')) and not is_model(name.split('.')[0]):
        if Path(name).is_file():
            yield from ((line, '') for line in Path(name).read_text(encoding='utf-8').split())
        else:
            names = list_pretrained(name) if '*' in name else []
            if not names:
                build_model(argparse.Namespace(**{**vars(args), 'model': name}))  # its error names the nearest
            yield from ((n, '') for n in names)
    elif name:
        yield name, ''


def run_validation(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run validate.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        One row a model, in the order in which they were evaluated.
    """
    parser = create_validate_parser()
    args = parser.parse_args(argv)
    if not args.model and not (args.checkpoint and Path(args.checkpoint).is_dir()):
        parser.error('--model is needed (a name, local-dir:FOLDER, a wildcard, all, or a text file of names).')
    accelerator = create_accelerator(args)
    if accelerator.is_main_process and uses_demo_data(args):
        _logger.info('No data given: the embedded demo set cluttered_digits is used.')
    if not accelerator.is_main_process:
        logging.getLogger('timm_dynamic').setLevel(logging.WARNING)
    rows: list[dict[str, Any]] = []
    jobs = [*_jobs(args), *((name, '') for name in args.compare)]
    for name, checkpoint in jobs:
        try:
            rows.append(_with_retry(args, name, checkpoint, accelerator))
        except (CheckpointError, RuntimeError) as e:
            if len(jobs) == 1 or accelerator.num_processes > 1:
                raise
            rows.append({'model': name, 'error': str(e).splitlines()[0]})  # the others' results are not lost
        if accelerator.is_main_process and args.results_file:  # after every model: a long list may be interrupted
            write_rows(args.results_file, rows, args.results_format)
    if accelerator.is_main_process:
        _logger.info('\n' + format_table(rows))
    accelerator.end_training()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of validate.py.

    Returns:
        Exit status: 0; 1 for what the user can mend, or if a model failed.
    """
    def script() -> int:
        return int(any('error' in row for row in run_validation(argv)))

    return run_script(script)
