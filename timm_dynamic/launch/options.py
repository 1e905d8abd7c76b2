"""Command line options of train.py: timm's, by name, meaning and default, and ours.
"""
import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from ..models.clcnet import CONFIDENCES, FINAL_RULES
from ..task.clcnet import NUM_FOLDS
from ..utils import did_you_mean

_INTERPOLATIONS = ['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']
# Options of timm that have no place here, and what takes it.
REFUSED_TRAIN = {
    '--torchscript': 'TorchScript is at its end in PyTorch. Use --torchcompile.',
    '--fuser': 'It chooses a TorchScript fuser. Use --torchcompile and --torchcompile-mode.',
    '--naflex-loader': (
        'NaFlex models are trained on token dictionaries, which the dynamic models here cannot read. '
        "Use timm's own script: python -m timm_dynamic /path/to/timm/train.py --naflex-loader ..."),
}
REFUSED_TRAIN |= {
    f'--naflex-{name}': 'It belongs to --naflex-loader. Use timm\'s own script: python -m timm_dynamic '
                        '/path/to/timm/train.py --naflex-loader ...'
    for name in ('train-seq-lens', 'max-seq-len', 'patch-sizes', 'patch-size-probs', 'loss-scale',
                 'patchify-channels-first')
}
REFUSED_VALIDATE = {
    '--torchscript': REFUSED_TRAIN['--torchscript'],
    '--fuser': REFUSED_TRAIN['--fuser'],
    '--aot-autograd': 'It is part of torch.compile. Use --torchcompile aot_eager, or --torchcompile.',
    '--num-gpu': 'One process drives one GPU. Use accelerate launch --num_processes N validate.py ...',
    '--naflex-loader': (
        "NaFlex models read token dictionaries. Use timm's own script: "
        'python -m timm_dynamic /path/to/timm/validate.py --naflex-loader ...'),
    '--naflex-max-seq-len': (
        "It belongs to --naflex-loader. Use timm's own script: "
        'python -m timm_dynamic /path/to/timm/validate.py --naflex-loader ...'),
}


class _Refuse(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None):
        parser.error(f'{option_string} is not supported. {self.const}')


class _Parser(argparse.ArgumentParser):
    """Explains unknown options by the nearest known one, and reads no abbreviations (a typo is not an option)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith('unrecognized arguments'):
            known = [s for a in self._actions for s in a.option_strings]
            for word in message.split(': ', 1)[1].split():
                near = did_you_mean(word.split('=')[0], known) if word.startswith('--') else ''
                if near:
                    message += f'.{near}'
                    break
        super().error(message)

    def refuse(self, advice: Mapping[str, str]) -> None:
        for name, why in advice.items():
            self.add_argument(name, action=_Refuse, nargs='*', const=why, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _dataset_options(g: Any, split_names: bool) -> None:
    g.add_argument('data', nargs='?', metavar='DIR', help='data folder; --data-dir is preferred')
    g.add_argument('--data-dir', metavar='DIR', help='data folder (default: the embedded demo set)')
    g.add_argument('--dataset', metavar='TYPE/NAME', default='', help='folder or tar if empty; torch/, hfds/, wds/, tfds/ ...')
    if split_names:
        g.add_argument('--train-split', metavar='NAME', default='train', help='split to train on (%(default)s)')
        g.add_argument('--val-split', metavar='NAME', default='validation', help='split to validate on (%(default)s)')
        g.add_argument('--test-split', metavar='NAME', help='split for the final table (that of --val-split)')
        g.add_argument('--train-num-samples', type=int, metavar='N', help='samples to train on, for iterable datasets')
        g.add_argument('--val-num-samples', type=int, metavar='N', help='samples to validate on, for iterable datasets')
    g.add_argument('--demo-digit-scale', type=int, nargs=2, metavar=('LO', 'HI'), help='side of the digits in the embedded demo set, in pixels')
    g.add_argument('--demo-img-size', type=int, metavar='N', help='side of the images in the embedded demo set (that of the input)')
    g.add_argument('--demo-clutter', type=float, metavar='X', help='amount of clutter in the embedded demo set')
    g.add_argument('--dataset-download', action='store_true', help='let torch/ and tfds/ datasets download themselves')
    g.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    g.add_argument('--input-img-mode', metavar='MODE', help='PIL mode that images are read in (RGB, or L for one channel)')
    g.add_argument('--input-key', metavar='KEY', help='key of the image in a sample')
    g.add_argument('--target-key', metavar='KEY', help='key of the label in a sample')
    g.add_argument('--dataset-trust-remote-code', action='store_true', help='run code that comes with a Hub dataset')


def _input_options(g: Any) -> None:
    g.add_argument('--gp', metavar='POOL', help='global pooling (fast, avg, max, avgmax, catavgmax)')
    g.add_argument('--img-size', type=int, metavar='N', help='image height and width')
    g.add_argument('--in-chans', type=int, metavar='N', help='image channels')
    g.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help='image channels, height, width')
    g.add_argument('--crop-pct', type=float, metavar='P', help='share of the image that evaluation crops')
    g.add_argument('--mean', type=float, nargs='+', metavar='M', help='channel means for normalisation')
    g.add_argument('--std', type=float, nargs='+', metavar='S', help='channel standard deviations for normalisation')
    g.add_argument('--interpolation', default='', choices=['', *_INTERPOLATIONS], metavar='NAME', help='how evaluation resizes images')
    g.add_argument('--num-classes', type=int, metavar='N', help='number of classes')
    g.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    g.add_argument('--fast-norm', action='store_true', help="timm's experimental fast norms")
    g.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='passed to the model')


def _device_options(g: Any) -> None:
    g.add_argument('--device', default='cuda', help="'cpu' or an accelerator; without one the CPU is used (%(default)s)")
    g.add_argument('--amp', action='store_true', help="mixed precision, as accelerate launch --mixed_precision")
    g.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='of --amp (%(default)s)')
    g.add_argument('--model-dtype', choices=['float32', 'float16', 'bfloat16'], help='dtype of weights, without --amp')
    g.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile (inductor)')
    g.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')


def create_train_parser() -> argparse.ArgumentParser:
    """Parser for train.py. Its defaults are timm's."""
    p = _Parser(
        prog='train.py',
        description='Train any timm model, with the recipes of timm_dynamic, on one or many devices.\n\n'
                    '  accelerate launch train.py --model focusnet_resnet18 --focus-baseline resnet18.tv_in1k '
                    '--data-dir IMAGENET\n\n'
                    "Options have timm's names, meanings and defaults. A recipe changes defaults; --config (YAML) "
                    'goes before a recipe, the command line before all.')
    p.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with options')

    g = p.add_argument_group('Recipe')
    g.add_argument('--recipe', metavar='NAME', help=(
        "'classification', 'focusnet', 'gfnet', 'end-to-end', 'anchornet' or 'clcnet' (default: by the model and other options)"))
    g.add_argument('--stage', nargs='+', metavar='NAME', help='run only these stages of the recipe')
    g.add_argument('--stage-args', nargs='+', default=[], metavar='STAGE.OPTION=VALUE',
                   help='options for one stage, e.g. baseline.epochs=5')
    g.add_argument('--focus-baseline', metavar='MODEL', help=(
        "frozen baseline of a FocusNet: a timm model (weights included), 'local-dir:FOLDER', a checkpoint file of the "
        "same architecture, or 'scratch' to train it first (a net like --model, plain cross-entropy)"))
    g.add_argument('--focus-plain', action='store_true', help=(
        'also train the same net with plain cross-entropy on the same budget, and compare in the final table'))
    g.add_argument('--focus-temperature', type=float, default=2.0, metavar='T',
                   help="softens the baseline's probabilities when confused classes are picked (%(default)s)")
    g.add_argument('--focus-attention-weight', type=float, default=1.0, metavar='W', help='(%(default)s)')
    g.add_argument('--focus-negentropy-weight', type=float, default=1.0, metavar='W', help='(%(default)s)')

    g.add_argument('--init-local', metavar='SOURCE', help=(
        "weights that a GFNet's local encoder starts from: a timm model, a folder or file with weights of the backbone, "
        "or 'scratch' to train it on whole images first (default: the backbone's pretrained weights if they can be "
        'had; the demo set: scratch)'))
    g.add_argument('--init-global', metavar='SOURCE', help='the same for the global encoder (as --init-local)')
    g.add_argument('--init-downstream', metavar='SOURCE', help='the same for the resized and the patch net of an AnchorNet-patch')
    g.add_argument('--init-members', nargs='+', metavar='SOURCE', help=(
        "weights of a cascade's members: 'pretrained', 'scratch' to train them first, a folder or file; one for all or "
        'one for each (default: pretrained; the demo set: scratch)'))
    g.add_argument('--feature-split', metavar='NAME', help=(
        "split on which a cascade's members answer and its confidence net is trained: not the members' own training data "
        '(that of --val-split)'))
    g.add_argument('--features', nargs='+', metavar='FILE', help=(
        "train the confidence net on these (.safetensors, or .csv as the CLCNet authors' scripts write it) and run no member"))
    g.add_argument('--folds', type=int, metavar='K', help=(
        f'judge the confidence net out of fold: K nets, each trained without a part of the images; 0 for none ({NUM_FOLDS})'))
    g.add_argument('--fold-dir', metavar='DIR', help=(
        'the parts are those in this folder, which has a folder of images for each (e.g. split_part_1 to 5), or in a CSV '
        'with the columns file and fold (default: random ones)'))
    g.add_argument('--confidence', choices=['clcnet', 'max_prob', 'margin', 'entropy', 'all'], help=(
        "of a cascade; 'all' takes the best on out-of-fold data (the model's own)"))
    g.add_argument('--init-from', default='', metavar='PATH', help=(
        "weights of a whole GFNet that the first stage starts from: a stage's folder, a file, or an authors' checkpoint"))
    g.add_argument('--aux-weight', type=float, default=1.0, metavar='W', help="of the encoders' auxiliary losses (%(default)s)")
    g.add_argument('--freeze-global', action=argparse.BooleanOptionalAction, default=False, help='the global encoder does not learn')
    g.add_argument('--classifier-lr-scale', type=float, default=1.0, metavar='S',
                   help="the classifier's learning rate, as a multiple of --lr (%(default)s)")
    g.add_argument('--policy-std', type=float, default=0.1, metavar='S', help='standard deviation of actions in training (%(default)s)')
    g.add_argument('--policy-gamma', type=float, default=0.7, metavar='G', help='discount of later rewards (%(default)s)')
    g.add_argument('--policy-epsilon', type=float, default=0.2, metavar='E', help='range of PPO ratios that count (%(default)s)')
    g.add_argument('--policy-value-coeff', type=float, default=0.5, metavar='W', help="of the critic's loss (%(default)s)")
    g.add_argument('--policy-entropy-coeff', type=float, default=0.01, metavar='W', help='(%(default)s)')
    g.add_argument('--policy-updates', type=int, default=1, metavar='K', help='policy updates per batch (%(default)s)')
    g.add_argument('--save-patches', type=int, default=0, metavar='N',
                   help='after every validation, draw where a GFNet looks in N images')

    g = p.add_argument_group('Dataset')
    _dataset_options(g, split_names=True)

    g = p.add_argument_group('Model')
    g.add_argument('--model', default='resnet50', metavar='NAME', help='model to train (%(default)s)')
    g.add_argument('--pretrained', action='store_true', help='start from pretrained weights')
    g.add_argument('--pretrained-path', metavar='FILE', help='take this file for the pretrained weights, with a new classifier')
    g.add_argument('--initial-checkpoint', default='', metavar='FILE', help='weights to start from; all must fit')
    g.add_argument('--resume', default='', metavar='PATH', help=(
        "'auto' continues the run in --output/--experiment if there is one, else starts it; a run or state folder; "
        "or a .pth.tar of timm's train.py"))
    g.add_argument('--no-resume-opt', action='store_true', help="do not resume the optimizer")
    _input_options(g)
    g.add_argument('-b', '--batch-size', type=int, default=128, metavar='N', help='per process (%(default)s)')
    g.add_argument('-vb', '--validation-batch-size', type=int, metavar='N', help='per process (as --batch-size)')
    g.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per update (%(default)s)')
    g.add_argument('--grad-checkpointing', action='store_true', help='recompute activations to save memory')
    g.add_argument('--head-init-scale', type=float, metavar='S', help="scales the classifier's initial values")
    g.add_argument('--head-init-bias', type=float, metavar='B', help="the classifier's initial bias")

    g = p.add_argument_group('Device', 'Processes, devices and precision are set by accelerate launch or accelerate config.')
    _device_options(g)
    g.add_argument('--no-ddp-bb', action='store_true', help='do not broadcast buffers before every forward')
    g.add_argument('--synchronize-step', action='store_true', help='wait for the device after every update')
    g.add_argument('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import first')

    g = p.add_argument_group('Optimizer')
    g.add_argument('--opt', default='sgd', metavar='NAME', help='(%(default)s)')
    g.add_argument('--opt-eps', type=float, metavar='E')
    g.add_argument('--opt-betas', type=float, nargs='+', metavar='B')
    g.add_argument('--momentum', type=float, default=0.9, metavar='M', help='(%(default)s)')
    g.add_argument('--weight-decay', type=float, default=2e-5, metavar='W', help='(%(default)s)')
    g.add_argument('--clip-grad', type=float, metavar='V', help='clip gradients, see --clip-mode')
    g.add_argument('--clip-mode', default='norm', choices=['norm', 'value', 'agc'], help='(%(default)s)')
    g.add_argument('--layer-decay', type=float, metavar='D', help='learning rate decay from layer to layer')
    g.add_argument('--layer-decay-min-scale', type=float, default=0, metavar='S')
    g.add_argument('--layer-decay-no-opt-scale', type=float, metavar='S')
    g.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='passed to the optimizer')

    g = p.add_argument_group('Learning rate schedule')
    g.add_argument('--sched', default='cosine', metavar='NAME', help='(%(default)s)')
    g.add_argument('--sched-on-updates', action='store_true', help='step per update, not per epoch')
    g.add_argument('--lr', type=float, metavar='LR', help='learning rate; overrides --lr-base')
    g.add_argument('--lr-base', type=float, default=0.1, metavar='LR', help='scaled by batch size / base size (%(default)s)')
    g.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='(%(default)s)')
    g.add_argument('--lr-base-scale', default='', choices=['', 'linear', 'sqrt'], help='(by optimizer)')
    g.add_argument('--lr-noise', type=float, nargs='+', metavar='P', help='when noise begins and ends, as shares')
    g.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='P')
    g.add_argument('--lr-noise-std', type=float, default=1.0, metavar='S')
    g.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='M')
    g.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='D')
    g.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N')
    g.add_argument('--lr-k-decay', type=float, default=1.0, metavar='K')
    g.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='(%(default)s)')
    g.add_argument('--min-lr', type=float, default=0, metavar='LR', help='(%(default)s)')
    g.add_argument('--epochs', type=int, default=300, metavar='N', help='(%(default)s)')
    g.add_argument('--epoch-repeats', type=float, default=0., metavar='N', help='repeats of an iterable dataset per epoch')
    g.add_argument('--start-epoch', type=int, metavar='N', help='number of the first epoch, whatever was resumed')
    g.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N')
    g.add_argument('--decay-epochs', type=float, metavar='N', help='(90; for wsd and rsqrt a fifth of the schedule)')
    g.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='(%(default)s)')
    g.add_argument('--warmup-prefix', action='store_true', help='the schedule begins after the warm-up')
    g.add_argument('--cooldown-epochs', type=int, default=0, metavar='N')
    g.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='of the plateau schedule')
    g.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='R', help='(%(default)s)')

    g = p.add_argument_group('Augmentation and regularisation')
    g.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    g.add_argument('--train-crop-mode', metavar='MODE', help='rrc, rkrc, rkrr')
    g.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='P', help='of random crops, as areas')
    g.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='R', help='of random crops')
    g.add_argument('--hflip', type=float, default=0.5, metavar='P')
    g.add_argument('--vflip', type=float, default=0., metavar='P')
    g.add_argument('--color-jitter', type=float, default=0.4, metavar='F')
    g.add_argument('--color-jitter-prob', type=float, metavar='P')
    g.add_argument('--grayscale-prob', type=float, metavar='P')
    g.add_argument('--gaussian-blur-prob', type=float, metavar='P')
    g.add_argument('--aa', metavar='POLICY', help='AutoAugment, RandAugment, AugMix ...')
    g.add_argument('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (several processes)')
    g.add_argument('--aug-splits', type=int, default=0, metavar='N', help='views per image, first one clean (0 or >= 2)')
    g.add_argument('--jsd-loss', action='store_true', help='Jensen-Shannon divergence over --aug-splits')
    g.add_argument('--bce-loss', action='store_true', help='binary cross-entropy')
    g.add_argument('--bce-sum', action='store_true', help='summed over classes')
    g.add_argument('--bce-target-thresh', type=float, metavar='T')
    g.add_argument('--bce-pos-weight', type=float, metavar='W')
    g.add_argument('--reprob', type=float, default=0., metavar='P', help='random erasing')
    g.add_argument('--remode', default='pixel', help='const, rand or pixel (%(default)s)')
    g.add_argument('--recount', type=int, default=1, metavar='N')
    g.add_argument('--resplit', action='store_true', help='no erasing in the first split')
    g.add_argument('--mixup', type=float, default=0.0, metavar='ALPHA')
    g.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA')
    g.add_argument('--cutmix-minmax', type=float, nargs='+', metavar='R')
    g.add_argument('--mixup-prob', type=float, default=1.0, metavar='P')
    g.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P')
    g.add_argument('--mixup-mode', default='batch', help='batch, pair or elem (%(default)s)')
    g.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N')
    g.add_argument('--smoothing', type=float, default=0.1, metavar='S', help='label smoothing (%(default)s)')
    g.add_argument('--train-interpolation', default='random', choices=['', 'random', *_INTERPOLATIONS],
                   metavar='NAME', help='(%(default)s)')
    g.add_argument('--drop', type=float, default=0.0, metavar='P')
    g.add_argument('--drop-connect', type=float, metavar='P', help='old name of --drop-path')
    g.add_argument('--drop-path', type=float, metavar='P')
    g.add_argument('--drop-block', type=float, metavar='P')

    g = p.add_argument_group('Several resolutions', 'Batches of several image sizes within an epoch.')
    g.add_argument('--train-img-sizes', type=int, nargs='+', metavar='N')
    g.add_argument('--train-batch-sizes', type=int, nargs='+', metavar='N', help='one per image size')
    g.add_argument('--train-size-probs', type=float, nargs='+', metavar='P', help='one per image size')
    g.add_argument('--train-size-schedule', default='constant', choices=['constant', 'progressive'])
    g.add_argument('--train-size-schedule-spread', type=float, default=0.65, metavar='S')
    g.add_argument('--train-size-random-mix', type=float, default=0.1, metavar='P')
    g.add_argument('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, metavar='N')
    g.add_argument('--variable-batch-loss-scale', default='none', choices=['none', 'sqrt', 'linear'],
                   help='scale the loss of a batch by its size over --batch-size (%(default)s)')

    g = p.add_argument_group('Batch norm')
    g.add_argument('--bn-momentum', type=float, metavar='M')
    g.add_argument('--bn-eps', type=float, metavar='E')
    g.add_argument('--sync-bn', action='store_true', help='statistics over all processes')
    g.add_argument('--dist-bn', default='reduce', choices=['reduce', 'broadcast', ''],
                   help='what happens to running statistics after an epoch (%(default)s)')
    g.add_argument('--split-bn', action='store_true', help='separate norms per augmentation split')

    g = p.add_argument_group('Moving average of weights')
    g.add_argument('--model-ema', action='store_true')
    g.add_argument('--model-ema-force-cpu', action='store_true', help='keep it on the CPU; it is not validated then')
    g.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='D', help='(%(default)s)')
    g.add_argument('--model-ema-warmup', action='store_true')

    g = p.add_argument_group('Run')
    g.add_argument('--seed', type=int, default=42, metavar='S', help='(%(default)s)')
    g.add_argument('--worker-seeding', default='all', choices=['all', 'part'],
                   help='for iterable datasets; elsewhere every sample has its own seed')
    g.add_argument('--log-interval', type=int, default=50, metavar='N', help='updates between log lines (%(default)s)')
    g.add_argument('--val-interval', type=int, default=1, metavar='N', help='epochs between validations (%(default)s)')
    g.add_argument('--checkpoint-interval', '--recovery-interval', type=int, default=0, metavar='N',
                   help='updates between saved states within an epoch (0: only at its end)')
    g.add_argument('--checkpoint-hist', type=int, default=10, metavar='N', help='weights of the N best epochs are kept')
    g.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='loader processes (%(default)s)')
    g.add_argument('--save-images', action='store_true', help='save a training batch as a picture at every log line')
    g.add_argument('--pin-mem', action='store_true', help='pinned memory in the loader')
    g.add_argument('--no-prefetcher', action='store_true', help='normalise, erase and mix in the workers')
    g.add_argument('--output', default='', metavar='DIR', help='(output/train)')
    g.add_argument('--experiment', default='', metavar='NAME', help='folder in --output (date, time and model)')
    g.add_argument('--push-to-hub', default='', metavar='ORG/NAME',
                   help='publish the best weights of the last stage on the Hugging Face Hub, with a card of the run')
    g.add_argument('--hub-private', action='store_true', help='with --push-to-hub: create a private repository')
    g.add_argument('--eval-metric', default='top1', metavar='NAME', help='what best means (%(default)s)')
    g.add_argument('--tta', type=int, default=0, metavar='N', help='views averaged in validation, if the loader makes them')
    g.add_argument('--use-multi-epochs-loader', action='store_true', help='prefetch across the end of an epoch')
    g.add_argument('--log-with', nargs='+', metavar='TRACKER', help="Accelerate's trackers: tensorboard, wandb, ...")
    g.add_argument('--log-wandb', action='store_true', help='as --log-with wandb')
    g.add_argument('--wandb-project', metavar='NAME')
    g.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG')
    g.add_argument('--wandb-resume-id', default='', metavar='ID')

    g = p.add_argument_group('Distillation')
    g.add_argument('--kd-model-name', metavar='NAME', help='teacher, a timm model with weights')
    g.add_argument('--kd-distill-type', default='logit', choices=['logit', 'feature', 'token'], help='(%(default)s)')
    g.add_argument('--kd-loss-type', default='kl', choices=['kl'], help='(%(default)s)')
    g.add_argument('--distill-loss-weight', type=float, metavar='W')
    g.add_argument('--task-loss-weight', type=float, metavar='W')
    g.add_argument('--kd-temperature', type=float, default=4.0, metavar='T', help='(%(default)s)')
    g.add_argument('--kd-student-feature-dim', type=int, metavar='N')
    g.add_argument('--kd-teacher-feature-dim', type=int, metavar='N')
    g.add_argument('--kd-token-distill-type', default='soft', choices=['soft', 'hard'], help='(%(default)s)')

    p.refuse(REFUSED_TRAIN)
    return p


def create_validate_parser() -> argparse.ArgumentParser:
    """Parser for validate.py. Its defaults are timm's."""
    p = _Parser(
        prog='validate.py',
        description='Evaluate timm models on a dataset, on one or many devices.\n\n'
                    '  python validate.py --model focusnet_resnet18 --checkpoint FILE --data-dir IMAGENET '
                    '--compare resnet18.tv_in1k\n'
                    '  python validate.py --model gfnet_resnet50_96 --checkpoint FILE --data-dir IMAGENET '
                    '--budget 1 2 --curve curve.png')
    g = p.add_argument_group('Dataset')
    _dataset_options(g, split_names=False)
    g.add_argument('--split', default='validation', metavar='NAME', help='(%(default)s)')
    g.add_argument('--num-samples', type=int, metavar='N', help='for iterable datasets')
    g.add_argument('--real-labels', default='', metavar='FILE', help='JSON with the ImageNet ReaL labels')
    g.add_argument('--valid-labels', default='', metavar='FILE', help='file with the class indices that count')

    g = p.add_argument_group('Model')
    g.add_argument('--model', '-m', default='', metavar='NAME',
                   help="model, 'local-dir:FOLDER', a wildcard, 'all', or a text file with one name a line")
    g.add_argument('--pretrained', action='store_true', help='pretrained weights (implied without --checkpoint)')
    g.add_argument('--checkpoint', default='', metavar='FILE', help='file, or folder with several files')
    g.add_argument('--use-ema', action='store_true', help="the file's averaged weights")
    g.add_argument('--compare', nargs='+', default=[], metavar='MODEL', help='evaluate these on the same images, too')
    g.add_argument('--reparam', action='store_true', help='reparameterise the model for inference')
    g.add_argument('--test-pool', action='store_true', help='pool at test time')
    _input_options(g)
    g.add_argument('--use-train-size', action='store_true', help="the model's training size even where its test size differs")
    g.add_argument('--crop-mode', metavar='MODE', help='center, squash or border')
    g.add_argument('--crop-border-pixels', type=int, metavar='N')
    g.add_argument('--tf-preprocessing', action='store_true', help="TensorFlow's preprocessing (needs tensorflow)")

    g = p.add_argument_group('Dynamic inference', (
        'For models that may stop early. Budgets are multiply-adds per image, in 10⁹ (GMACs). Exits are fitted\n'
        '  on other images than they are judged on; the output says on which.'))
    g.add_argument('--anytime', action='store_true', help='accuracy and cost after every step (what dynamic models get anyway)')
    g.add_argument('--budget', type=float, nargs='+', metavar='G', help='fit exits that cost so much on average, and judge them')
    g.add_argument('--budget-rule', default='thresholds', choices=['thresholds', 'value'],
                   help='fit thresholds, or a rule on the confidences of all steps so far (%(default)s)')
    g.add_argument('--thresholds', type=float, nargs='+', action='append', metavar='T', help='judge these thresholds, one a step; may be given several times')
    g.add_argument('--strict', action='store_true', help='--thresholds must be exceeded, not reached, as in the original AnchorNet')
    g.add_argument('--geometric', action='store_true', help="fit and judge the 39 points of GFNet's paper (--eval_mode 2 of the original)")
    g.add_argument('--stored-results', action='store_true', help='show the results kept in the model, without data (--eval_mode 0)')
    g.add_argument('--stored-thresholds', action='store_true', help='judge the exits kept in the model (--eval_mode 1)')
    g.add_argument('--calibrate-split', metavar='NAME', help=(
        "split to fit on, or 'half': fit on a random half of --split, judge on the other (default: the validation split if "
        'another one is judged on, else that to train on; half where there is none)'))
    g.add_argument('--calibrate-samples', type=int, metavar='N', help='fit on so many random images (all)')
    g.add_argument('--exit-table', metavar='FILE', help='judge on a table of --save-exit-table (or one of AnchorNet, .pth), without running the model')
    g.add_argument('--steps', type=int, metavar='N', help='read only the first N steps of tables (all)')
    g.add_argument('--anchor-gmacs', type=float, metavar='G', help='what AnchorNet itself is charged with in tables of AnchorNet, without a --model that knows (0.06; the published list: 0.08)')
    g.add_argument('--calibrate-table', metavar='FILE', help='fit on this table (default with --exit-table: one half of it, judged on the other)')
    g.add_argument('--save-exit-table', metavar='FILE', help='keep what was measured on --split; .pth: in the format of AnchorNet')
    g.add_argument('--save-budgets', metavar='FOLDER', help='export the model, with the exits for --budget (default: a dozen of budgets) in its config.json')
    g.add_argument('--confidence', choices=[*CONFIDENCES, 'all'], help=(
        "of a cascade; 'all' compares all of them and both final rules, and takes what is best on the images to fit on"))
    g.add_argument('--final-rule', choices=FINAL_RULES, help='of a cascade: which answer is the final one')
    g.add_argument('--fold-nets', nargs='+', metavar='FILE', help=(
        'score each image with the one of these confidence nets that has not seen it: a net for each fold, or a folder of '
        "them, e.g. RUN/folds of a run of train.py, which also knows the images' folds"))
    g.add_argument('--fold-dir', metavar='DIR', help=(
        'folder with a folder of images for each of --fold-nets (e.g. split_part_1 to 5), or a CSV with the columns file '
        'and fold'))
    g.add_argument('--save-predictions', metavar='FILE', help=(
        'write file, answer, truth, steps used and confidence of every image (CSV), by the exits of one --budget or one list '
        "of --thresholds, else by the model's own, else of all steps; of the images that the budget is judged on"))
    g.add_argument('--curve', metavar='FILE', help='picture of accuracy over multiply-adds, with the --compare models (needs matplotlib)')

    g = p.add_argument_group('Run')
    g.add_argument('-b', '--batch-size', type=int, default=256, metavar='N', help='per process (%(default)s)')
    g.add_argument('-j', '--workers', type=int, default=4, metavar='N', help='(%(default)s)')
    g.add_argument('--log-freq', type=int, default=10, metavar='N', help='batches between updates of the progress bar')
    g.add_argument('--no-prefetcher', action='store_true', help='normalise in the workers')
    g.add_argument('--pin-mem', action='store_true', help='pinned memory in the loader')
    g.add_argument('--retry', action='store_true', help='halve the batch size when memory does not suffice')
    g.add_argument('--seed', type=int, default=0, metavar='S', help='(%(default)s)')
    g.add_argument('--metrics-avg', default='', choices=['', 'micro', 'macro', 'weighted'],
                   help='also print precision, recall and F1, averaged so (needs scikit-learn)')
    g.add_argument('--results-file', default='', metavar='FILE', help='keep the results')
    g.add_argument('--results-format', default='csv', choices=['csv', 'json'], help='(%(default)s)')

    g = p.add_argument_group('Device', 'Processes, devices and precision are set by accelerate launch or accelerate config.')
    _device_options(g)
    p.refuse(REFUSED_VALIDATE)
    return p
