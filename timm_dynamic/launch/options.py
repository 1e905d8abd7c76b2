"""Command line options of train.py, validate.py and predict.py: those of timm, with timm's meanings and defaults, and ours."""
import argparse
import sys
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from ..models.clcnet import CONFIDENCES, FINAL_RULES
from ..task.clcnet import NUM_FOLDS
from .parser import OptionParser

RESULTS_FORMATS = ('csv', 'json', 'json-record', 'json-split', 'parquet')
_INTERPOLATIONS = ['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']
# Unsupported options of timm, and their replacements.
REFUSED_TRAIN = {
    '--torchscript': 'TorchScript is deprecated in PyTorch. Use --torchcompile.',
    '--fuser': 'It selects a TorchScript fuser. Use --torchcompile and --torchcompile-mode.',
    '--naflex-loader': (
        'NaFlex models need token dictionaries, which the models of this package cannot read. '
        "Use timm's script: python -m timm_dynamic /path/to/timm/train.py --naflex-loader ..."),
}
REFUSED_TRAIN |= {
    f'--naflex-{name}': 'It needs --naflex-loader. Use timm\'s script: python -m timm_dynamic '
                        '/path/to/timm/train.py --naflex-loader ...'
    for name in ('train-seq-lens', 'max-seq-len', 'patch-sizes', 'patch-size-probs', 'loss-scale',
                 'patchify-channels-first')
}
REFUSED_VALIDATE = {
    '--torchscript': REFUSED_TRAIN['--torchscript'],
    '--fuser': REFUSED_TRAIN['--fuser'],
    '--aot-autograd': 'It is part of torch.compile. Use --torchcompile aot_eager, or --torchcompile.',
    '--num-gpu': 'One process uses one GPU. Use accelerate launch --num_processes N validate.py ...',
    '--naflex-loader': (
        "NaFlex models need token dictionaries. Use timm's script: "
        'python -m timm_dynamic /path/to/timm/validate.py --naflex-loader ...'),
    '--naflex-max-seq-len': (
        "It needs --naflex-loader. Use timm's script: "
        'python -m timm_dynamic /path/to/timm/validate.py --naflex-loader ...'),
}

REFUSED_PREDICT = {
    **{name: REFUSED_VALIDATE[name] for name in ('--torchscript', '--fuser', '--aot-autograd')},
    '--num-gpu': 'One process uses one GPU. Use accelerate launch --num_processes N predict.py ...',
}


# What --help shows. The rest: --help-all.
_COMMON_DATA = ('data_dir', 'dataset', 'class_map')
_COMMON_MODEL = ('model', 'pretrained', 'num_classes', 'img_size', 'model_kwargs')
_COMMON_DEVICE = ('device', 'amp')
COMMON_TRAIN = (
    *_COMMON_DATA, *_COMMON_MODEL, *_COMMON_DEVICE, 'config', 'train_split', 'val_split', 'test_split', 'recipe', 'stage',
    'stage_args', 'focus_baseline', 'init_local', 'init_downstream', 'init_members', 'init_from', 'confidence',
    'initial_checkpoint', 'resume', 'batch_size', 'opt', 'weight_decay', 'clip_grad', 'sched', 'lr', 'warmup_epochs',
    'epochs', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing', 'drop_path', 'model_ema', 'seed', 'workers', 'output',
    'experiment', 'clock', 'push_to_hub', 'eval_metric', 'log_with')
_COMMON_EVAL = (
    *_COMMON_DATA, *_COMMON_MODEL, *_COMMON_DEVICE, 'split', 'checkpoint', 'batch_size', 'workers', 'results_file',
    'results_format', 'budget', 'thresholds', 'confidence')
COMMON_VALIDATE = (
    *_COMMON_EVAL, 'compare', 'calibrate_split', 'save_budgets', 'save_exit_table', 'exit_table', 'save_predictions',
    'curve', 'stored_results', 'stored_thresholds')
COMMON_PREDICT = (*_COMMON_EVAL, 'file_list', 'topk', 'label_type', 'output_type', 'results_dir')


class _CheckpointAction(argparse.Action):
    """Takes FILE as a text, and PART=FILE, which can be repeated, as a dict of the parts."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None):
        part, equals, file = values.partition('=')
        before = getattr(namespace, self.dest)
        parts = before if isinstance(before, dict) else {}
        is_part = equals and '/' not in part and not Path(values).exists()
        if before and (not is_part or not parts or part in parts):
            parser.error(f'{option_string}: expected one FILE or folder, or PART=FILE once for each part.')
        setattr(namespace, self.dest, {**parts, part: file} if is_part else values)


def _dataset_options(g: Any, split_names: bool) -> None:
    g.add_argument('data', nargs='?', metavar='DIR', help='data folder; prefer --data-dir')
    g.add_argument('--data-dir', metavar='DIR', help='data folder (default: the embedded demo set)')
    g.add_argument('--dataset', metavar='TYPE/NAME', default='', help='type and name, e.g. torch/, hfds/, wds/, tfds/ ... (default: a folder or tar file)')
    if split_names:
        g.add_argument('--train-split', metavar='NAME', default='train', help='split to train on (%(default)s)')
        g.add_argument('--val-split', metavar='NAME', default='validation', help='split to validate on (%(default)s)')
        g.add_argument('--test-split', metavar='NAME', help='split for the final table (default: --val-split; of the demo set test)')
        g.add_argument('--train-num-samples', type=int, metavar='N', help='number of training samples, for iterable datasets')
        g.add_argument('--val-num-samples', type=int, metavar='N', help='number of validation samples, for iterable datasets')
    g.add_argument('--demo-digit-scale', type=int, nargs=2, metavar=('LO', 'HI'), help="size range of the digits in the embedded demo set, in pixels (default: the model's, else 24 36)")
    g.add_argument('--demo-img-size', type=int, metavar='N', help="size of the images in the embedded demo set (default: the model's, else its input size)")
    g.add_argument('--demo-clutter', type=float, metavar='X', help="amount of clutter in the embedded demo set (default: the model's, else 0.5)")
    g.add_argument('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets')
    g.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    g.add_argument('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB, or L for one channel)')
    g.add_argument('--input-key', metavar='KEY', help='key of the image in a sample')
    g.add_argument('--target-key', metavar='KEY', help='key of the label in a sample')
    g.add_argument('--dataset-trust-remote-code', action='store_true', help='run the code of a Hub dataset')


def _input_options(g: Any) -> None:
    g.add_argument('--gp', metavar='POOL', help='global pooling (fast, avg, max, avgmax, catavgmax)')
    g.add_argument('--img-size', type=int, metavar='N', help='image height and width')
    g.add_argument('--in-chans', type=int, metavar='N', help='image channels')
    g.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help='image channels, height, width')
    g.add_argument('--crop-pct', type=float, metavar='P', help='share of the image that the evaluation crop keeps')
    g.add_argument('--mean', type=float, nargs='+', metavar='M', help='channel means for normalisation')
    g.add_argument('--std', type=float, nargs='+', metavar='S', help='channel standard deviations for normalisation')
    g.add_argument('--interpolation', default='', choices=['', *_INTERPOLATIONS], metavar='NAME', help='interpolation of images in evaluation')
    g.add_argument('--num-classes', type=int, metavar='N', help='number of classes')
    g.add_argument('--channels-last', action='store_true', help='use the channels_last memory format')
    g.add_argument('--fast-norm', action='store_true', help="use timm's experimental fast norms")
    g.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='arguments of the model')


def _device_options(g: Any) -> None:
    g.add_argument('--device', default='cuda', help="'cpu' or an accelerator; the CPU if there is no accelerator (%(default)s)")
    g.add_argument('--amp', action='store_true', help="mixed precision, like accelerate launch --mixed_precision")
    g.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='dtype of --amp (%(default)s)')
    g.add_argument('--model-dtype', choices=['float32', 'float16', 'bfloat16'], help='dtype of the weights, without --amp')
    g.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='use torch.compile (backend: inductor)')
    g.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')


def _checkpoint_options(g: Any) -> None:
    g.add_argument('--pretrained', action='store_true', help='use pretrained weights (default without --checkpoint)')
    g.add_argument('--checkpoint', default='', action=_CheckpointAction, metavar='FILE', help=(
        'weights: a file, or a folder with several files; or PART=FILE, repeated for the parts of a model, e.g. a cascade: '
        'confidence_net, and members by number (from 0) or name'))
    g.add_argument('--use-ema', action='store_true', help="use the checkpoint's averaged weights")
    g.add_argument('--reparam', action='store_true', help='reparameterise the model for inference')
    g.add_argument('--test-pool', action='store_true', help='use test-time pooling')


def _eval_input_options(g: Any) -> None:
    _input_options(g)
    g.add_argument('--use-train-size', action='store_true', help="use the model's training size instead of its test size")
    g.add_argument('--crop-mode', metavar='MODE', help='center, squash or border')
    g.add_argument('--crop-border-pixels', type=int, metavar='N', help='pixels to crop from each border')
    g.add_argument('--tf-preprocessing', action='store_true', help="use TensorFlow's preprocessing (needs tensorflow)")


def _eval_run_options(g: Any, workers: int) -> None:
    g.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size per process (%(default)s)')
    g.add_argument('-j', '--workers', type=int, default=workers, metavar='N', help='worker processes of the loader (%(default)s)')
    g.add_argument('--log-freq', type=int, default=10, metavar='N', help='batches between updates of the progress bar (%(default)s)')
    g.add_argument('--no-prefetcher', action='store_true', help='normalise in the workers instead of on the device')
    g.add_argument('--pin-mem', action='store_true', help='use pinned memory in the loader')
    g.add_argument('--seed', type=int, default=0, metavar='S', help='(%(default)s)')


def _prog(name: str) -> str:
    """Name of a script in help and errors: as a command of timm-dynamic, or as a file."""
    command = f'timm-dynamic {name}'
    return command if sys.argv[0] == command else f'{name}.py'


def create_train_parser() -> argparse.ArgumentParser:
    """Parser for train.py. Its defaults are timm's."""
    p = OptionParser(
        common=COMMON_TRAIN,
        prog=_prog('train'),
        description='Train timm models and dynamic models on one or many devices.\n\n'
                    '  accelerate launch train.py --model focusnet_resnet18 --data-dir IMAGENET\n\n'
                    "timm's options have the same names, meanings and defaults. Priority of values: command line, "
                    '--config,\ndefaults of the recipe, defaults of timm.')
    p.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with options')

    g = p.add_argument_group('Dataset')
    _dataset_options(g, split_names=True)

    g = p.add_argument_group('Model')
    g.add_argument('--model', default='resnet50', metavar='NAME', help='model to train (%(default)s)')
    g.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    g.add_argument('--pretrained-path', metavar='FILE', help='start from the weights in this file, with a new classifier')
    g.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in this file or folder; all weights must match')
    g.add_argument('--resume', default='', metavar='PATH', help=(
        "'auto': continue the run in --output/--experiment if there is one, else start it; or the folder of a run or "
        "state; or a .pth.tar file of timm's train.py or of the FocusNet authors' code"))
    g.add_argument('--no-resume-opt', action='store_true', help="do not load the optimizer's state")
    _input_options(g)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size per process (%(default)s)')
    g.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='batch size per process in validation (default: --batch-size)')
    g.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per update (%(default)s)')
    g.add_argument('--grad-checkpointing', action='store_true', help='recompute activations to save memory')
    g.add_argument('--head-init-scale', type=float, metavar='S', help="multiply the classifier's initial weights and bias")
    g.add_argument('--head-init-bias', type=float, metavar='B', help="set the classifier's initial bias")

    g = p.add_argument_group('Recipe')
    g.add_argument('--recipe', metavar='NAME', help=(
        "'classification', 'focusnet', 'gfnet', 'end-to-end', 'anchornet' or 'clcnet' (default: depends on the model and other options)"))
    g.add_argument('--stage', nargs='+', metavar='NAME', help='run only these stages of the recipe')
    g.add_argument('--stage-args', nargs='+', default=[], metavar='STAGE.OPTION=VALUE',
                   help='options for one stage, e.g. baseline.epochs=5')
    g.add_argument('--init-from', default='', metavar='PATH', help=(
        "initial weights of a whole GFNet or AnchorNet-patch for the first stage: the folder of a stage, a file, or an "
        "authors' checkpoint; of an AnchorNet-patch also single networks, e.g. anchornet.pth"))

    g = p.add_argument_group('FocusNet')
    g.add_argument('--focus-baseline', metavar='MODEL', help=(
        "frozen baseline of a FocusNet: a timm model with weights, 'local-dir:FOLDER', a checkpoint file of the same "
        "architecture, or 'scratch' to train a net like --model with cross-entropy first (default: that of the paper, "
        'if the data has its classes; with the demo set: scratch)'))
    g.add_argument('--focus-plain', action='store_true', help=(
        'also train the same net with cross-entropy for the same number of epochs, and compare in the final table'))
    g.add_argument('--focus-temperature', type=float, default=2.0, metavar='T',
                   help="temperature of the baseline's probabilities for picking confused classes (%(default)s)")
    g.add_argument('--focus-attention-weight', type=float, default=1.0, metavar='W', help='weight of the attention loss (%(default)s)')
    g.add_argument('--focus-negentropy-weight', type=float, default=1.0, metavar='W', help='weight of the negentropy loss (%(default)s)')

    g = p.add_argument_group('GFNet and AnchorNet-patch')
    g.add_argument('--init-local', metavar='SOURCE', help=(
        "initial weights of a GFNet's local encoder: a timm model, a folder or file with weights of the backbone, or "
        "'scratch' to train the backbone on whole images first (default: the backbone's pretrained weights if there are "
        'any; with the demo set: scratch)'))
    g.add_argument('--init-global', metavar='SOURCE', help='the same for the global encoder (default: --init-local)')
    g.add_argument('--init-downstream', metavar='SOURCE', help='the same for the resized and the patch net of an AnchorNet-patch')
    g.add_argument('--aux-weight', type=float, default=1.0, metavar='W', help="weight of the encoders' auxiliary losses (%(default)s)")
    g.add_argument('--freeze-global', action=argparse.BooleanOptionalAction, default=False, help="freeze a GFNet's global encoder")
    g.add_argument('--classifier-lr-scale', type=float, default=1.0, metavar='S',
                   help="the classifier's learning rate, as a multiple of --lr (%(default)s)")
    g.add_argument('--policy-std', type=float, default=0.1, metavar='S', help="standard deviation of the patch policy's actions in training (%(default)s)")
    g.add_argument('--policy-gamma', type=float, default=0.7, metavar='G', help='PPO: discount of later rewards (%(default)s)')
    g.add_argument('--policy-epsilon', type=float, default=0.2, metavar='E', help='PPO: ratios are clipped to 1 - E .. 1 + E (%(default)s)')
    g.add_argument('--policy-value-coeff', type=float, default=0.5, metavar='W', help="PPO: weight of the critic's loss (%(default)s)")
    g.add_argument('--policy-entropy-coeff', type=float, default=0.01, metavar='W', help='PPO: weight of the entropy (%(default)s)')
    g.add_argument('--policy-updates', type=int, default=1, metavar='K', help='PPO: updates per batch (%(default)s)')
    g.add_argument('--save-patches', type=int, default=0, metavar='N',
                   help="draw a GFNet's patches in N images after every validation")

    g = p.add_argument_group('Cascades')
    g.add_argument('--init-members', nargs='+', metavar='SOURCE', help=(
        "initial weights of a cascade's members: 'pretrained', 'scratch' to train them first, a folder or a file; one "
        "for all or one for each; 'none' with --features to train the confidence net alone (default: pretrained; with the "
        'demo set: scratch)'))
    g.add_argument('--feature-split', metavar='NAME', help=(
        "split on which a cascade's confidence net is trained; the members should not be trained on it (default: "
        '--val-split)'))
    g.add_argument('--features', nargs='+', metavar='FILE', help=(
        "train the confidence net on these features, without running the members: .safetensors, or .csv in the format of "
        "the CLCNet authors' scripts"))
    g.add_argument('--folds', type=int, metavar='K', help=(
        f'K-fold cross-validation of the confidence net; 0 for none ({NUM_FOLDS})'))
    g.add_argument('--fold-dir', metavar='DIR', help=(
        'folds of the cross-validation: a folder with one sub-folder of images for each (e.g. split_part_1 to 5), or a CSV '
        'with the columns file and fold (default: random folds)'))
    g.add_argument('--confidence', choices=['clcnet', 'max_prob', 'margin', 'entropy', 'all'], help=(
        "confidence of a cascade (default: 'all', which selects the best confidence and final rule by cross-validation; "
        "the paper's is clcnet)"))

    g = p.add_argument_group('Device', 'Processes, devices and precision are set by accelerate launch or accelerate config.')
    _device_options(g)
    g.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers before every forward')
    g.add_argument('--synchronize-step', action='store_true', help='wait for the device after every update')
    g.add_argument('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')

    g = p.add_argument_group('Optimizer')
    g.add_argument('--opt', default='sgd', metavar='NAME', help="any of timm's optimizers (%(default)s)")
    g.add_argument('--opt-eps', type=float, metavar='E', help='epsilon of the optimizer')
    g.add_argument('--opt-betas', type=float, nargs='+', metavar='B', help='betas of the optimizer')
    g.add_argument('--momentum', type=float, default=0.9, metavar='M', help='(%(default)s)')
    g.add_argument('--weight-decay', type=float, default=2e-5, metavar='W', help='(%(default)s)')
    g.add_argument('--clip-grad', type=float, metavar='V', help='clip gradients at this value, see --clip-mode')
    g.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='(%(default)s)')
    g.add_argument('--layer-decay', type=float, metavar='D', help='layer-wise learning rate decay')
    g.add_argument('--layer-decay-min-scale', type=float, default=0, metavar='S', help='smallest scale of a layer (%(default)s)')
    g.add_argument('--layer-decay-no-opt-scale', type=float, metavar='S', help='freeze layers with a smaller scale')
    g.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further arguments of the optimizer')

    g = p.add_argument_group('Learning rate schedule')
    g.add_argument('--sched', default='cosine', metavar='NAME', help='(%(default)s)')
    g.add_argument('--sched-on-updates', action='store_true', help='step the schedule after every update instead of every epoch')
    g.add_argument('--lr', type=float, metavar='LR', help='learning rate; overrides --lr-base')
    g.add_argument('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate for a global batch of --lr-base-size, scaled to the global batch size (%(default)s)')
    g.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='(%(default)s)')
    g.add_argument('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'], help='how --lr-base is scaled (default: depends on --opt)')
    g.add_argument('--lr-noise', type=float, nargs='+', metavar='P', help='start and end of learning rate noise, as shares of the schedule')
    g.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='P', help='limit of the noise (%(default)s)')
    g.add_argument('--lr-noise-std', type=float, default=1.0, metavar='S', help='standard deviation of the noise (%(default)s)')
    g.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='M', help='factor of the cycle length (%(default)s)')
    g.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='D', help='factor of the learning rate per cycle (%(default)s)')
    g.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles (%(default)s)')
    g.add_argument('--lr-k-decay', type=float, default=1.0, metavar='K', help='k of k-decay, for cosine and poly (%(default)s)')
    g.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='initial learning rate of the warm-up (%(default)s)')
    g.add_argument('--min-lr', type=float, default=0, metavar='LR', help='lower limit of the learning rate (%(default)s)')
    g.add_argument('--epochs', type=int, default=300, metavar='N', help='(%(default)s)')
    g.add_argument('--epoch-repeats', type=float, default=0., metavar='N', help='repeats of an iterable dataset per epoch')
    g.add_argument('--start-epoch', type=int, metavar='N', help='number of the first epoch; overrides that of --resume')
    g.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N', help='epochs of the multistep schedule')
    g.add_argument('--decay-epochs', type=float, metavar='N', help='epochs between decays (90; for wsd and rsqrt a fifth of the schedule)')
    g.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='(%(default)s)')
    g.add_argument('--warmup-prefix', action='store_true', help='start the schedule after the warm-up')
    g.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the lowest learning rate, after the schedule')
    g.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='patience of the plateau schedule, and of early stopping of a confidence net')
    g.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='R', help='(%(default)s)')

    g = p.add_argument_group('Augmentation and regularisation')
    g.add_argument('--no-aug', action='store_true', help='no augmentation')
    g.add_argument('--train-crop-mode', metavar='MODE', help='rrc, rkrc or rkrr')
    g.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='P', help='area range of random crops, as shares of the image')
    g.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='R', help='aspect ratio range of random crops')
    g.add_argument('--hflip', type=float, default=0.5, metavar='P', help='probability of a horizontal flip (%(default)s)')
    g.add_argument('--vflip', type=float, default=0., metavar='P', help='probability of a vertical flip (%(default)s)')
    g.add_argument('--color-jitter', type=float, default=0.4, metavar='F', help='strength of colour jitter (%(default)s)')
    g.add_argument('--color-jitter-prob', type=float, metavar='P', help='probability of colour jitter')
    g.add_argument('--grayscale-prob', type=float, metavar='P', help='probability of conversion to grey')
    g.add_argument('--gaussian-blur-prob', type=float, metavar='P', help='probability of Gaussian blur')
    g.add_argument('--aa', metavar='POLICY', help='AutoAugment, RandAugment, AugMix ...')
    g.add_argument('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation, for several processes')
    g.add_argument('--aug-splits', type=int, default=0, metavar='N', help='views per image, the first without augmentation (0 or >= 2)')
    g.add_argument('--jsd-loss', action='store_true', help='Jensen-Shannon divergence over --aug-splits')
    g.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    g.add_argument('--bce-sum', action='store_true', help='sum --bce-loss over classes')
    g.add_argument('--bce-target-thresh', type=float, metavar='T', help='binarise the soft targets of --bce-loss')
    g.add_argument('--bce-pos-weight', type=float, metavar='W', help='weight of positive targets in --bce-loss')
    g.add_argument('--reprob', type=float, default=0., metavar='P', help='probability of random erasing (%(default)s)')
    g.add_argument('--remode', default='pixel', help='mode of random erasing: const, rand or pixel (%(default)s)')
    g.add_argument('--recount', type=int, default=1, metavar='N', help='number of erased areas (%(default)s)')
    g.add_argument('--resplit', action='store_true', help='no erasing in the first view of --aug-splits')
    g.add_argument('--mixup', type=float, default=0.0, metavar='ALPHA', help='alpha of mixup; 0 for none')
    g.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='alpha of cutmix; 0 for none')
    g.add_argument('--cutmix-minmax', type=float, nargs='+', metavar='R', help='range of the ratio of cutmix, instead of alpha')
    g.add_argument('--mixup-prob', type=float, default=1.0, metavar='P', help='probability of mixup or cutmix (%(default)s)')
    g.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P', help='probability of cutmix if both are on (%(default)s)')
    g.add_argument('--mixup-mode', default='batch', help='batch, pair or elem (%(default)s)')
    g.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch from which mixup is off; 0 for never')
    g.add_argument('--smoothing', type=float, default=0.1, metavar='S', help='label smoothing (%(default)s)')
    g.add_argument('--train-interpolation', default='random', choices=['', 'random', *_INTERPOLATIONS],
                   metavar='NAME', help='interpolation of images in training (%(default)s)')
    g.add_argument('--drop', type=float, default=0.0, metavar='P', help='dropout (%(default)s)')
    g.add_argument('--drop-connect', type=float, metavar='P', help='old name of --drop-path')
    g.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')
    g.add_argument('--drop-block', type=float, metavar='P', help='DropBlock')

    g = p.add_argument_group('Several resolutions', 'Batches of several image sizes within an epoch.')
    g.add_argument('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes')
    g.add_argument('--train-batch-sizes', type=int, nargs='+', metavar='N', help='batch sizes, one per image size')
    g.add_argument('--train-size-probs', type=float, nargs='+', metavar='P', help='probabilities, one per image size')
    g.add_argument('--train-size-schedule', default='constant', choices=['constant', 'progressive'],
                   help='constant probabilities, or from small to large sizes (%(default)s)')
    g.add_argument('--train-size-schedule-spread', type=float, default=0.65, metavar='S', help='spread of the progressive schedule (%(default)s)')
    g.add_argument('--train-size-random-mix', type=float, default=0.1, metavar='P', help='share of uniformly drawn sizes in the progressive schedule (%(default)s)')
    g.add_argument('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N', help='batches per epoch')
    g.add_argument('--variable-batch-loss-scale', default='none', choices=['none', 'sqrt', 'linear'],
                   help='scale the loss of a batch by its size over --batch-size (%(default)s)')

    g = p.add_argument_group('Batch norm')
    g.add_argument('--bn-momentum', type=float, metavar='M', help='momentum of batch norm')
    g.add_argument('--bn-eps', type=float, metavar='E', help='epsilon of batch norm')
    g.add_argument('--sync-bn', action='store_true', help='compute statistics over all processes')
    g.add_argument('--dist-bn', default='reduce', choices=['reduce', 'broadcast', ''],
                   help='average or broadcast the running statistics of all processes after an epoch (%(default)s)')
    g.add_argument('--split-bn', action='store_true', help='separate norms for each view of --aug-splits')

    g = p.add_argument_group('Moving average of weights')
    g.add_argument('--model-ema', action='store_true', help='keep an exponential moving average (EMA) of the weights')
    g.add_argument('--model-ema-force-cpu', action='store_true', help='keep the average on the CPU; it is not validated')
    g.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='(%(default)s)')
    g.add_argument('--model-ema-warmup', action='store_true', help='increase the decay at the beginning')

    g = p.add_argument_group('Run')
    g.add_argument('--seed', type=int, default=42, metavar='S', help='(%(default)s)')
    g.add_argument('--worker-seeding', default='all', choices=['all', 'part'],
                   help='for iterable datasets; in other datasets each sample has its own seed')
    g.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates between log lines (%(default)s)')
    g.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations (%(default)s)')
    g.add_argument('--checkpoint-interval', '--recovery-interval', type=int, default=0, metavar='N',
                   help='updates between saved states within an epoch (0: save only at its end)')
    g.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='keep the weights of the N best epochs (%(default)s)')
    g.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='worker processes of the loader (%(default)s)')
    g.add_argument('--save-images', action='store_true', help='save a training batch as a picture at every log line')
    g.add_argument('--pin-mem', action='store_true', help='use pinned memory in the loader')
    g.add_argument('--no-prefetcher', action='store_true', help='normalise, erase and mix in the workers instead of on the device')
    g.add_argument('--output', default='', metavar='DIR', help='folder of all runs (output/train)')
    g.add_argument('--experiment', default='', metavar='NAME', help='folder of the run in --output (default: date, time and model)')
    g.add_argument('--push-to-hub', default='', metavar='ORG/NAME',
                   help='publish the best weights of the last stage on the Hugging Face Hub, with a card of the run')
    g.add_argument('--hub-private', action='store_true', help='with --push-to-hub: create a private repository')
    g.add_argument('--eval-metric', default='top1', metavar='NAME', help='metric that selects the best epoch (%(default)s)')
    g.add_argument('--clock', action='store_true', help='at the end, measure the time that budgets, all steps and static networks take; also on the card')
    g.add_argument('--tta', type=int, default=0, metavar='N', help='average N views per image in validation, if the loader yields them')
    g.add_argument('--use-multi-epochs-loader', action='store_true', help='prefetch across the end of an epoch')
    g.add_argument('--log-with', nargs='+', metavar='TRACKER', help="Accelerate's trackers: tensorboard, wandb, ...")
    g.add_argument('--log-wandb', action='store_true', help='the same as --log-with wandb')
    g.add_argument('--wandb-project', metavar='NAME', help='project of the tracker (timm_dynamic)')
    g.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the wandb run')
    g.add_argument('--wandb-resume-id', default='', metavar='ID', help='wandb run to continue')

    g = p.add_argument_group('Distillation')
    g.add_argument('--kd-model-name', metavar='NAME', help='teacher, a timm model with weights')
    g.add_argument('--kd-distill-type', default='logit', choices=['logit', 'feature', 'token'], help='(%(default)s)')
    g.add_argument('--kd-loss-type', default='kl', choices=['kl'], help='(%(default)s)')
    g.add_argument('--distill-loss-weight', type=float, metavar='W', help='weight of the distillation loss')
    g.add_argument('--task-loss-weight', type=float, metavar='W', help='weight of the classification loss')
    g.add_argument('--kd-temperature', type=float, default=4.0, metavar='T', help='(%(default)s)')
    g.add_argument('--kd-student-feature-dim', type=int, metavar='N', help='feature size of the student (default: that of the model)')
    g.add_argument('--kd-teacher-feature-dim', type=int, metavar='N', help='feature size of the teacher (default: that of the model)')
    g.add_argument('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='(%(default)s)')

    p.refuse(REFUSED_TRAIN)
    return p


def create_validate_parser() -> argparse.ArgumentParser:
    """Parser for validate.py. Its defaults are timm's."""
    p = OptionParser(
        common=COMMON_VALIDATE,
        prog=_prog('validate'),
        description='Evaluate timm models and dynamic models on one or many devices.\n\n'
                    '  python validate.py --model focusnet_resnet18 --checkpoint FILE --data-dir IMAGENET '
                    '--compare resnet18.tv_in1k\n'
                    '  python validate.py --model gfnet_resnet50_96 --checkpoint FILE --data-dir IMAGENET '
                    '--budget 1 2 --curve curve.png')
    g = p.add_argument_group('Dataset')
    _dataset_options(g, split_names=False)
    g.add_argument('--split', metavar='NAME', help='split to evaluate on (default: validation; of the demo set test)')
    g.add_argument('--num-samples', type=int, metavar='N', help='number of samples, for iterable datasets')
    g.add_argument('--real-labels', default='', metavar='FILE', help='JSON file with the ImageNet ReaL labels')
    g.add_argument('--valid-labels', default='', metavar='FILE', help='file with the class indices to evaluate')

    g = p.add_argument_group('Model')
    g.add_argument('--model', '-m', default='', metavar='NAME',
                   help="model, 'local-dir:FOLDER', a wildcard, 'all', or a text file with one name per line")
    _checkpoint_options(g)
    g.add_argument('--compare', nargs='+', default=[], metavar='MODEL', help='other models to evaluate on the same images')
    _eval_input_options(g)

    g = p.add_argument_group('Dynamic inference', (
        'For models with early exit. Budgets are multiply-adds per image, in 10⁹ (GMACs). Exits are never fitted\n'
        '  and evaluated on the same images. The output names both sets of images.'))
    g.add_argument('--anytime', action='store_true', help='evaluate every step (default for dynamic models)')
    g.add_argument('--budget', type=float, nargs='+', metavar='G', help='fit exits with this average cost, and evaluate them')
    g.add_argument('--budget-rule', default='thresholds', choices=['thresholds', 'value'],
                   help='fit thresholds, or a rule on the confidences of all steps so far (%(default)s)')
    g.add_argument('--thresholds', type=float, nargs='+', action='append', metavar='T', help='evaluate these thresholds, one per step; can be repeated')
    g.add_argument('--threshold-sweep', action='store_true', help=(
        'evaluate the same threshold at all steps, for 49 thresholds from 0.05 to 1.01 (--threshold-searching of the '
        'original CLCNet)'))
    g.add_argument('--strict', action='store_true', help='stop if the confidence is > a threshold, not >=, as in the original AnchorNet')
    g.add_argument('--geometric', action='store_true', help="fit and evaluate the 39 operating points of the GFNet paper (--eval_mode 2 of the original)")
    g.add_argument('--stored-results', action='store_true', help='show the results stored in the model, without data (--eval_mode 0 of the original)')
    g.add_argument('--stored-thresholds', action='store_true', help='evaluate the exits stored in the model (--eval_mode 1 of the original)')
    g.add_argument('--calibrate-split', metavar='NAME', help=(
        "split to fit exits on, or 'half': fit on a random half of --split and evaluate on the other half, or 'cross': both "
        'ways round, and keep what is fitted on all (default: the '
        'validation split; if that is --split, or there is none, cross; half with options that need one policy)'))
    g.add_argument('--calibrate-samples', type=int, metavar='N', help='fit on N random images (default: all)')
    g.add_argument('--calibrate-augment', action='store_true', help=(
        'fit on random crops and flips, as the original GFNet (--eval_mode 2) does (default: fit on images preprocessed '
        'as for evaluation, because exits are used on such images)'))
    g.add_argument('--exit-table', metavar='FILE', help='evaluate exits on a table of --save-exit-table, or of AnchorNet (.pth), without running the model')
    g.add_argument('--steps', type=int, metavar='N', help='read only the first N steps of tables (default: all)')
    g.add_argument('--anchor-gmacs', type=float, metavar='G', help='cost of the localizer for tables of AnchorNet, without --model (0.06; in the published list 0.08)')
    g.add_argument('--calibrate-table', metavar='FILE', help='fit exits on this table (default: on a random half of --exit-table, evaluated on the other half)')
    g.add_argument('--save-exit-table', metavar='FILE', help='write the exit table of --split; .pth: in the format of AnchorNet')
    g.add_argument('--save-budgets', metavar='FOLDER', help='export the model, with the exits of --budget (default: a dozen budgets) in its config.json')
    g.add_argument('--confidence', choices=[*CONFIDENCES, 'all'], help=(
        "confidence of a cascade; 'all' compares all of them with both final rules, and selects the best on the images to "
        'fit on (default: that of the model)'))
    g.add_argument('--final-rule', choices=FINAL_RULES, help="final rule of a cascade: which member's prediction is used (default: that of the model)")
    g.add_argument('--fold-nets', nargs='+', metavar='FILE', help=(
        'cross-validation of a cascade: a confidence net for each fold, or a folder of them (RUN/folds of train.py, which '
        'also contains the folds). Each image is scored by the net that was not trained on it'))
    g.add_argument('--fold-dir', metavar='DIR', help=(
        'folds of --fold-nets: a folder with one sub-folder of images for each net (e.g. split_part_1 to 5), or a CSV with '
        'the columns file and fold'))
    g.add_argument('--save-predictions', metavar='FILE', help=(
        'write a CSV with file, prediction, target, steps used and confidence of every evaluated image. Exits: those of one '
        '--budget or one list of --thresholds, else those of the model, else none'))
    g.add_argument('--save-features', metavar='FILE', help=(
        'write sorted probabilities and correctness of every evaluated image, for train.py --features: .safetensors, or .csv '
        "in the format of the CLCNet authors' scripts"))
    g.add_argument('--curve', metavar='FILE', help='draw accuracy over multiply-adds, with the --compare models (needs matplotlib)')

    g = p.add_argument_group('Run')
    _eval_run_options(g, workers=4)
    g.add_argument('--retry', action='store_true', help='halve the batch size if the device is out of memory')
    g.add_argument('--metrics-avg', default='', choices=['', 'micro', 'macro', 'weighted'],
                   help='also print precision, recall and F1 with this average (needs scikit-learn)')
    g.add_argument('--results-file', default='', metavar='FILE', help='write the results to this file')
    g.add_argument('--results-format', default='csv', choices=['csv', 'json'], help='(%(default)s)')

    g = p.add_argument_group('Device', 'Processes, devices and precision are set by accelerate launch or accelerate config.')
    _device_options(g)
    g.add_argument('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')
    p.refuse(REFUSED_VALIDATE)
    return p


def create_predict_parser() -> argparse.ArgumentParser:
    """Parser for predict.py. Its defaults are those of timm's inference.py; help and docs name the departures."""
    p = OptionParser(
        common=COMMON_PREDICT,
        prog=_prog('predict'),
        description='Predict the classes of images with timm models and dynamic models on one or many devices.\n\n'
                    '  python predict.py --model local-dir:RUN/best --data-dir IMAGES --results-file predictions.csv --topk 5\n\n'
                    'Results are kept in parts while it runs. The same command continues after an interruption.')
    g = p.add_argument_group('Dataset', 'Labels are not used. A folder of images needs no sub-folders.')
    _dataset_options(g, split_names=False)
    g.add_argument('--file-list', metavar='FILE', help='text file with one image path per line, relative to --data-dir (default: to the working directory)')
    g.add_argument('--split', metavar='NAME', help='split to predict (default: validation; of the demo set test)')
    g.add_argument('--num-samples', type=int, metavar='N', help='number of samples, for iterable datasets')

    g = p.add_argument_group('Model')
    g.add_argument('--model', '-m', default='resnet50', metavar='NAME', help="model, or 'local-dir:FOLDER' (%(default)s)")
    _checkpoint_options(g)
    _eval_input_options(g)

    g = p.add_argument_group('Dynamic inference', (
        "For models with early exit. Default: the model's exit policy if it has one, else all steps."))
    g.add_argument('--budget', type=float, metavar='G', help='use the exits that the model stores for this average cost (GMACs per image)')
    g.add_argument('--thresholds', type=float, nargs='+', metavar='T', help='use these thresholds, one per step')
    g.add_argument('--confidence', choices=CONFIDENCES, help='confidence of a cascade (default: that of the model)')
    g.add_argument('--final-rule', choices=FINAL_RULES, help="final rule of a cascade: which member's prediction is used (default: that of the model)")

    g = p.add_argument_group('Results')
    g.add_argument('--results-dir', metavar='DIR', help='folder of the results')
    g.add_argument('--results-file', metavar='FILE', help='results, relative to --results-dir (default: MODEL-SIZE)')
    g.add_argument('--results-format', nargs='+', choices=RESULTS_FORMATS, metavar='NAME', help=(
        f"{', '.join(RESULTS_FORMATS)} (default: by the extension of --results-file, else csv)"))
    g.add_argument('--results-separate-col', action='store_true', help='a column for each of several predictions')
    g.add_argument('--topk', type=int, default=1, metavar='K', help='number of predicted classes; 0: outputs of all classes, in their order (%(default)s)')
    g.add_argument('--fullname', action=argparse.BooleanOptionalAction, default=True, help=(
        'name images by their path relative to the root, or by their base name only (timm: base name)'))
    g.add_argument('--filename-col', default='filename', metavar='NAME', help='column of image names (%(default)s)')
    g.add_argument('--index-col', default='index', metavar='NAME', help='column of class indices (%(default)s)')
    g.add_argument('--label-col', default='label', metavar='NAME', help='column of class names (%(default)s)')
    g.add_argument('--output-col', metavar='NAME', help='column of outputs (default: --output-type)')
    g.add_argument('--output-type', default='prob', choices=['prob', 'logit'], help='probabilities or logits (%(default)s)')
    g.add_argument('--label-type', default='description', choices=['none', 'name', 'description', 'detail', 'detailed'], help=(
        "class names, from the model's config or timm's ImageNet info (%(default)s); without names, indices are written"))
    g.add_argument('--include-index', action='store_true', help='write class indices in addition to names')
    g.add_argument('--exclude-output', action='store_true', help='do not write probabilities or logits')
    g.add_argument('--per-step', action='store_true', help=(
        "a column 'steps': for each step of a GFNet or AnchorNet-patch its window, the ten best classes so far, and those of the window alone"))
    g.add_argument('--no-console-results', action='store_true', help='do not print the first rows')

    g = p.add_argument_group('Run')
    _eval_run_options(g, workers=2)
    g.add_argument('--shard-size', type=int, metavar='N', help=(
        'images per saved part of the results, rounded up to whole batches (default: 1/32 of the images, at most 4096)'))

    g = p.add_argument_group('Device', 'Processes, devices and precision are set by accelerate launch or accelerate config.')
    _device_options(g)
    g.add_argument('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')
    p.refuse(REFUSED_PREDICT)
    return p
