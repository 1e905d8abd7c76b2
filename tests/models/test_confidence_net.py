import copy
import io
import pickle
import random
import zipfile

import pytest
import torch
from parity.confidence_reference import make_probabilities, make_state_dict, run
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic
from timm_dynamic import ConfidenceNet
from timm_dynamic.models.confidence_net import confidence_net_filter_fn
from timm_dynamic.utils import CheckpointError


@pytest.fixture(scope='module')
def authors():
    return make_state_dict()


@pytest.fixture(scope='module')
def net(authors):
    return ConfidenceNet.from_pretrained(authors)


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
    (torch.tensor([[0.1, 0.9]]), r'in descending order: row 0 is not\. Sort them, or use score'),
    (torch.tensor([[0.5, 0.5], [3., 1.]]), 'a minimum of 1 and a sum of 4. Apply softmax to logits first'),
    (torch.tensor([[0.5, 0.2]]), 'a sum of 0.7'),
    (torch.tensor([[1.2, -0.2]]), 'a minimum of -0.2'),
    (torch.tensor([[torch.nan, 0.5]]), 'a sum of nan'),
    (torch.tensor([0.5, 0.5]), r'Expected probabilities \[batch, classes\], floating point, got \[2\] float32'),
    (torch.tensor([[1, 0]]), r'got \[1, 2\] int64'),
])
def test_bad_input(net, x, message):
    with pytest.raises(ValueError, match=message):
        net(x)
    if 'order' not in message:
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

    def test_indices_and_sizes_that_are_absurd(self, authors):
        """A file of a few bytes may not make a net of millions of layers, or of gigabytes."""
        first = 'tabnet.encoder.feat_transformers.0.shared.shared_layers.0.weight'
        for name in (first.replace('transformers.0', 'transformers.999999999'),
                     first.replace('layers.0', 'layers.999999999')):
            with pytest.raises(CheckpointError, match=r'holds no confidence net|its steps are .*999999999'):
                ConfidenceNet.from_pretrained({**authors, name: authors[first]})
        wide = torch.zeros(1).expand(1, 10 ** 9)  # four bytes
        with pytest.raises(CheckpointError, match='holds no confidence net'):
            ConfidenceNet.from_pretrained({**authors, 'tabnet.final_mapping.weight': wide})

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

        monkeypatch.setattr('timm_dynamic.models.confidence_net.fetch_weights', fetch)
        again = timm_dynamic.ConfidenceNet.from_pretrained('org/name@v1')
        assert asked == ['org/name@v1']
        assert torch.equal(again.head.weight, net.head.weight)


class TestTraining:
    def test_every_parameter_gets_a_gradient(self):
        for classes in (10, 200):
            net = ConfidenceNet().train()
            net(make_probabilities(8, classes)).sum().backward()
            assert [n for n, p in net.named_parameters() if p.grad is None] == []


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
