"""Initial weights of the AnchorNet-patch recipe: a whole model, and the authors' files one by one."""
import pytest
import timm
import torch

import timm_dynamic  # noqa: F401
from timm_dynamic.launch.settings import TrainOptions
from timm_dynamic.models.anchornet import find_part_files
from timm_dynamic.task import StageContext, create_recipe
from timm_dynamic.utils import CheckpointError, save_pretrained

PARTS = ('localizer', 'resized', 'patch')
FILES = dict(localizer='anchornet.pth', resized='r_resized_95_best.pth.tar', patch='r_patch_95_best.pth.tar')


def create(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('test_anchornet_patch', num_classes=10, **kwargs)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The three files of a model, the model, its localizer trained alone, and the net that it starts from."""
    folder, model = tmp_path_factory.mktemp('parts'), create(1)
    (folder / 'three').mkdir()
    for part, name in FILES.items():
        torch.save({'net': getattr(model, part).state_dict()}, folder / 'three' / name)
    (folder / 'two').mkdir()
    for part in ('localizer', 'resized'):
        (folder / 'two' / FILES[part]).write_bytes((folder / 'three' / FILES[part]).read_bytes())
    save_pretrained(model, folder / 'whole')
    blocks = [(8, 16, 1, 2), (16, 24, 2, 2), (24, 32, 2, 1), (32, 48, 2, 1), (48, 48, 2, 1)]
    alone = timm.create_model('anchornet', num_classes=10, blocks=blocks, num_features=128)
    alone.load_state_dict(model.localizer.state_dict())
    save_pretrained(alone, folder / 'alone')
    save_pretrained(timm.create_model('test_focusnet', num_classes=10), folder / 'static')
    torch.save(model.patch.state_dict(), folder / 'unnamed.pth')
    return folder


@pytest.mark.parametrize(('stage', 'source', 'loaded', 'downstream'), [
    ('localizer', 'three/anchornet.pth', ['localizer'], []),
    ('resized', 'three/anchornet.pth', ['localizer'], ['resized']),
    ('patch', 'three/anchornet.pth', ['localizer'], ['resized', 'patch']),
    ('patch', 'alone', ['localizer'], ['resized', 'patch']),
    ('patch', 'alone/model.safetensors', ['localizer'], ['resized', 'patch']),
    ('patch', 'two', ['localizer', 'resized'], ['patch']),
    ('patch', 'three', [*PARTS], []),
    ('patch', 'whole', [*PARTS], []),
    ('resized', 'three/r_resized_95_best.pth.tar', ['resized'], []),
])
def test_init_from(folder, caplog, stage, source, loaded, downstream):
    options = TrainOptions([
        '--model', 'test_anchornet_patch', '--stage', stage, '--init-from', str(folder / source)])
    model, before, reference = create(), create().state_dict(), create(1).state_dict()
    static = timm.create_model('test_focusnet', pretrained=True).state_dict()  # the backbone's pretrained weights
    recipe = create_recipe(options.base, demo=True, model=model)
    assert [s.name for s in recipe.stages] == [*PARTS]  # no static net is trained
    chosen = next(s for s in recipe.stages if s.name == stage)
    chosen.prepare(model, options.for_stage(chosen, 1), StageContext())
    for part in PARTS:
        expected = reference if part in loaded else before
        if part in downstream:
            expected = {f'{part}.{k}': v for k, v in static.items()}
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items() if k.startswith(part)), part
    assert ('has no resized net' in caplog.text) == (stage == 'patch' and 'resized' not in loaded)


def test_the_given_downstream_net_comes_first(folder):
    options = TrainOptions([
        '--model', 'test_anchornet_patch', '--stage', 'patch', '--init-from', str(folder / 'whole'),
        '--init-downstream', str(folder / 'static')])
    model = create()
    stage = create_recipe(options.base, demo=True, model=model).stages[-1]
    stage.prepare(model, options.for_stage(stage, 1), StageContext())
    static = timm.create_model(f"local-dir:{folder / 'static'}", pretrained=True)
    assert torch.equal(model.patch.conv1[0].weight, static.conv1[0].weight)
    assert torch.equal(model.resized.conv1[0].weight, create(1).resized.conv1[0].weight)


def test_a_localizer_trained_alone_and_two_nets_make_a_model(folder):
    files = {'localizer': folder / 'alone', **{part: folder / 'three' / FILES[part] for part in ('resized', 'patch')}}
    model = timm.create_model(
        'test_anchornet_patch', pretrained=True, pretrained_cfg_overlay=dict(file=files))
    reference = create(1).state_dict()
    assert all(torch.equal(v, reference[k]) for k, v in model.state_dict().items())


def test_a_net_without_a_name(folder):
    with pytest.raises(CheckpointError, match="holds one network that is not the localizer"):
        find_part_files(folder / 'unnamed.pth', create())


@pytest.mark.parametrize('given', [['--init-from', 'whole'], ['--pretrained']])
@pytest.mark.parametrize('demo', [False, True])
def test_weights_of_the_whole_model_are_kept(folder, given, demo):
    """In every stage, also in those after the first, which starts from them."""
    given = [given[0], *(str(folder / name) for name in given[1:])]
    options = TrainOptions(['--model', 'test_anchornet_patch', '--data-dir', 'somewhere', *given])
    model = create(1)
    recipe = create_recipe(options.base, demo=demo, model=model)
    assert [s.name for s in recipe.stages] == [*PARTS]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for i, stage in enumerate(recipe.stages):
        args = options.for_stage(stage, 1)
        if i:
            args.init_from = ''  # as train.py does
        stage.prepare(model, args, StageContext())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
