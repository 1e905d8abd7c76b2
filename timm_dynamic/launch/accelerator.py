"""Processes, devices and precision, with Accelerate."""
import argparse
import importlib
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

_PRECISION = {'float16': 'fp16', 'bfloat16': 'bf16'}


def create_accelerator(args: argparse.Namespace, project_dir: str | None = None) -> Accelerator:
    """Create the Accelerator from the options and the settings of `accelerate launch` and `accelerate config`.

    Args:
        args: Options.
        project_dir: Folder for the trackers' logs.

    Raises:
        ValueError: The device does not exist, the precision is not available, or the processes are not connected.
    """
    for module in getattr(args, 'device_modules', None) or ():
        importlib.import_module(module)
    kind = args.device.partition(':')[0]
    available = torch.accelerator.current_accelerator(check_available=True)
    if kind not in ('cpu', 'cuda') and (available is None or available.type != kind):
        raise ValueError(f"--device {args.device}: there is no such device (found: {available or 'cpu'}).")
    cpu = kind == 'cpu' or available is None
    if not cpu and ':' in args.device:
        os.environ['ACCELERATE_TORCH_DEVICE'] = args.device
    precision = _PRECISION[args.amp_dtype] if args.amp else None
    if precision and args.model_dtype not in (None, 'float32'):
        raise ValueError(f'--amp needs float32 weights. It cannot be combined with --model-dtype {args.model_dtype}.')
    if cpu and (precision or os.environ.get('ACCELERATE_MIXED_PRECISION')) == 'fp16':
        raise ValueError('Mixed precision with float16 needs a GPU. On a CPU, use --amp --amp-dtype bfloat16.')

    steps = max(1, getattr(args, 'grad_accum_steps', 1))
    if steps == 1:  # not set by our option: use the launcher's value
        steps = int(os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', 1))
    trackers = list(getattr(args, 'log_with', None) or [])
    if getattr(args, 'log_wandb', False) and 'wandb' not in trackers:
        trackers.append('wandb')
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        # Accelerate does not see the end of an epoch of timm's loaders. The training loop handles it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False),
        log_with=trackers or None,
        project_dir=project_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not getattr(args, 'no_ddp_bb', False))],
    )
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    if world_size != accelerator.num_processes:
        raise ValueError(
            f'{world_size} processes were launched, but Accelerate found {accelerator.num_processes}: each process '
            'would train alone. For several processes on CPUs, use torchrun --nproc-per-node N train.py --device cpu.')
    if accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def create_control_channel(accelerator: Accelerator) -> Callable[[bool], bool]:
    """Create a function that returns, in every process, whether any process passed True.

    All processes must call it. It communicates over the CPU, so it never waits for a GPU.
    """
    if accelerator.num_processes == 1:
        return bool
    group = dist.new_group(backend='gloo')

    def any_process(value: bool) -> bool:
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)  # type: ignore[arg-type]
        return bool(flag.item())

    return any_process
