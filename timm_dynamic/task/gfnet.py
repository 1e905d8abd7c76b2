"""Training of glance-and-focus networks (GFNet): in three stages with a policy gradient, or end to end.

Papers:
* `Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy in Image Classification` - Wang et al.,
  NeurIPS 2020, https://arxiv.org/abs/2010.05300
* `Glance and Focus Networks for Dynamic Visual Recognition` - Huang et al., T-PAMI 2023,
  https://arxiv.org/abs/2201.03014

Shapes: T steps, of which S = T - 1 see a patch; B images; C classes.
"""
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.utils import unwrap_model
from torch import nn

from ..exits.collect import with_confidence
from ..loss.policy_gradient import (
    PolicyGradientTerms,
    compute_log_prob,
    compute_ppo_terms,
    compute_returns,
    compute_rewards,
    normalise_returns,
)
from ..models.gfnet import GFNet
from .base import OneModuleTask

_logger = logging.getLogger(__name__)

OWN_FIRST_HEADS = ('first', '1')  # names of heads that classify only the glance's features, for step 1


class GlanceFocusModule(nn.Module):
    """A GFNet and the heads that only its training needs, in one module to wrap.

    Args:
        model: The network.

    Attributes:
        heads: Linear layers. 'global_aux' and 'local_aux' classify the features of one encoder. There is no
            'global_aux' if the model has a head for step 1 that does the same. 'critic' predicts returns from the patch
            policy's hidden state.
    """

    def __init__(self, model: GFNet) -> None:
        super().__init__()
        self.model = model
        self.own_first_head = model.classifier.head_name(0) in OWN_FIRST_HEADS
        names = ['local_aux'] if self.own_first_head else ['global_aux', 'local_aux']
        dd = get_device_dtype(model)
        self.heads = nn.ModuleDict({name: nn.Linear(model.feature_size, model.num_classes, **dd) for name in names})
        self.heads['critic'] = nn.Linear(model.policy.hidden_size, 1, **dd)

    def no_weight_decay(self) -> set[str]:
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def classifier_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the step classifier, which have another learning rate than the encoders and their heads."""
        classifier = self.model.classifier
        first = set(classifier.heads[classifier.head_name(0)].parameters()) if self.own_first_head else set()
        return [p for p in classifier.parameters() if p not in first]

    def forward(self, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Run all steps, or only the patch policy.

        Args:
            x: Images [B, in_chans, height, width] to run all steps; or the 'maps' of an earlier call [S, B, channels,
                h, w] to run only the patch policy on them.
            **kwargs: Arguments of `GFNet.forward_all`.

        Returns:
            For images the outputs of `GFNet.forward_all`, 'aux_logits' [T, B, C] and, if the patch policy has run, the
            critic's 'values' [S, B]. For maps 'action_means' [S, B, 2] and 'values'.
        """
        if x.ndim == 5:
            return self._run_policy(x)
        out = self.model(x, all_steps=True, **kwargs)
        glance, patches = out['features'][:1], out['features'][1:]
        first = out['logits'][:1] if self.own_first_head else self.heads['global_aux'](glance)
        out['aux_logits'] = torch.cat([first, self.heads['local_aux'](patches)])
        if 'policy_hidden' in out:
            out['values'] = self._compute_values(out['policy_hidden'])
        return out

    def _run_policy(self, maps: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, means, states = None, [], []
        for feature_map in maps:
            mean, hidden = self.model.policy(feature_map, hidden)
            means.append(mean)
            states.append(hidden)
        return {'action_means': torch.stack(means), 'values': self._compute_values(torch.stack(states))}

    def _compute_values(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # float32, like the patch policy
            critic: Any = self.heads['critic']
            return critic(hidden.to(critic.weight.dtype)).squeeze(-1)


class _GlanceFocusTask(OneModuleTask):
    """Base class of the tasks: trains some parameters of a `GlanceFocusModule`.

    Args:
        model: The network.
        trains: Prefixes of the names of the trained parameters.
        smoothing: Label smoothing.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log which parameters are trained.
    """

    def __init__(
            self,
            model: GFNet,
            trains: tuple[str, ...],
            smoothing: float = 0.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not isinstance(model, GFNet):
            raise ValueError(f'Expected a GFNet model, got {type(model).__name__}.')
        if not model.num_classes:
            raise ValueError('GFNet training needs a model with a classifier, got num_classes=0.')
        self.smoothing = smoothing
        self.trainable_module = GlanceFocusModule(model)
        for name, parameter in self.trainable_module.named_parameters():
            parameter.requires_grad_(name.startswith(trains))

    def _log_trained(self) -> None:
        """Log which parameters are trained. Call this after all others are frozen."""
        if self.verbose:
            trained = {name: p.numel() for name, p in self.trainable_module.named_parameters() if p.requires_grad}
            parts = dict.fromkeys('.'.join(name.split('.')[:2]) for name in trained)
            _logger.info(
                f'{type(self).__name__}: {sum(trained.values()) / 1e6:.2f} M parameters are trained: '
                f'{", ".join(parts)}.')

    @property
    def module(self) -> GlanceFocusModule:
        """The trained module, unwrapped."""
        return unwrap_model(self.trainable_module)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Return the network, without auxiliary heads."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).model if module is not None else None

    def get_clip_parameters(self, exclude_head: bool = False) -> Any:
        """Return the parameters whose gradients are clipped, without those of classifiers if `exclude_head`."""
        module = self.module
        return [p for name, p in module.named_parameters()
                if p.requires_grad and not (exclude_head and name.startswith(('heads.', 'model.classifier.')))]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return auxiliary heads and critic as {name: {'weight', 'bias'}}."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:  # a compiled module has no truth value
            return {}
        return {name: head.state_dict() for name, head in unwrap_model(module).heads.items()}

    def load_task_state(
            self,
            state: Mapping[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Load auxiliary heads and critic. Unless `strict`, a missing one keeps its initial values."""
        heads = unwrap_model(module if module is not None else self.get_trainable_module(ema=ema)).heads
        for name, head in heads.items():
            if state and name in state:
                head.load_state_dict(state[name])
            elif strict:
                raise RuntimeError(f"the task state has no '{name}'")

    def _classification_terms(
            self,
            out: Mapping[str, torch.Tensor],
            target: torch.Tensor,
            aux_weight: float,
    ) -> dict[str, torch.Tensor]:
        # If step 1 has a separate head, the recurrent classifier is trained on the glance in addition.
        logits = out['logits']
        if 'rnn_logits' in out:
            logits = torch.cat([out['rnn_logits'][None], logits[1:]])
        ce, aux = (self._cross_entropy(part, target) for part in (logits, out['aux_logits']))
        return {
            'loss': ce.mean() + aux_weight * aux.mean(),
            'output': out['logits'][-1],
            'step_ce': ce.detach(),
            'step_aux': aux.detach(),
            **_step_accuracy(out['logits'], target),
        }

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each step [T]. Targets are class indices, or probabilities (mixup)."""
        repeated = target.expand(len(logits), *target.shape).flatten(0, 1)
        ce = F.cross_entropy(
            logits.flatten(0, 1).float(), repeated, reduction='none',
            label_smoothing=0. if target.is_floating_point() else self.smoothing)  # mixup has already smoothed them
        return ce.unflatten(0, logits.shape[:2]).mean(dim=1)


@torch.no_grad()
def _step_accuracy(logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    hard = target.argmax(dim=-1) if target.is_floating_point() else target
    return {'step_top1': 100 * (logits.argmax(dim=-1) == hard).float().mean(dim=1)}


_CLASSIFICATION = (
    'model.global_encoder', 'model.local_encoder', 'model.classifier', 'heads.global_aux', 'heads.local_aux')


class GlanceFocusTask(_GlanceFocusTask):
    """Train encoders and step classifier: stages 1 ('warmup') and 3 ('finetune').

    The loss is (Σ_t CE(step logits) + aux_weight · Σ_t CE(auxiliary logits)) / T.

    Args:
        model: The network.
        positions: Positions of the patches: 'random' (uniform, stage 1) or 'policy' (sampled around the means of the
            frozen patch policy, stage 3).
        aux_weight: Weight of the auxiliary losses.
        freeze_global: Freeze the global encoder, in eval mode. Its classifier is frozen, too, if the model has the
            classes of the encoder's pretrained weights.
        std: Standard deviation of the patch policy's actions.
        smoothing: Label smoothing.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log which parameters are trained.
    """

    def __init__(
            self,
            model: GFNet,
            positions: str = 'random',
            aux_weight: float = 1.,
            freeze_global: bool = False,
            std: float = 0.1,
            smoothing: float = 0.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        if positions not in ('random', 'policy'):
            raise ValueError(f"positions must be 'random' or 'policy', got {positions!r}.")
        super().__init__(model, _CLASSIFICATION, smoothing, device, dtype, verbose)
        self.positions, self.aux_weight, self.std = positions, aux_weight, std
        if freeze_global:
            module = self.module
            self.frozen += (model.global_encoder,)
            if model.num_classes == model.global_encoder.pretrained_cfg['num_classes']:
                heads = model.classifier.heads
                self.frozen += (
                    heads[model.classifier.head_name(0)] if module.own_first_head else module.heads['global_aux'],)
            for part in self.frozen:
                part.requires_grad_(False)
        self._log_trained()

    def _sample_positions(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = (self.module.model.num_steps - 1, len(x), 2)
        if self.positions == 'random':
            return {'actions': torch.rand(shape, device=x.device)}
        return {'noise': self.std * torch.randn(shape, device=x.device)}

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss.

        Args:
            input: Images [B, in_chans, S, S].
            target: Class indices [B], int64, or probabilities [B, C].

        Returns:
            'loss', 'output' (logits of the last step [B, C]), and for logging, per step [T]: 'step_ce', 'step_aux' and
            'step_top1' (%).
        """
        return self._classification_terms(
            self.trainable_module(input, **self._sample_positions(input)), target, self.aux_weight)

    def predict(self, model: nn.Module, x: Any) -> dict[str, torch.Tensor]:
        """See `TaskHooks.predict`. In stage 1 the patch policy is not trained yet, so positions are random."""
        if self.positions != 'random':
            return super().predict(model, x)
        return with_confidence(model.forward_all(x, **self._sample_positions(x))['logits'])  # type: ignore[operator]


class EndToEndTask(_GlanceFocusTask):
    """Train all parts together, without policy gradient.

    Patches are cut with bilinear interpolation, so that the gradient of the loss reaches the patch policy.

    Args:
        model: The network.
        aux_weight: Weight of the auxiliary losses.
        std: Standard deviation of noise on the actions, for exploration; 0 for none.
        smoothing: Label smoothing.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log which parameters are trained.
    """

    def __init__(
            self,
            model: GFNet,
            aux_weight: float = 1.,
            std: float = 0.,
            smoothing: float = 0.,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(model, (*_CLASSIFICATION, 'model.policy'), smoothing, device, dtype, verbose)
        self.aux_weight, self.std = aux_weight, std
        self._log_trained()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss, see `GlanceFocusTask.forward`."""
        noise = None
        if self.std:
            noise = self.std * torch.randn(self.module.model.num_steps - 1, len(input), 2, device=input.device)
        out = self.trainable_module(input, noise=noise, differentiable=True)
        return self._classification_terms(out, target, self.aux_weight)


class PatchPolicyTask(_GlanceFocusTask):
    """Train the patch policy with proximal policy optimisation (PPO): stage 2 ('policy'). All other parts are frozen.

    The reward of an action is the increase of the true class's probability. Returns are normalised over all actions
    and over the images of all processes. In the first update on a batch, all ratios are 1. Further updates
    (`num_updates` > 1) reuse the recorded feature maps. The encoders run only once per batch.

    Args:
        model: The network.
        num_updates: Updates per batch (K in the paper).
        gamma: Discount of later rewards.
        std: Standard deviation of the patch policy's actions.
        epsilon: See `compute_ppo_terms`.
        value_coeff: See `compute_ppo_terms`.
        entropy_coeff: See `compute_ppo_terms`.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log which parameters are trained.
    """

    def __init__(
            self,
            model: GFNet,
            num_updates: int = 1,
            gamma: float = 0.7,
            std: float = 0.1,
            epsilon: float = 0.2,
            value_coeff: float = 0.5,
            entropy_coeff: float = 0.01,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(model, ('model.policy', 'heads.critic'), 0., device, dtype, verbose)
        if num_updates < 1:
            raise ValueError(f'num_updates must be at least 1, got {num_updates}.')
        self.num_updates = num_updates
        self.gamma, self.std = gamma, std
        self.epsilon, self.value_coeff, self.entropy_coeff = epsilon, value_coeff, entropy_coeff
        self.frozen += (self.module,)
        self._memory: dict[str, torch.Tensor] = {}
        self._log_trained()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sample actions, and compute the loss of the first update.

        Args:
            input: Images [B, in_chans, S, S].
            target: Class indices [B], int64.

        Returns:
            'loss', 'output' (logits of the last step [B, C]), and for logging: 'entropy', 'value' (the critic's error),
            'spread' (standard deviation of the action means over images; near 0, the patch policy selects the same
            positions in all images), 'step_top1' (%) [T] and 'patch_reward' [S].
        """
        if target.is_floating_point():
            raise ValueError(
                "The stage 'policy' needs one true class per image. It cannot be combined with mixup or cutmix.")
        noise = self.std * torch.randn(self.module.model.num_steps - 1, len(input), 2, device=input.device)
        out = self.trainable_module(input, noise=noise)
        rewards = compute_rewards(out['logits'], target)
        returns = normalise_returns(compute_returns(rewards, self.gamma), reduce=_sum_over_processes)
        log_prob = compute_log_prob(out['actions'], out['action_means'], self.std)
        self._memory = {
            'maps': out['maps'], 'actions': out['actions'], 'log_prob': log_prob.detach(), 'returns': returns}
        terms = self._terms(log_prob, out['values'])
        return {
            'loss': terms.loss,
            'output': out['logits'][-1].detach(),
            'value': terms.value.detach(),
            'entropy': terms.entropy,
            'spread': out['action_means'].detach().float().std(dim=1, correction=0).mean(),
            'patch_reward': rewards.mean(dim=1),
            **_step_accuracy(out['logits'], target),
        }

    def further_losses(self) -> Iterator[torch.Tensor]:
        """See `TaskHooks.further_losses`."""
        for _ in range(self.num_updates - 1):
            yield self._recompute_terms().loss

    @torch.no_grad()
    def diagnose(self) -> dict[str, torch.Tensor]:
        """Measure how far the updates on the last batch moved the policy: 'approx_kl' and 'clip_fraction', scalars."""
        terms = self._recompute_terms()
        self._memory = {}
        return {'approx_kl': terms.approx_kl, 'clip_fraction': terms.clip_fraction}

    def _recompute_terms(self) -> PolicyGradientTerms:
        """Run the patch policy on the recorded feature maps."""
        out = self.trainable_module(self._memory['maps'])
        return self._terms(compute_log_prob(self._memory['actions'], out['action_means'], self.std), out['values'])

    def _terms(self, log_prob: torch.Tensor, values: torch.Tensor) -> PolicyGradientTerms:
        return compute_ppo_terms(
            log_prob, self._memory['log_prob'], values, self._memory['returns'], self.std, self.epsilon,
            self.value_coeff, self.entropy_coeff)


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values
