import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import run_python
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic  # noqa: F401
from timm_dynamic.exits import ExitStream, ExitTable, collect_exit_table, early_exit, solve_policy
from timm_dynamic.models.dynamic_net import DynamicNet


@pytest.fixture(scope='module', params=['recurrent', 'recurrent with first head', 'concat'])
def model(request):
    torch.manual_seed(0)
    return timm.create_model(
        'test_gfnet', step_classifier=request.param.split()[0], first_head='first' in request.param).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(24, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def full_run(model, x):
    """Logits and confidences of all steps, [T, B, C] and [T, B]."""
    with torch.inference_mode():
        logits = model(x, all_steps=True)['logits']
        return logits, logits.softmax(-1).amax(-1)


def spread_thresholds(model, x):
    """Thresholds such that about a third of those who are left leave at each step."""
    confidence, left, thresholds = full_run(model, x)[1], torch.ones(len(x), dtype=torch.bool), []
    for c in confidence:
        thresholds.append(c[left].quantile(0.67).item())
        left &= c < thresholds[-1]
    return torch.tensor(thresholds)


def simulate(logits, confidence, thresholds):
    reached = confidence >= thresholds[:, None]
    reached[-1] = True
    step = reached.int().argmax(dim=0)
    rows = torch.arange(logits.shape[1])
    return logits[step, rows], step + 1, confidence[step, rows]


def test_real_exit_is_simulated_exit_and_costs_what_the_table_says(model, images):
    check_real_exit(model, images, spread_thresholds(model, images))


def check_real_exit(model, images, thresholds):
    expected = simulate(*full_run(model, images), thresholds)
    assert len(expected[1].unique()) == model.num_steps  # some leave at every step
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        result = early_exit(model, images, thresholds)
    torch.testing.assert_close(result.logits, expected[0], rtol=0, atol=1e-5)
    assert torch.equal(result.steps_used, expected[1])
    assert result.steps_used.dtype == torch.int64
    torch.testing.assert_close(result.confidence, expected[2], rtol=0, atol=1e-5)
    table = collect_exit_table(model, [(images, torch.zeros(len(images), dtype=torch.int64))])
    predicted = table.evaluate(thresholds).gmacs * 1e9 * len(images)
    assert counter.get_total_flops() / 2 == pytest.approx(predicted, rel=1e-12)


def test_real_exit_of_a_large_model():
    torch.manual_seed(0)
    model = timm.create_model('gfnet_mobilenetv3_large_100_96').eval()
    x = torch.randn(8, 3, model.img_size, model.img_size)
    check_real_exit(model, x, spread_thresholds(model, x))


def test_sample_by_sample(model, images):
    thresholds = spread_thresholds(model, images)
    together = early_exit(model, images, thresholds)
    for i in range(0, 24, 5):
        alone = early_exit(model, images[i:i + 1], thresholds)
        torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=0, atol=1e-5)
        assert alone.steps_used[0] == together.steps_used[i]


@pytest.mark.parametrize('batch', [0, 1, 5])
def test_batch_sizes_layouts_and_thresholds_as_lists(model, images, batch):
    x = images[:batch].contiguous(memory_format=torch.channels_last)
    result = early_exit(model, x, [0.] * 3)
    assert (result.logits.shape, result.steps_used.tolist()) == ((batch, 10), [1] * batch)
    result = early_exit(model, x, [2.] * 3)
    assert result.steps_used.tolist() == [3] * batch
    torch.testing.assert_close(result.logits, full_run(model, images[:batch])[0][-1], rtol=0, atol=1e-5)


def test_autocast(model, images):
    thresholds = spread_thresholds(model, images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = early_exit(model, images, thresholds)
    assert result.logits.dtype == torch.bfloat16
    assert result.confidence.dtype == torch.float32
    assert not result.logits.requires_grad


def test_bad_use(model, images):
    with pytest.raises(ValueError, match='Expected 3 thresholds'):
        early_exit(model, images, [0.5] * 4)
    with pytest.raises(ValueError, match='must be numbers'):
        early_exit(model, images, torch.tensor([0.5, torch.nan, 0.]))
    table = ExitTable(torch.rand(50, 4), torch.rand(50, 4) < 0.5, [1, 2, 3, 4])
    with pytest.raises(ValueError, match='Expected a policy for 3 steps, got one for 4'):
        early_exit(model, images, solve_policy(table, 2e-9))
    model.train()
    try:
        for call in (lambda: early_exit(model, images, [0.5] * 3), lambda: collect_exit_table(model, [])):
            with pytest.raises(ValueError, match='eval mode'):
                call()
    finally:
        model.eval()
    with pytest.raises(ValueError, match='gives no images'):
        collect_exit_table(model, [])


def test_the_models_own_policy_is_the_default(model, images):
    thresholds = spread_thresholds(model, images)
    expected = early_exit(model, images, thresholds)
    for run in (early_exit, lambda model, x: model.forward_exit(x), lambda model, x: next(ExitStream(model).run([x]))):
        with pytest.raises(ValueError, match=r'no exit policy. Give one, or set one with model.set_budget'):
            run(model, images)
        model.set_exit(thresholds)
        result = run(model, images)
        model.clear_exit()
        assert torch.equal(result.steps_used, expected.steps_used)
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(('rule', 'found'), [
    (lambda history: torch.ones(len(history), dtype=torch.int64), r'int64 \[24\]'),
    (lambda history: torch.ones(1, dtype=torch.bool), r'bool \[1\]'),
    (lambda history: history > 0.5, r'bool \[24, 1\]'),
    (lambda history: torch.zeros(len(history)), r'float32 \[24\]'),
    (lambda history: [True] * len(history), 'list'),
    (lambda history: True, 'bool'),
])
def test_stop_rules_are_checked_alike(model, images, rule, found):
    table = ExitTable(torch.rand(24, 3), torch.rand(24, 3) < 0.5, model.step_macs)
    for run in (lambda: early_exit(model, images, rule), lambda: table.evaluate(rule),
                lambda: list(ExitStream(model, rule, batch_size=24).run([images]))):
        with pytest.raises(ValueError, match=rf'must return bool \[24\], one per image; this one returned {found}\.'):
            run()


@pytest.mark.parametrize('accelerated', [False, True])
def test_table_of_a_model(model, images, accelerated):
    target = torch.arange(24) % 10
    loader = DataLoader(TensorDataset(images, target), batch_size=10)
    table = collect_exit_table(model, loader, Accelerator(cpu=True) if accelerated else None)
    logits, confidence = full_run(model, images)
    torch.testing.assert_close(table.confidence, confidence.T, rtol=0, atol=1e-6)
    assert torch.equal(table.correct, (logits.argmax(-1) == target).T)
    top5 = (logits.topk(5).indices == target[:, None]).any(-1).T
    assert torch.equal(table.correct_top5, top5)
    assert tuple(table.step_macs) == model.step_macs


class Given(DynamicNet):
    """Logits are the input [B, T, C]."""
    step_macs = (1, 2)

    def __init__(self, num_steps=2, num_classes=3):
        super().__init__(num_steps, num_classes, in_chans=num_steps, img_size=num_classes)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def init_state(self, x):
        return {'x': x.flatten(2)[..., :self.num_classes]}

    def step(self, t, state):
        return self.scale * state['x'][:, t], state


def test_hits_with_ties_and_without_numbers():
    logits = torch.tensor([
        [[0., 0., 0.], [1., 2., 2.]],  # ties: the first class is the prediction
        [[0., 0., 0.], [1., 2., 2.]],
        [[torch.nan] * 3, [0., torch.nan, 1.]],  # never a hit
    ])
    table = collect_exit_table(Given().eval(), [(logits, torch.tensor([0, 2, 2]))])
    assert table.correct.tolist() == [[True, False], [False, False], [False, False]]


SCRIPT = '''
import sys, torch
from accelerate import Accelerator
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, TensorDataset
import timm, timm_dynamic.models.gfnet
from timm_dynamic.exits import ExitTable, solve_policy
from timm_dynamic.exits import collect_exit_table

accelerator = Accelerator(cpu=True)
model = timm.create_model('test_gfnet').eval()
folder = sys.argv[1]
weights, images, targets = torch.load(f'{folder}/inputs.pt')
model.load_state_dict(weights)
data = TensorDataset(images, targets)
loader = DataLoader(data, batch_size=4, sampler=OrderedDistributedSampler(data))
table = collect_exit_table(model, loader, accelerator)
torch.save((table.confidence, table.correct), f'{folder}/{accelerator.process_index}.pt')
'''


def test_table_is_the_same_in_several_processes(images, tmp_path):
    model, targets = timm.create_model('test_gfnet').eval(), torch.arange(11) % 10
    expected = collect_exit_table(model, [(images[:11], targets)])
    torch.save((model.state_dict(), images[:11], targets), tmp_path / 'inputs.pt')  # odd: one process gets one twice
    (tmp_path / 'collect.py').write_text(SCRIPT)
    run_python(tmp_path / 'collect.py', tmp_path, processes=2)
    for rank in range(2):
        confidence, correct = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(confidence, expected.confidence, rtol=0, atol=1e-5)
        assert torch.equal(correct, expected.correct)
