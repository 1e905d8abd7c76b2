import copy
import io
import pickle
import random
import zipfile

import pytest
import torch
from parity.confidence_reference import make_probabilities, make_state_dict, project_to_simplex, run
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic import ConfidenceNet
from timm_dynamic.layers import SparseMasks
from timm_dynamic.layers.confidence_net import GhostBatchNorm, confidence_net_filter_fn, restricted_attention, sparsemax
from timm_dynamic.utils import CheckpointError


@pytest.fixture(scope='module')
def authors():
    return make_state_dict()


@pytest.fixture(scope='module')
def net(authors):
    return ConfidenceNet.from_pretrained(authors)


def test_attention_by_hand():
    # Equal logits over two tokens: weights 1/2; token 0 lies at 0, token 1 at 1/2, between points 49 and 50 of 0..99.
    mapped = restricted_attention(torch.tensor([[0.75, 0.25]]), torch.zeros(1, 2))[0]
    assert mapped[0].item() == pytest.approx(0.5 * 0.75)  # the top of the first bump
    assert mapped[1].item() == pytest.approx(0.375 * torch.tensor(-(1 / 0.99) ** 2 / 2).exp().item(), rel=1e-5)
    second = 0.125 * torch.tensor(-(0.5 / 0.99) ** 2 / 2).exp().item()  # half a point to either side
    assert (mapped - second).abs().sort().values[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert mapped.shape == (100,)


@pytest.mark.parametrize('classes', [120, 128, 129, 140])
def test_few_and_many_classes_are_alike(net, authors, classes):
    x = make_probabilities(16, classes)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), run(authors, x)[0], rtol=0, atol=1e-5)
        twin = copy.deepcopy(net).double()
        torch.testing.assert_close(twin(x.double()).float(), net(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 5])
def test_any_number_of_classes(net, classes):
    assert net(make_probabilities(3, classes)).shape == (3,)
    assert net(make_probabilities(0, classes)).shape == (0,)


def test_score_sorts(net):
    x = make_probabilities(8, 50)
    order = torch.randperm(50)
    torch.testing.assert_close(net.score(x[:, order]), net(x))


@pytest.mark.parametrize(('x', 'message'), [
    (torch.tensor([[0.1, 0.9]]), r'sorted falling: row 0 is not\. Sort them, or use score'),
    (torch.tensor([[0.5, 0.5], [3., 1.]]), 'a minimum of 1 and a sum of 4. Of logits, take the softmax first'),
    (torch.tensor([[0.5, 0.2]]), 'a sum of 0.7'),
    (torch.tensor([[1.2, -0.2]]), 'a minimum of -0.2'),
    (torch.tensor([[torch.nan, 0.5]]), 'a sum of nan'),
    (torch.tensor([0.5, 0.5]), r'Expected probabilities \[batch, classes\], floating point, got \[2\] float32'),
    (torch.tensor([[1, 0]]), r'got \[1, 2\] int64'),
])
def test_bad_input(net, x, message):
    with pytest.raises(ValueError, match=message):
        net(x)
    if 'sorted' not in message:
        with pytest.raises(ValueError, match=message):
            net.score(x)


def test_cost_and_memory_are_linear_in_the_classes(net):
    macs = []
    for classes in (1000, 2000, 4000):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(make_probabilities(2, classes))
        macs.append(counter.get_total_flops() / 4)
    assert macs[2] - macs[1] == 2 * (macs[1] - macs[0]) == 2 * 100 * 1000  # one product with the bumps
    assert macs[0] < 0.12e6
    x = make_probabilities(4, 100_000)  # all pairs would take 160 GB
    assert net(x).shape == (4,)


def test_precision(net):
    x = make_probabilities(32, 200)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(net(x), net.score_sorted(x))
        scores = net(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, net(x))
    assert ConfidenceNet().to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_compiles_without_graph_breaks(net):
    x = make_probabilities(4, 50)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend='eager', fullgraph=True)(x), net(x))


class TestWeights:
    def test_files_of_all_kinds(self, net, authors, tmp_path):
        x = make_probabilities(8, 30)
        save_file({k: v.contiguous() for k, v in authors.items()}, tmp_path / 'authors.safetensors')
        folder = tmp_path / 'unpacked'
        folder.mkdir()
        (folder / 'model_params.json').write_text('{}')
        torch.save(authors, folder / 'network.pt')
        with zipfile.ZipFile(tmp_path / 'split(MSE_0.1).zip', 'w') as archive:
            for name in ('model_params.json', 'network.pt'):
                archive.write(folder / name, name)
        net.save(tmp_path / 'ours.safetensors')
        torch.save(net.state_dict(), tmp_path / 'ours.pth')
        cascade = {f'confidence_net.{k}': v for k, v in net.state_dict().items()}
        save_file({**cascade, 'members.0.weight': torch.zeros(1)}, tmp_path / 'cascade.safetensors')
        for name in ('authors.safetensors', 'unpacked', 'split(MSE_0.1).zip', 'ours.safetensors', 'ours.pth',
                     'cascade.safetensors'):
            again = ConfidenceNet.from_pretrained(tmp_path / name)
            assert not again.training
            assert torch.equal(again(x), net(x)), name

    def test_other_widths_come_with_the_weights(self):
        net = ConfidenceNet(
            num_steps=2, decision_dim=4, attention_dim=6, mapping_dim=20, key_dim=3, num_shared=1, num_independent=3)
        again = ConfidenceNet.from_pretrained(net.state_dict())
        x = make_probabilities(4, 12)
        assert torch.equal(again(x), net.eval()(x))

    def test_names_and_what_is_left_out(self, authors):
        out = confidence_net_filter_fn(authors)
        assert out.keys() == ConfidenceNet().state_dict().keys()
        theirs = 'tabnet.encoder.feat_transformers.1.specifics.glu_layers.1.bn.bn.weight'
        assert torch.equal(out['steps.1.norms.3.weight'], authors[theirs])
        assert out['steps.0.norms.0.num_batches_tracked'] == 7
        assert confidence_net_filter_fn(out) == out

    def test_layers_that_should_be_one_and_differ(self, authors):
        name = 'tabnet.encoder.feat_transformers.2.shared.shared_layers.1.weight'
        with pytest.raises(CheckpointError, match=r'shared_layers.1.weight.*one layer in the net, but differ'):
            ConfidenceNet.from_pretrained({**authors, name: authors[name] + 1e-3})

    @pytest.mark.parametrize(('change', 'message'), [
        (lambda d: d.pop('tabnet.final_mapping.weight'), 'holds no confidence net'),
        (lambda d: d.pop('tabnet.encoder.res_att.key.bias'), r"1 keys are missing \(first: 'key.bias'\)"),
        (lambda d: d.update({'tabnet.more.weight': torch.ones(1)}), r"unexpected \(first: 'more.weight'\)"),
        (lambda d: d.update({'tabnet.encoder.res_att.key.weight': torch.ones(3, 1)}), r"\(3, 1\) instead of \(10, 1\)"),
    ])
    def test_damaged(self, authors, change, message):
        damaged = dict(authors)
        change(damaged)
        with pytest.raises(CheckpointError, match=message):
            ConfidenceNet.from_pretrained(damaged)

    def test_something_else(self, tmp_path):
        save_file({'fc.weight': torch.zeros(2, 2)}, tmp_path / 'a.safetensors')
        with pytest.raises(CheckpointError, match=r"a.safetensors' holds no confidence net \(its first key: 'fc"):
            ConfidenceNet.from_pretrained(tmp_path / 'a.safetensors')
        with pytest.raises(CheckpointError, match='No checkpoint at'):
            ConfidenceNet.from_pretrained(tmp_path / 'none.safetensors')
        with pytest.raises(CheckpointError, match="'nobody/nothing' is not in the local cache"):
            ConfidenceNet.from_pretrained('nobody/nothing', cache_dir=tmp_path)

    def test_nothing_in_a_zip_is_executed(self, tmp_path):
        marker = tmp_path / 'executed'

        class Evil:
            def __reduce__(self):
                return open, (str(marker), 'w')

        with zipfile.ZipFile(tmp_path / 'evil.zip', 'w') as archive:
            archive.writestr('network.pt', pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match=r'Cannot read network\.pt'):
            ConfidenceNet.from_pretrained(tmp_path / 'evil.zip')
        assert not marker.exists()

    def test_from_the_hub(self, net, tmp_path, monkeypatch):
        net.save(tmp_path / 'model.safetensors')
        asked = []

        def fetch(repo, cache_dir=None):
            asked.append(repo)
            return tmp_path / 'model.safetensors'

        monkeypatch.setattr('timm_dynamic.layers.confidence_net.fetch_weights', fetch)
        again = timm_dynamic.ConfidenceNet.from_pretrained('org/name@v1')
        assert asked == ['org/name@v1']
        assert torch.equal(again.head.weight, net.head.weight)


class TestTraining:
    def test_every_parameter_gets_a_gradient(self):
        for classes in (10, 200):
            net = ConfidenceNet().train()
            net(make_probabilities(8, classes)).sum().backward()
            assert [n for n, p in net.named_parameters() if p.grad is None] == []

    def test_ghost_batch_norm(self):
        # Four samples in two parts of two: each part is normalised by itself, to -1 and 1.
        norm = GhostBatchNorm(1, virtual_batch_size=2, momentum=0.5)
        x = torch.tensor([[0.], [2.], [10.], [14.]])
        torch.testing.assert_close(norm(x).flatten(), torch.tensor([-1., 1., -1., 1.]), rtol=0, atol=1e-4)
        # running mean: 0 -> (0 + 1) / 2 -> (0.5 + 12) / 2
        assert norm.running_mean.item() == pytest.approx(6.25)
        assert norm.eval()(x[:1]).item() == pytest.approx(-6.25 / (norm.running_var.item() + 1e-5) ** 0.5)

    def test_no_part_is_of_one_sample(self):
        norm = GhostBatchNorm(3, virtual_batch_size=128)
        assert norm(torch.randn(129, 3)).shape == (129, 3)
        assert norm.num_batches_tracked == 2

    def test_sparsemax(self):
        x = torch.tensor([[0.5, 0.2, -1.], [3., 1., 1.]])
        # (0.5, 0.2): shift (0.7 - 1) / 2 = -0.15 gives 0.65 and 0.35; (3, 1, 1): only the first is left
        torch.testing.assert_close(sparsemax(x), torch.tensor([[0.65, 0.35, 0.], [1., 0., 0.]]))
        x = torch.randn(50, 30, dtype=torch.double, requires_grad=True)
        torch.testing.assert_close(sparsemax(x), project_to_simplex(x))
        assert torch.autograd.gradcheck(sparsemax, x)

    def test_masks_are_those_of_the_straightforward_version(self, net, authors):
        # the authors' masks, under our names
        masks = SparseMasks(net).eval()
        state = {}
        for key, value in authors.items():
            key = key.removeprefix('tabnet.encoder.')
            if key.startswith('initial_splitter.shared.glu_layers') and '.bn.' in key:
                state[key.replace('initial_splitter.shared.glu_layers', 'splitter.norms').replace('.bn.bn', '')] = value
            elif key.startswith('initial_splitter.specifics') and '.bn.' in key:
                layer = int(key.split('.')[3])
                state[f'splitter.norms.{layer + 2}.{key.rpartition(".")[2]}'] = value
            elif key.startswith('initial_splitter.specifics'):
                state[f'splitter.layers.{key.split(".")[3]}.weight'] = value
            elif key.startswith('att_transformers'):
                _, step, kind, *_, leaf = key.split('.')
                state[f'{"layers" if kind == "fc" else "norms"}.{step}.{leaf}'] = value
        masks.load_state_dict(state)
        x = make_probabilities(32, 60)
        with torch.no_grad():
            entropy = masks(net, *net.forward_steps(x))
            expected = run(authors, x)[1]
        assert expected > 0.1
        torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-5)

    def test_entropy_reaches_the_shared_layers(self):
        net = ConfidenceNet().train()
        masks = SparseMasks(net).train()
        masks(net, *net.forward_steps(make_probabilities(16, 40))).backward()
        assert net.shared[0].weight.grad.abs().sum() > 0
        assert all(p.grad is not None for p in masks.parameters())
        with pytest.raises(ValueError, match='attention_dim of at least 1'):
            SparseMasks(ConfidenceNet(attention_dim=0))


def test_damaged_archives_end_in_one_kind_of_error(tmp_path):
    buffer = io.BytesIO()
    torch.save({'query.weight': torch.ones(2, 1)}, buffer)
    with zipfile.ZipFile(tmp_path / 'net.zip', 'w') as archive:
        archive.writestr('network.pt', buffer.getvalue())
    (tmp_path / 'net.pth').write_bytes(buffer.getvalue())
    rng = random.Random(0)
    for file in (tmp_path / 'net.zip', tmp_path / 'net.pth'):
        content = file.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(10):  # most in the directory, which is at the end
                damaged[-rng.randrange(1, 200)] = rng.randrange(256)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                ConfidenceNet.from_pretrained(file)
