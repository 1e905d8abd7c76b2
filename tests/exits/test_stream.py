import copy
import gc
import itertools
import shutil
import weakref

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_dynamic  # noqa: F401
from timm_dynamic.exits import ExitStream, early_exit, stream
from timm_dynamic.exits.policy import ExitPolicy
from timm_dynamic.models.dynamic_net import DynamicNet


class Given(DynamicNet):
    """Logits are the input [B, C, T, S]: column 0 is what step t says. Notes the batches it runs."""

    def __init__(self, num_steps=3, num_classes=4):
        super().__init__(num_steps, num_classes)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def init_state(self, x):
        if x.ndim != 4 or x.shape[1:3] != (self.num_classes, self.num_steps):
            raise ValueError(f'Expected [batch, {self.num_classes}, {self.num_steps}, side], got {list(x.shape)}.')
        return {'image': x}

    def step(self, t, state):
        assert not torch.is_grad_enabled()
        before = state.get('sum', torch.zeros(len(state['image'])))
        assert torch.equal(before, state['image'][:, 0, :t, 0].sum(1))  # each row still with its own image
        self.seen.append((t, len(before)))
        return self.scale * state['image'][:, :, t, 0], {**state, 'sum': state['image'][:, 0, :t + 1, 0].sum(1)}


@pytest.fixture
def net():
    return Given().eval()


def make_images(n, seed=0, steps=3, side=2):
    return 3 * torch.randn(n, 4, steps, side, generator=torch.Generator().manual_seed(seed))


THRESHOLDS = [0.9, 0.8, 0.]


def check(results, model, batches, thresholds=THRESHOLDS, atol=0.):
    results = list(results)
    assert [len(r.logits) for r in results] == [len(x) for x in batches]
    for r, x in zip(results, batches):
        expected = early_exit(model, x, thresholds)
        for given, wanted in zip(r, expected):
            assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape)
            torch.testing.assert_close(given, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize('sizes', [
    [100], [32, 32, 32], [1] * 70, [33, 1, 31, 64, 3], [0, 5, 0, 0, 40, 0], [0], [8] * 30])
@pytest.mark.parametrize('pad', [False, True])
@pytest.mark.parametrize('max_pending', [None, 1, 20])
def test_equals_early_exit_bit_for_bit(net, sizes, pad, max_pending):
    batches = make_images(sum(sizes)).split(sizes)
    run = ExitStream(net, THRESHOLDS, batch_size=16, pad=pad, max_pending=max_pending).run(batches)
    check(run, net, batches)
    assert run.rows[0] == sum(sizes)
    if sum(sizes) > 60:
        assert run.rows[0] > run.rows[1] > run.rows[2] > 0
    assert run.peak_queued <= 3 * 15 + max(sizes)


@pytest.mark.parametrize(('name', 'channels_last'), [
    ('test_gfnet', False), ('test_gfnet', True), ('test_anchornet_patch', True), ('test_clcnet', False)])
def test_families(name, channels_last):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(50, 3, model.img_size, model.img_size, generator=torch.Generator().manual_seed(1))
    if channels_last:
        model, images = (v.to(memory_format=torch.channels_last) for v in (model, images))
    batches = images.split(9)
    thresholds = [early_exit(model, images, [2.] * t + [0.] * (model.num_steps - t)).confidence.quantile(0.6).item()
                  for t in range(model.num_steps)]
    used = early_exit(model, images, thresholds).steps_used
    assert len(used.unique()) == model.num_steps
    run = ExitStream(model, thresholds, batch_size=8).run(batches)
    check(run, model, batches, thresholds, atol=1e-5)
    assert run.rows == [int((used > t).sum()) for t in range(model.num_steps)]


def test_simulated_exit_bit_for_bit_where_steps_see_the_same_batches():
    """Nobody stops before the end: the stream runs each batch as a plain loop over the steps would."""
    torch.manual_seed(0)
    model = timm.create_model('test_gfnet').eval()
    batches = torch.randn(16, 3, 96, 96).split(8)
    for r, x in zip(ExitStream(model, [2., 2., 0.], batch_size=8).run(batches), batches, strict=True):
        with torch.no_grad():
            *_, logits = model.forward_steps(x)
        assert torch.equal(r.logits, logits)


def test_cascade_of_views_with_targets():
    torch.manual_seed(0)
    model = timm.create_model('test_clcnet').eval()
    views = [(torch.randn(n, 3, 48, 48), torch.randn(n, 3, 96, 96)) for n in (3, 5)]
    with_targets = [((a, b), torch.arange(len(a))) for a, b in views]
    thresholds = [early_exit(model, views[1], [0., 0.]).confidence.median().item(), 0.]
    plain = list(ExitStream(model, thresholds, batch_size=4).run(views))
    for r, s, (x, target) in zip(plain, ExitStream(model, thresholds, 4).run(with_targets), with_targets):
        torch.testing.assert_close(r.logits, early_exit(model, x, thresholds).logits, rtol=0, atol=1e-5)
        assert torch.equal(r.logits, s.logits)
        assert r.target is None
        assert s.target is target


def test_loader_gives_targets_with_results_of_its_batches(net):
    images, targets = make_images(50), torch.arange(50)
    loader = DataLoader(TensorDataset(images, targets), batch_size=12)
    results = list(ExitStream(net, THRESHOLDS, batch_size=16).run(loader))
    assert torch.equal(torch.cat([r.target for r in results]), targets)
    check(results, net, images.split(12))
    logits, steps_used, confidence = results[0]
    assert len(logits) == len(steps_used) == len(confidence) == 12
    check(ExitStream(net, THRESHOLDS).run(DataLoader(TensorDataset(images), batch_size=12)), net, images.split(12))


class LateStop(ExitPolicy):
    """Stops where confidence has fallen, which it tells from the history alone."""
    num_steps = 3

    def __call__(self, history):
        t = history.shape[1]
        return history[:, -1] < history[:, 0] if t == 2 else torch.full((len(history),), t == 3)

    def state_dict(self):
        return {}

    @classmethod
    def from_state_dict(cls, state):
        return cls()


def test_policies_see_the_history_of_their_own_rows(net):
    batches = make_images(100).split(10)
    check(ExitStream(net, LateStop(), batch_size=16).run(batches), net, batches, LateStop())


def test_steps_run_on_full_batches_deepest_first(net):
    batches = make_images(640).split(32)
    run = ExitStream(net, THRESHOLDS, batch_size=16).run(iter(batches))
    results = list(run)
    partial = [t for t, n in net.seen if n < 16]
    assert all(n <= 16 for _, n in net.seen)
    assert len(partial) <= 3  # one a step, at the end
    assert len(net.seen) == sum(run.runs) <= sum(n / 16 + 1 for n in run.rows)
    assert sum(run.rows) == sum(int(r.steps_used.sum()) for r in results)


def test_padded_batches_are_full(net):
    list(ExitStream(net, THRESHOLDS, batch_size=16, pad=True).run(make_images(50).split(7)))
    assert {n for _, n in net.seen} == {16}


@pytest.mark.parametrize('scale', [1, 10])
def test_memory_and_calls_do_not_grow_with_the_stream(net, scale):
    """What waits is bounded, results are let go, and steps are not run more often per image."""
    alive = []

    def source():
        for i in range(20 * scale):
            batch = make_images(16, seed=i)
            alive.append(weakref.ref(batch))
            assert sum(ref() is not None for ref in alive) <= 2  # the batches themselves are let go
            yield batch

    run = ExitStream(net, THRESHOLDS, batch_size=16, max_pending=128).run(source())
    peak_pages = 0
    for _ in run:
        peak_pages = max(peak_pages, len(run._pages))
    assert run.peak_queued <= 3 * 15 + 16
    assert peak_pages <= 128 // 16 + 2
    assert len(run._pages) == len(run._inputs) == 0
    assert max(len(queue.spare) for queue in run._queues) <= 2
    assert run.runs[0] == 20 * scale


def test_one_large_batch_costs_as_much_per_image(net, monkeypatch):
    looks = []
    all_stopped = stream.StreamRun._all_stopped

    def count(run, last):
        before = run._whole_pages
        complete = all_stopped(run, last)
        looks.append(run._whole_pages - before + 1)  # pages that were looked at
        return complete

    monkeypatch.setattr(stream.StreamRun, '_all_stopped', count)
    images = make_images(1600)
    run = ExitStream(net, THRESHOLDS, batch_size=16).run([images])
    check(run, net, [images])
    assert sum(looks) <= sum(run.runs) + 100 + 1  # once a step, and once a page


def test_rare_late_steps_do_not_hold_results_back(net):
    """One image of the first batch goes on, and no other ever does."""
    batches = [torch.zeros(16, 4, 3, 2) for _ in range(50)]
    for x in batches:
        x[:, 0] = 5
    batches[0][0, 0, 0] = 0  # not sure at step 1
    read = []
    exits = ExitStream(net, THRESHOLDS, batch_size=16, max_pending=64)
    results = exits.run((read.append(i), x)[1] for i, x in enumerate(batches))
    assert next(results).steps_used.tolist() == [2] + [1] * 15
    assert len(read) == 5  # 80 images had come when the limit of 64 was passed


@pytest.mark.parametrize('make', [list, iter, lambda batches: (x for x in batches)])
def test_any_iterable_and_none_at_all(net, make):
    batches = make_images(40).split(10)
    check(ExitStream(net, THRESHOLDS).run(make(batches)), net, batches)
    assert list(ExitStream(net, THRESHOLDS).run(make([]))) == []


def test_changing_image_sizes(net):
    batches = [make_images(10, seed=i, side=2 + i // 2 % 2) for i in range(8)]
    check(ExitStream(net, THRESHOLDS, batch_size=16).run(batches), net, batches)
    batches = [make_images(3), make_images(3, side=3), make_images(0, side=5), make_images(3, side=3)]
    check(ExitStream(net, THRESHOLDS, batch_size=4).run(batches), net, batches)


@pytest.mark.parametrize('bad', [ZeroDivisionError, ValueError])
def test_results_so_far_come_before_an_error_of_the_source(net, bad):
    batches = make_images(50).split(10)

    def source():
        yield from batches
        if bad is ZeroDivisionError:
            raise ZeroDivisionError
        yield torch.zeros(2, 3, 3, 2)  # which the model does not take

    run = ExitStream(net, THRESHOLDS, batch_size=16).run(source())
    results = list(itertools.islice(run, 5))
    with pytest.raises(bad):
        next(run)
    check(results, net, batches)
    assert list(run) == []


@pytest.mark.parametrize('num_batches', [0, 3])
def test_nothing_is_kept_after_an_error(net, num_batches):
    def source():
        yield from make_images(48).split(16)[:num_batches]
        raise ZeroDivisionError

    gc.collect()
    gc.disable()  # what is in no cycle goes at once: queues, and the workers of a loader
    try:
        run = ExitStream(net, THRESHOLDS, batch_size=16).run(source())
        kept = weakref.ref(run)
        with pytest.raises(ZeroDivisionError):
            list(run)
        del run
        assert kept() is None
    finally:
        gc.enable()


def test_complete_results_come_before_an_error_of_the_model(net):
    batches = make_images(200).split(10)
    step = net.step

    def fails(t, state):
        if len(net.seen) >= 12:
            raise RuntimeError('out of order')
        return step(t, state)

    net.step = fails
    results, run = [], ExitStream(net, THRESHOLDS, batch_size=16).run(batches)
    with pytest.raises(RuntimeError, match='out of order'):
        results.extend(run)
    del net.step
    assert 2 < len(results) < 12
    check(results, net, batches[:len(results)])


def test_streams_share_a_model_and_do_not_mix(net):
    a, b = make_images(60, seed=1).split(6), make_images(60, seed=2).split(6)
    exits = ExitStream(net, THRESHOLDS, batch_size=16)
    runs = exits.run(a), exits.run(b)
    taken = [[], []]
    for _ in range(10):
        for results, run in zip(taken, runs):
            results.append(next(run))
    check(taken[0], net, a)
    check(taken[1], net, b)


def test_results_are_the_callers(net):
    batches = make_images(48).split(16)
    results = []
    for r in ExitStream(net, THRESHOLDS, batch_size=16).run(batches):
        results.append(r.logits.clone())
        r.logits.fill_(torch.nan)
    assert not torch.cat(results).isnan().any()


def test_grad_mode_is_the_callers_between_results_and_inputs_may_need_gradients(net):
    x = make_images(40).requires_grad_()
    for r in ExitStream(net, THRESHOLDS, batch_size=16).run(x.split(10)):
        assert torch.is_grad_enabled()
        assert not r.logits.requires_grad


def test_closing_early(net):
    run = ExitStream(net, THRESHOLDS, batch_size=16).run(make_images(160).split(10))
    next(run)
    run.close()
    assert list(run) == []


def test_autocast():
    torch.manual_seed(0)
    model = timm.create_model('test_gfnet').eval()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        results = list(ExitStream(model, [0.102, 0.102, 0.], batch_size=8).run(torch.randn(20, 3, 96, 96).split(5)))
    assert {r.logits.dtype for r in results} == {torch.bfloat16}
    assert {r.confidence.dtype for r in results} == {torch.float32}


class Linear(DynamicNet):
    """A small network that can be compiled."""

    def __init__(self):
        super().__init__(num_steps=2, num_classes=4)
        self.layer = torch.nn.Linear(24, 4)

    def init_state(self, x):
        return {'image': x}

    def step(self, t, state):
        memory = self.layer(state['image'].flatten(1)) + (state['memory'] if t else 0)
        return 9 * memory.tanh(), {**state, 'memory': memory}


@pytest.mark.parametrize('backend', ['eager', 'aot_eager', pytest.param('inductor', marks=pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'clang++'))), reason='there is no C++ compiler'))])
def test_compiled_steps_see_one_shape(backend):
    torch.manual_seed(0)
    model = Linear().eval()
    batches = make_images(30).split(7)
    shapes = set()

    def watch(graph, example_inputs):
        shapes.update(len(v) for v in example_inputs if isinstance(v, torch.Tensor) and v.ndim == 4)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    model.compile_steps(backend=watch)
    assert model.has_compiled_steps
    run = ExitStream(model, [0.95, 0.], batch_size=8).run(batches)
    check(run, model, batches, [0.95, 0.], atol=1e-5)
    assert run.rows[0] > run.rows[1] > 0
    assert shapes == {8}


def test_every_step_of_every_model_is_compiled():
    """torch.compile gives up after eight variants of a function: five steps, or two models, must not add up."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for _ in range(5):
        model = Linear().eval()
        model.compile_steps(backend=count)
        list(ExitStream(model, [2., 0.], batch_size=8).run([make_images(8)]))
    assert len(graphs) == 5 * 2


class Overwriting(Given):
    """Steps as CUDA graphs: what one gave is lost with the next run of any of them."""
    has_compiled_steps = True

    def __init__(self):
        super().__init__()
        self.given = []

    def run_step(self, t, state):
        for value in self.given:
            value.fill_(torch.nan)
        logits, confidence, state = super().run_step(t, state)
        state = {name: value.clone() for name, value in state.items()}
        self.given = [logits, confidence, *state.values()]
        return logits, confidence, state


def test_steps_may_overwrite_what_they_gave(net):
    batches = make_images(90).split(9)
    check(ExitStream(Overwriting().eval(), THRESHOLDS, batch_size=16).run(batches), net, batches)


def test_copies_are_not_compiled(net):
    net.compile_steps(backend='eager')
    assert not copy.deepcopy(net).has_compiled_steps


def test_bad_use(net):
    with pytest.raises(ValueError, match='Expected 3 thresholds'):
        ExitStream(net, [0.5])
    for kwargs in (dict(batch_size=0), dict(max_pending=0)):
        with pytest.raises(ValueError, match='Expected a positive batch size and max_pending'):
            ExitStream(net, THRESHOLDS, **kwargs)
    for bad in (make_images(4).numpy(), {'image': make_images(4)}, None):
        with pytest.raises(ValueError, match=f'Expected images as a tensor.*, got {type(bad).__name__}'):
            list(ExitStream(net, THRESHOLDS).run([bad]))
    with pytest.raises(ValueError, match='A Linear has no steps to exit after'):
        ExitStream(torch.nn.Linear(2, 2), THRESHOLDS)
    exits = ExitStream(net, THRESHOLDS)
    with pytest.raises(ValueError, match='eval mode'):
        exits.run([]) if net.train() else None
    with pytest.raises(ValueError, match='eval mode'):
        ExitStream(net, THRESHOLDS)


def test_inference_mode(net):
    batches = make_images(100).split(10)
    with torch.inference_mode():
        results = list(ExitStream(net, THRESHOLDS, batch_size=16).run(batches))
        run = ExitStream(net, THRESHOLDS, batch_size=16).run(batches)
        first = next(run)
    check(results, net, batches)
    check([first, *run], net, batches)  # begun inside, ended outside
