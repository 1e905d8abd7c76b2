import pytest
import torch

from timm_dynamic.data import ConfidenceFeatures


@pytest.fixture
def features():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 3
    names = ['a/1.png', 'b/1.png', 'c,d.png', 'Ä.png', '"q".png']
    return ConfidenceFeatures.from_logits(logits, torch.tensor([0, 1, 2, 3, 0]), names)


def assert_equal(a, b):
    assert torch.equal(a.probabilities, b.probabilities)
    assert torch.equal(a.correct, b.correct)


def test_from_logits():
    features = ConfidenceFeatures.from_logits(torch.tensor([[0., 2.], [1., 0.]]).log(), torch.tensor([1, 1]), 'ab')
    assert features.probabilities.tolist() == [[1., 0.], [1., 0.]]
    assert features.correct.tolist() == [True, False]


def test_files(features, tmp_path):
    features.save(tmp_path / 'f.safetensors')
    again = ConfidenceFeatures.load(tmp_path / 'f.safetensors')
    assert_equal(again, features)
    assert again.names == features.names
    features.save_csv(tmp_path / 'f.csv')
    assert (tmp_path / 'f.csv').read_bytes().startswith(b'\xef\xbb\xbf1.png,0.')
    again = ConfidenceFeatures.load(tmp_path / 'f.csv')
    assert_equal(again, features)  # every bit
    assert again.names == ['1.png', '1.png', 'c,d.png', 'Ä.png', '"q".png']


def test_csv_of_the_authors(tmp_path):
    (tmp_path / 'a.csv').write_bytes(
        b'\xef\xbb\xbfILSVRC2012_val_1.JPEG,0.7,0.2,0.1,1\r\nILSVRC2012_val_2.JPEG,5.0e-01,3e-1,0.2,0.0\r\n')
    features = ConfidenceFeatures.load(tmp_path / 'a.csv')
    torch.testing.assert_close(features.probabilities, torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    assert features.correct.tolist() == [True, False]


@pytest.mark.parametrize(('text', 'message'), [
    ('a,0.7,0.3,1\nb,0.7,0.2,0.1,1\n', 'line 2: 3 probabilities, the first row has 2'),
    ('a,0.7,0.3,2\n', 'line 1: expected probabilities and then 0 or 1'),
    ('a,0.7,x,1\n', 'line 1: not all fields after the name are numbers'),
    ('a\n', 'line 1: expected probabilities'),
    ('a,0.7,0.1,1\n', r"the probabilities of 'a' \(image 1\) sum to 0.8"),
    ('a,nan,0.5,1\n', r"the probabilities of 'a' \(image 1\) sum to nan"),
    ('', 'is empty'),
    (' \n', 'is empty'),
])
def test_bad_csv(tmp_path, text, message):
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        ConfidenceFeatures.load(tmp_path / 'a.csv')


def test_a_csv_that_is_not_utf8(tmp_path):
    (tmp_path / 'a.csv').write_bytes(b'a,0.7,0.3,1\n\xe4,0.7,0.3,1\n')
    with pytest.raises(ValueError, match=r"a.csv', line 2: this is not UTF-8"):
        ConfidenceFeatures.load(tmp_path / 'a.csv')


def test_bad_files(features, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='cannot be read as confidence features'):
        ConfidenceFeatures.load(tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match='cannot be read as confidence features'):
        ConfidenceFeatures.load(tmp_path / 'none.safetensors')
    with pytest.raises(ValueError, match=r'got \[5, 4\], \[5\] and 4'):
        ConfidenceFeatures(features.probabilities, features.correct, features.names[1:])


def test_merging(features):
    both = ConfidenceFeatures.merge([features, features])
    assert (len(both), both.probabilities.shape) == (10, (10, 4))
    assert both.names == features.names * 2
    other = ConfidenceFeatures(torch.ones(1, 1), torch.ones(1, dtype=torch.bool), ['x'])
    with pytest.raises(ValueError, match=r'different numbers of classes cannot be merged: \[4, 1\]'):
        ConfidenceFeatures.merge([features, other])


def test_names_may_be_long(features, tmp_path):
    """A header of safetensors has at most 100 MB; names are not kept there."""
    features.names = ['x' * 2_000_000, *features.names[1:]]
    features.save(tmp_path / 'f.safetensors')
    with open(tmp_path / 'f.safetensors', 'rb') as f:
        assert int.from_bytes(f.read(8), 'little') < 1000
    assert ConfidenceFeatures.load(tmp_path / 'f.safetensors').names == features.names


@pytest.mark.parametrize(('change', 'message'), [
    (lambda f: setattr(f, 'correct', f.correct.long()), "'correct' is torch.int64, not bool"),
    (lambda f: f.probabilities.copy_(f.probabilities.flip(1)), 'descending order'),
    (lambda f: f.probabilities.mul_(2), 'summing to 1'),
    (lambda f: setattr(f, 'names', 5), "'names' is no list of texts"),
    (lambda f: setattr(f, 'names', [1, 2, 3, 4, 5]), "'names' is no list of texts"),
])
def test_files_of_something_else(features, tmp_path, change, message):
    change(features)
    features.save(tmp_path / 'f.safetensors')
    with pytest.raises(ValueError, match=rf"f.safetensors' cannot be read .*{message}"):
        ConfidenceFeatures.load(tmp_path / 'f.safetensors')
