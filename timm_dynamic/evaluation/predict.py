"""predict.py: the classes of all images of a folder, tar file or data set, as a table."""
import argparse
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import apply_test_time_pool
from tqdm import tqdm

from ..data import PredictionImages, PredictionStream
from ..data.image_names import image_names
from ..exits import ExitStream, early_exit
from ..exits.collect import move_images, predict_steps
from ..exits.stream import StreamResult
from ..launch.accelerator import create_accelerator
from ..launch.build import default_split, eval_views, model_dtype, resolve_data, uses_demo_data
from ..launch.images import build_image_loader, open_images
from ..launch.options import create_predict_parser
from ..launch.script import import_modules, run_script
from ..models.dynamic_net import DynamicNet
from ..models.macs import count_macs
from ..utils import UserError, hash_weights
from ..utils.report import format_table, write_rows
from .exit_report import short_name
from .pictures import class_names, look
from .prediction_results import EXTENSIONS, ResultTable, Shards, check_formats, write_predictions
from .requests import check_requests
from .step_predictions import describe_look
from .validate import open_model

_logger = logging.getLogger(__name__)

_MAX_SHARD = 4096
_SHOWN = 5  # rows, and unreadable images, in the log
# Options that the rows of shards do not depend on: they may change when a prediction is continued.
_FREE = {
    'device_modules', 'workers', 'pin_mem', 'log_freq', 'results_dir', 'results_file', 'results_format',
    'results_separate_col', 'fullname', 'filename_col', 'index_col', 'label_col', 'output_col', 'label_type',
    'include_index', 'exclude_output', 'no_console_results'}


class Predictor:
    """Runs a model on batches of images: a dynamic model as an `ExitStream`, a static one as a single step.

    Args:
        model: The model, with its weights and its exit policy, on the CPU.
        args: Options of predict.py.
        accelerator: Device and precision.

    Attributes:
        config: The model's pretrained_cfg.
        data_config: Preprocessing of images.
        views: Preprocessing for each member of a cascade; None for other models.
        step_gmacs: Cost of an image that stops after each step [T]; None where it cannot be counted.
    """

    def __init__(self, model: Any, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator, self.num_classes = args, accelerator, model.num_classes
        self.config: Mapping[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
        self.data_config = resolve_data(args, model)
        self.views = eval_views(args, model)
        if args.test_pool:
            model, pooled = apply_test_time_pool(model, self.data_config)
            if pooled:
                self.data_config['crop_pct'] = 1.0
        dynamic = isinstance(model, DynamicNet)
        macs = model.step_macs if dynamic else (count_macs(model, self.data_config['input_size']),)
        self.step_gmacs = [value and value / 1e9 for value in macs]
        self.layout = torch.channels_last if args.channels_last else torch.preserve_format
        model = model.eval().to(device=accelerator.device, dtype=model_dtype(args))
        self.model = model.to(memory_format=torch.channels_last) if args.channels_last else model
        how: dict[str, Any] = dict(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.torchcompile and dynamic:
            self.model.compile_steps(**how)
        elif args.torchcompile:
            self.model = torch.compile(self.model, **how)
        self.name_of = class_names(model)
        self.policy: Any = None
        self.stream: ExitStream | None = None
        if dynamic:
            all_steps = [math.inf] * model.num_steps
            self.policy = all_steps if model.exit_policy is None else model.exit_policy
            self.stream = ExitStream(self.model, self.policy, args.batch_size)

    def run(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[StreamResult]:
        """Predict for batches (images, keys). The keys are the targets of the results, which come in the same order."""
        moved = self._move(batches)
        if self.stream is not None:
            yield from self.stream.run(moved)
            return
        for x, keys in moved:
            outputs = {name: value[0] for name, value in predict_steps(self.model, x).items()}
            steps = torch.ones(len(outputs['logits']), dtype=torch.int64)
            result = StreamResult(outputs['logits'], steps, outputs['confidence'])
            result.target = keys
            yield result

    def run_all_steps(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[StreamResult, list[Any]]]:
        """As `run`, and the 'steps' of `describe_look` for each image. All steps are run for that."""
        for x, keys in self._move(batches):
            result = StreamResult(*early_exit(self.model, x, self.policy))
            result.target = keys
            yield result, [describe_look(seen, self.name_of)['steps'] for seen in look(self.model, x)]

    def _move(self, batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for x, keys in batches:
            yield move_images(x, self.accelerator.device, model_dtype(self.args), self.layout), keys


def _set_exit(args: argparse.Namespace, model: Any) -> None:
    """Set the exits that the options ask for."""
    option = '--budget' if args.budget is not None else '--thresholds' if args.thresholds is not None else ''
    if not isinstance(model, DynamicNet):
        option = option or ('--per-step' if args.per_step else '')
        if option:
            raise ValueError(
                f"{option}: '{args.model}' ({type(model).__name__}) makes one prediction and cannot exit early.")
        return
    if args.per_step and not hasattr(model, 'patch_size'):
        raise ValueError(
            f"--per-step: '{args.model}' ({type(model).__name__}) does not choose where to look. Expected a GFNet or "
            'an AnchorNet-patch.')
    if args.test_pool:
        raise ValueError(f"--test-pool changes how a static model pools; '{args.model}' is a dynamic one.")
    requests = argparse.Namespace(
        budget=None if args.budget is None else [args.budget], thresholds=args.thresholds and [args.thresholds])
    check_requests(requests, model.step_macs, f"'{args.model}'")
    if option == '--budget':
        model.set_budget(args.budget)
    elif option:
        model.set_exit(args.thresholds)


def _plain_name(model: str) -> str:
    return re.sub(r'[^\w.-]+', '_', short_name(model))


def _results_path(args: argparse.Namespace, side: int) -> tuple[Path, list[str]]:
    """Path of the results without extension, and their formats."""
    path = Path(args.results_dir or '', args.results_file or f'{_plain_name(args.model)}-{side}')
    formats = args.results_format
    if path.suffix in EXTENSIONS.values() and args.results_file:
        formats = formats or [next(fmt for fmt, extension in EXTENSIONS.items() if extension == path.suffix)]
        path = path.with_suffix('')
    formats = formats or ['csv']
    check_formats(formats)
    return path, formats


def _describe_request(
        args: argparse.Namespace, model: Any, names: Sequence[str] | None, shard_size: int,
) -> dict[str, Any]:
    """What the rows depend on."""
    options = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in _FREE}
    return {
        **options, '--shard-size': shard_size, 'weights': hash_weights(model.state_dict()),
        'exit policy': getattr(model, 'exit_cfg', {}).get('exit'), 'number of images': names and len(names),
        'image names': names and hashlib.sha256('\n'.join(names).encode()).hexdigest()}


def _predict_shards(
        predictor: Predictor,
        loader: Any,
        shards: Shards,
        numbers: Iterable[int],
        shard_size: int,
        total: int | None,
) -> int:
    """Predict the images of a loader, shard by shard: each is a stream of its own, so its rows depend on nothing else.

    Returns:
        Number of images.
    """
    args, accelerator = predictor.args, predictor.accelerator
    batches, done, cost = iter(loader), 0, 0.
    hidden = None if accelerator.is_main_process else True  # None: shown in a terminal only
    with tqdm(total=total, unit='img', disable=hidden, leave=False) as bar:
        for number in numbers:
            rows: list[Any] = []
            errors: list[Any] = []
            # The images of a shard come from the loader as whole batches, or are the last ones.
            of_shard = islice(batches, shard_size // args.batch_size)
            results = predictor.run_all_steps(of_shard) if args.per_step else \
                ((result, None) for result in predictor.run(of_shard))
            for i, (result, steps) in enumerate(results):
                outputs = result.logits.float().softmax(dim=1) if args.output_type == 'prob' else result.logits.float()
                classes: list[list[int]] = [[]] * len(outputs)
                if args.topk:
                    outputs, top = outputs.topk(min(args.topk, outputs.shape[1]), dim=1)
                    classes = top.tolist()
                columns = [outputs.tolist(), result.steps_used.tolist(), result.confidence.tolist()]
                columns += [] if steps is None else [steps]
                for key, *row in zip(result.target, classes, *columns):
                    if key.error is not None:
                        errors.append([(key.number, key.name), key.error])
                        continue
                    rows.append([(key.number, key.name), *row])
                    cost += predictor.step_gmacs[row[2] - 1] or 0.
                done += len(outputs)
                bar.update(len(outputs))
                if i % args.log_freq == 0:
                    bar.set_postfix(gmacs=f'{cost / max(done, 1):.4g}', refresh=False)
            if not rows and not errors:
                break
            shards.write(number, rows, errors)
    return done


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_predict_parser()
    args = parser.parse_args(argv)
    args.split = args.split or default_split(args)
    if args.budget is not None and args.thresholds is not None:
        parser.error('--budget and --thresholds both set the exits: choose one.')
    if args.topk < 0:
        parser.error(f'--topk: expected a number of classes, or 0 for all, got {args.topk}.')
    if args.exclude_output and not args.topk:
        parser.error('--exclude-output leaves nothing of --topk 0.')
    for option, value in (('--batch-size', args.batch_size), ('--shard-size', args.shard_size)):
        if value is not None and value < 1:
            parser.error(f'{option}: expected at least 1, got {value}.')
    if args.file_list and args.dataset:
        parser.error(f'--file-list and --dataset {args.dataset} both name the images: choose one.')
    return args


def _take_share(
        images: PredictionImages | PredictionStream,
        shard_size: int,
        finished: set[int],
        rank: int,
        world_size: int,
) -> tuple[Iterable[int], int | None]:
    """Limit the images to those of one process.

    Returns:
        Numbers of the shards to make, and their number of images if it is known.
    """
    if isinstance(images, PredictionStream):
        first = next(number for number in count() if number not in finished)
        images.start = first * shard_size
        return count(first), None
    size = len(images)
    left = [number for number in range(math.ceil(size / shard_size)) if number not in finished]
    numbers = left[rank::world_size]
    images.indices = [
        i for number in numbers for i in range(number * shard_size, min((number + 1) * shard_size, size))]
    return numbers, len(images)


def _write_results(args: argparse.Namespace, table: ResultTable, path: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Write the results, and the list of the images that cannot be read.

    Returns:
        The summary, see `run_prediction`.
    """
    files = [Path(f'{path}{EXTENSIONS[fmt]}') for fmt in formats]
    for file, fmt in zip(files, formats):
        whole = table.shards.folder / f'results{file.suffix}'  # what a killed process leaves is removed with the shards
        write_predictions(whole, fmt, table.columns, table)
        os.replace(whole, file)
    errors, unreadable = table.errors(), Path(f'{path}-unreadable.csv')
    unreadable.unlink(missing_ok=True)
    if errors:
        write_rows(unreadable, errors)
        first = '\n'.join(f"  {row['file']}: {row['reason']}" for row in errors[:_SHOWN])
        _logger.warning(f"{len(errors)} images cannot be read, see '{unreadable}'. The first of them:\n{first}")
    if not args.no_console_results:
        shown = list(islice(table, _SHOWN))
        _logger.info(f'First {len(shown)} rows:\n{format_table(shown)}' if shown else 'There are no rows.')
    _logger.info(f"Results: {', '.join(map(str, files))}")
    return {**table.summary(), 'unreadable': len(errors)}


def run_prediction(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run predict.py.

    Args:
        argv: Command line without the script's name (default: this process's).

    Returns:
        The summary: 'model', 'images', 'gmacs' and 'exit_shares' of the results, 'unreadable', the number of images
        that cannot be read, and 'images_per_sec' of this run. In processes other than the main one it is empty.
    """
    args = _parse(argv)
    import_modules(args.device_modules)
    accelerator = create_accelerator(args)
    if not accelerator.is_main_process:
        logging.getLogger('timm_dynamic').setLevel(logging.WARNING)
    elif uses_demo_data(args):
        _logger.info(f"No data given: split '{args.split}' of the embedded demo set cluttered_digits is used.")
    model = open_model(args, args.checkpoint)
    _set_exit(args, model)
    predictor = Predictor(model, args, accelerator)
    path, formats = _results_path(args, predictor.data_config['input_size'][-1])
    images = open_images(args, predictor.data_config)
    names = image_names(images.dataset, args.split) if isinstance(images, PredictionImages) else None
    world_size = accelerator.num_processes
    if names is None and world_size > 1:
        raise ValueError(f'--dataset {args.dataset} is read in its own order: use one process, got {world_size}.')

    # Shards do not depend on the number of processes: any number may continue.
    shard_size = args.shard_size or min(_MAX_SHARD, len(names) // 32 + 1 if names else _MAX_SHARD)
    shard_size = math.ceil(shard_size / args.batch_size) * args.batch_size
    shards = Shards(path.with_name(f'{path.name}.shards'), _describe_request(args, model, names, shard_size))
    table = ResultTable(args, shards, names, predictor.config, predictor.num_classes, predictor.step_gmacs)
    if 'json' in formats:
        table.check_unique_names()
    finished = shards.finished()
    if finished and accelerator.is_main_process:
        _logger.info(f"Continuing: {len(finished)} shards of '{shards.folder}' are finished.")
    accelerator.wait_for_everyone()  # all have seen the same shards
    if accelerator.is_main_process:
        shards.start()
    accelerator.wait_for_everyone()
    numbers, total = _take_share(images, shard_size, finished, accelerator.process_index, world_size)
    loader = build_image_loader(
        args, images, predictor.data_config, accelerator.device, world_size, predictor.views)
    began = time.perf_counter()
    with torch.no_grad(), accelerator.autocast():
        done = _predict_shards(predictor, loader, shards, numbers, shard_size, total)
    done = int(accelerator.reduce(torch.tensor(done, device=accelerator.device), 'sum'))  # waits for all processes
    seconds = time.perf_counter() - began
    if not accelerator.is_main_process:
        return {}

    table.numbers = sorted(shards.finished())
    if not table.numbers:
        raise UserError(
            f"There are no images in '{args.dataset or args.data_dir}', or none that timm's reader gives: in wds/, it "
            'skips samples without a label (.cls).')
    if names is not None and len(table.numbers) < math.ceil(len(names) / shard_size):
        raise UserError(
            f"'{shards.folder}' holds {len(table.numbers)} of {math.ceil(len(names) / shard_size)} shards: all "
            'processes must write to the same folder.')
    summary = {'model': short_name(args.model), **_write_results(args, table, path, formats)}
    summary['images_per_sec'] = round(done / seconds, 1)
    shards.remove()
    _logger.info(f'\n{format_table([summary])}')
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of predict.py.

    Returns:
        Exit status: 0, or 1 for an error that the user can act on.
    """
    def script() -> int:
        try:
            run_prediction(argv)
        except KeyboardInterrupt:
            raise UserError('Interrupted. The same command continues with the shards that are finished.') from None
        return 0

    return run_script(script)
