"""Create models, loaders and optimizers from options, with timm's factories."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import parse_model_name, resolve_model_input_args
from timm.optim import (
    create_optimizer_v2,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.utils import unwrap_model
from torch import nn

from ..data import (
    DEMO_ARGS,
    DEMO_DATASET,
    MultiViewLoader,
    TrainLoader,
    WorkerInit,
    class_to_idx,
    collate_views,
    create_dataset,
    create_multi_view_transform,
    create_train_loader,
    format_demo_note,
    model_class_to_idx,
    read_demo_note,
    worker_context,
)
from ..models.builder import check_model_name, check_timm_weights, load_checkpoint
from ..models.dynamic_net import DynamicNet
from ..task.classification import mixes
from ..utils import seeded
from .classes import check_classes, match_dataset

_logger = logging.getLogger(__name__)


def uses_demo_data(args: argparse.Namespace) -> bool:
    """Whether the options name the embedded demo set, or no data."""
    return args.dataset == DEMO_DATASET or not (
        args.dataset or args.data_dir or args.data or getattr(args, 'file_list', None))


def default_split(args: argparse.Namespace) -> str:
    """Split to evaluate on: 'test' of the demo set; 'validation', timm's default, of other data."""
    return 'test' if uses_demo_data(args) else 'validation'


def demo_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the demo set that the options give."""
    given = {key: getattr(args, f'demo_{key}', None) for key in DEMO_ARGS}
    return {key: value for key, value in given.items() if value is not None}


def model_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Dtype of weights and images; None for float32."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def build_model(args: argparse.Namespace, needs_data: bool = True, **kwargs: Any) -> Any:
    """Create the model of the options, on the CPU.

    Args:
        args: Options of train.py or validate.py.
        needs_data: The model will see images. Without data in the options, these are the ten classes of the demo set.
        **kwargs: Further arguments of `timm.create_model`. Values of None are ignored.

    Raises:
        ValueError: There is no such model, or it does not accept an argument.
    """
    check_model_name(args.model)
    if args.fast_norm:
        set_fast_norm()
    num_classes = args.num_classes
    if num_classes is None and needs_data and uses_demo_data(args) and parse_model_name(args.model)[0] is None:
        num_classes = 10
    resolved = resolve_model_input_args(
        args.model,
        args={k: getattr(args, k) for k in ('in_chans', 'img_size', 'input_size')},
        num_classes=num_classes,
        global_pool=args.gp,
        **{**args.model_kwargs, **{k: v for k, v in kwargs.items() if v is not None}},
    )
    if kwargs.get('pretrained'):
        check_timm_weights(args.model)
    try:
        model = timm.create_model(**resolved)
    except TypeError as e:
        if 'unexpected keyword argument' not in str(e):
            raise
        raise ValueError(
            f"'{args.model}' does not accept an argument: {e}. Set arguments of the networks inside a dynamic model "
            'with --model-kwargs backbone_args=...') from e
    size = args.img_size or (tuple(args.input_size[1:]) if args.input_size else None)
    if isinstance(model, DynamicNet) and size:
        model.set_input_size(size)
    return model


def build_training_model(args: argparse.Namespace) -> Any:
    """Create the model to train with its initial weights, on the CPU."""
    with seeded(args.seed, 'model'):
        model = build_model(
            args,
            pretrained=args.pretrained,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
            drop_block_rate=args.drop_block,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
        )
    if args.pretrained_path:
        load_checkpoint(model, args.pretrained_path, adapt=True, reset_head=True)
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    if args.head_init_scale is not None or args.head_init_bias is not None:
        heads = model.get_classifier()
        with torch.no_grad():
            for head in heads if isinstance(heads, tuple) else (heads,):
                if args.head_init_scale is not None:
                    head.weight.mul_(args.head_init_scale)
                    head.bias.mul_(args.head_init_scale)
                if args.head_init_bias is not None:
                    head.bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def place_model(model: Any, args: argparse.Namespace, device: torch.device, num_processes: int = 1) -> Any:
    """Convert the model's norms, and move it to the device, dtype and memory format of the options."""
    if args.split_bn:
        if args.aug_splits < 2 and not args.resplit:
            raise ValueError('--split-bn needs --aug-splits of at least 2, or --resplit.')
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and num_processes > 1:
        if args.split_bn:
            raise ValueError('--sync-bn cannot be combined with --split-bn.')
        model = convert_sync_batchnorm(model)
    return model


def open_dataset(
        args: argparse.Namespace,
        split: str,
        data_config: dict[str, Any],
        training: bool,
        samples: int | None,
        labelled: bool = True,
) -> Any:
    """Open the dataset of the options: see `create_dataset`."""
    name, root = args.dataset, args.data_dir or args.data
    if uses_demo_data(args):
        name = DEMO_DATASET
    return create_dataset(
        name,
        root=root,
        split=split,
        labelled=labelled,
        is_training=training,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        repeats=getattr(args, 'epoch_repeats', 0) if training else 0,
        input_img_mode=image_mode(args, data_config),
        input_key=args.input_key,
        target_key=args.target_key,
        num_samples=samples,
        trust_remote_code=args.dataset_trust_remote_code,
        **{'img_size': data_config['input_size'][-1], **read_demo_note(data_config.get('notes'))},
    )


def image_mode(args: argparse.Namespace, data_config: Mapping[str, Any]) -> str:
    return args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')


def build_train_loader(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        num_classes: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
) -> tuple[TrainLoader, Mixup | None]:
    """Create the training loader, and the mixup to apply to its batches if the loader does not do that."""
    dataset = open_dataset(args, args.train_split, data_config, True, args.train_num_samples)
    check_classes(dataset, num_classes, 'training')
    match_dataset(args, dataset, data_config, num_classes, 'training', training=True)
    names = class_to_idx(dataset)
    if args.aug_splits == 1 or args.aug_splits < 0:
        raise ValueError(f'--aug-splits must be 0 or at least 2, got {args.aug_splits}.')
    if args.aug_repeats and world_size == 1:
        raise ValueError('--aug-repeats needs several processes, got one.')
    if args.jsd_loss and args.aug_splits < 2:
        raise ValueError(f'--jsd-loss needs --aug-splits of at least 2, got {args.aug_splits}.')
    if args.aug_splits and args.no_prefetcher:
        raise ValueError('--aug-splits cannot be combined with --no-prefetcher.')

    prefetch = not args.no_prefetcher
    collate_fn = mixup_fn = None
    if mixes(args):
        if args.aug_splits:
            raise ValueError('--mixup and --cutmix cannot be combined with --aug-splits.')
        odd = [n for n in args.train_batch_sizes or [args.batch_size] if n % 2]
        if odd:
            raise ValueError(f'--mixup and --cutmix need an even batch size, got {odd[0]}.')
        mixup_args: dict[str, Any] = dict(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=num_classes)
        if prefetch:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)

    sizes, batches = args.train_img_sizes, args.train_batches_per_epoch
    if batches and not sizes:  # timm's scheduled batches with one image size
        sizes = [data_config['input_size'][-2:]]
    interpolation = args.train_interpolation
    loader = create_train_loader(
        dataset,
        data_config['input_size'],
        args.batch_size,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
        mixup_off_epoch=args.mixup_off_epoch,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=data_config['interpolation'] if args.no_aug or not interpolation else interpolation,
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        collate_fn=collate_fn,
        pin_memory=args.pin_mem,
        img_dtype=model_dtype(args) or torch.float32,
        device=device,
        use_prefetcher=prefetch,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        input_size_choices=sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=batches,
    )
    if not len(loader):
        raise ValueError(
            f'The training data has {len(loader.dataset)} images, fewer than one batch ({args.batch_size} x '
            f'{world_size} processes). Use a smaller --batch-size.')
    loader.class_to_idx = names
    return loader, mixup_fn


def build_eval_loader(
        args: argparse.Namespace,
        split: str,
        data_config: dict[str, Any],
        num_classes: int,
        device: torch.device,
        world_size: int = 1,
        samples: int | None = None,
        batch_size: int | None = None,
        views: Sequence[Mapping[str, Any]] | None = None,
        indices: Sequence[int] | None = None,
        random_samples: int | None = None,
        **kwargs: Any,
) -> Any:
    """Create a loader for evaluation.

    Args:
        args: Options of train.py or validate.py.
        split: Split of the dataset.
        data_config: Preprocessing and the model's classes, see `resolve_data`.
        num_classes: Number of classes of the model.
        device: Device of the images.
        world_size: Number of processes. Each process loads a share of the images.
        samples: Number of samples, for iterable datasets.
        batch_size: Batch size per process (default: that of the options).
        views: Preprocessing for each member of a cascade, see `eval_views`. The loader then yields tuples of images.
        indices: Load only these images, in this order.
        random_samples: Load only this number of random images. Not for iterable datasets, see `samples`.
        **kwargs: Further arguments of timm's `create_loader`.

    Raises:
        ValueError: The dataset has more classes than the model, or some that the model does not have, or fewer random
            images than processes are requested.
    """
    dataset = open_dataset(args, split, data_config, False, samples)
    check_classes(dataset, num_classes, f"'{split}'")
    match_dataset(args, dataset, data_config, num_classes, f"'{split}'")
    workers, whole = args.workers, dataset
    if random_samples is not None and not isinstance(dataset, torch.utils.data.IterableDataset):
        if random_samples < world_size:
            raise ValueError(f'Expected at least one image for each of {world_size} processes, got {random_samples}.')
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(args.seed))
        indices = order[:random_samples].sort().values.tolist()
    if indices is not None:
        dataset = torch.utils.data.Subset(dataset, indices)
    if world_size > 1 and isinstance(dataset, torch.utils.data.IterableDataset):
        workers = min(2, workers)  # as in timm: fewer workers need less padding
    size = batch_size or getattr(args, 'validation_batch_size', None) or args.batch_size
    loader = create_eval_loader(
        args, dataset, data_config, size, workers, device, world_size, views, distributed=world_size > 1, **kwargs)
    if views is not None:
        whole.transform = create_multi_view_transform(views, normalise=args.no_prefetcher)
        loader = MultiViewLoader(loader, views, device, model_dtype(args) or torch.float32)
    elif indices is not None:
        whole.transform = dataset.transform
    loader.class_to_idx, loader.views = class_to_idx(whole), views
    return loader


def create_eval_loader(
        args: argparse.Namespace,
        dataset: Any,
        data_config: Mapping[str, Any],
        batch_size: int,
        workers: int,
        device: torch.device,
        world_size: int,
        views: Sequence[Mapping[str, Any]] | None,
        **kwargs: Any,
) -> Any:
    """Create timm's loader for evaluation, with workers that end with their process: see `build_eval_loader`."""
    loader = create_loader(
        dataset,
        data_config['input_size'],
        batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype(args) or torch.float32,
        device=device,
        use_prefetcher=not args.no_prefetcher and views is None,
        collate_fn=None if views is None else collate_views,
        **kwargs,
    )
    inner = getattr(loader, 'loader', loader)
    inner.worker_init_fn = WorkerInit(inner.worker_init_fn)
    if inner.num_workers:
        inner.multiprocessing_context = worker_context(world_size)
    return loader


def resolve_learning_rate(args: argparse.Namespace, global_batch_size: int, stage: str) -> float:
    """Return `--lr`, or `--lr-base` scaled with the global batch size as in timm. Scaling is logged for the stage."""
    if args.lr:
        return args.lr
    ratio = global_batch_size / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    if ratio != 1:
        _logger.info(
            f'{stage}: learning rate {lr:.4g}, scaled ({scale}) from --lr-base {args.lr_base:g} for batches of '
            f'{args.lr_base_size} images to batches of {global_batch_size}')
    return lr


def build_optimizer(module: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Create timm's optimizer for the trained parameters of a module.

    Raises:
        ValueError: The optimizer does not accept an argument of `--opt-kwargs`.
    """
    kwargs = {**optimizer_kwargs(cfg=args), **args.opt_kwargs}
    if args.classifier_lr_scale != 1:
        kwargs['param_group_fn'] = partial(_separate_classifier, args=args, kwargs=dict(kwargs))
    try:
        return create_optimizer_v2(module, **kwargs)
    except TypeError as e:
        if 'unexpected keyword argument' not in str(e):
            raise
        raise ValueError(f'--opt {args.opt} does not accept these --opt-kwargs: {e}') from e


def _separate_classifier(module: Any, args: argparse.Namespace, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """timm's parameter groups, with separate groups for the classifier, which has another learning rate."""
    common: dict[str, Any] = dict(
        weight_decay=args.weight_decay,
        no_weight_decay_list=getattr(module, 'no_weight_decay', set)(),
        weight_decay_exclude_1d=kwargs.get('filter_bias_and_bn', True))
    if args.layer_decay is not None:
        groups = param_groups_layer_decay(
            module, layer_decay=args.layer_decay, min_scale=args.layer_decay_min_scale,
            no_opt_scale=args.layer_decay_no_opt_scale, **common)
    else:
        groups = param_groups_weight_decay(module, **common)
    if hasattr(module, 'classifier_parameters'):
        parameters = module.classifier_parameters()
    else:
        classifier = module.get_classifier()
        parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        parameters = [p for part in parts for p in part.parameters()]
    of_classifier = {id(p) for p in parameters}
    out = []
    for group in groups:
        rest = [p for p in group['params'] if id(p) not in of_classifier]
        heads = [p for p in group['params'] if id(p) in of_classifier]
        out += [{**group, 'params': rest}] if rest else []
        out += [{**group, 'params': heads, 'lr': args.lr * args.classifier_lr_scale}] if heads else []
    return out


def eval_views(args: argparse.Namespace, model: Any) -> list[dict[str, Any]] | None:
    """Preprocessing for each member of a cascade, changed by the options; None for other models."""
    views = getattr(unwrap_model(model), 'view_configs', None)
    if views is None:
        return None
    names = ('crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    given = {k: getattr(args, k) for k in names if getattr(args, k, None)}
    return [{**view, **given} for view in views]


def resolve_data(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Preprocessing of images, from the options and the model.

    Returns:
        What timm's `resolve_data_config` returns, and 'class_to_idx', the index of each class name of the model, or
        None if they are not known. On the demo set also 'notes' for the pretrained_cfg of the model: the settings of
        the set that were given here, or when the model was trained.

    Raises:
        ValueError: `--mean` or `--std` has neither one value nor one for each channel.
    """
    try:
        config = resolve_data_config(
            vars(args), model=model, use_test_size=not getattr(args, 'use_train_size', True))
    except AssertionError as e:
        raise ValueError(
            f'--mean and --std: expected one value, or one for each channel, got {args.mean} and {args.std}.') from e
    channels = config['input_size'][0]
    for key in ('mean', 'std'):
        if len(config[key]) != channels:  # e.g. grey images: the mean over the colour channels, as in timm
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    plain: Any = unwrap_model(model)
    cfg = getattr(plain, 'pretrained_cfg', {})
    members = getattr(plain, 'specs', ())  # of a cascade
    labels = [labels for labels in (cfg.get('label_names'), *(m.label_names for m in members)) if labels]
    config['class_to_idx'] = model_class_to_idx(labels[0] if labels else None, getattr(plain, 'num_classes', 0))
    notes = cfg.get('notes') or ()
    config['notes'] = [note for note in notes if not str(note).startswith(DEMO_DATASET)]
    if uses_demo_data(args):
        settings = {**read_demo_note(notes), **demo_settings(args)}
        config['notes'] += [format_demo_note(settings)] if settings else []
    return config
