"""Splits of a dataset: their names, and which folder holds one."""
import os

# To timm, the names of one tuple mean the same split.
TRAIN_SPLITS = ('train', 'training')
VALIDATION_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation')
_FOLDERS = (*TRAIN_SPLITS, *VALIDATION_SPLITS, 'test')
# torchvision's datasets of which timm takes the test images for any split that is not one to train on.
_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')


def synonyms(split: str) -> tuple[str, ...]:
    """Names that mean the same split, the given one first."""
    name = split.split('[')[0]
    names = next((names for names in (TRAIN_SPLITS, VALIDATION_SPLITS) if name in names), ())
    return name, *(n for n in names if n != name)


def find_split(root: str, split: str) -> str:
    """Find the folder of a split: ROOT/SPLIT, or ROOT itself if it holds classes and no splits.

    A folder without splits serves as both the training and the validation split, as in timm. Class folders may have
    the name of a split: such a sub-folder is a split only if it holds folders, or if there are no other sub-folders.

    Args:
        root: A folder, or a tar file, which has no splits.
        split: Name of the split.

    Raises:
        ValueError: There is no such split. timm would use the images of all other splits.
    """
    folders = _folders_of(root) if os.path.isdir(root) else []
    found = sorted(name for name in folders if name in _FOLDERS)
    others = [name for name in folders if name not in _FOLDERS and not name.startswith('.')]
    if others and not any(_folders_of(os.path.join(root, name)) for name in found):
        found = []
    names = synonyms(split)
    name = next((n for n in names if n in found or (n in others and _folders_of(os.path.join(root, n)))), None)
    if name is not None:
        return os.path.join(root, name)
    if found:
        raise ValueError(f"There is no split '{split}' at '{root}', which has {', '.join(found)}.")
    if len(names) == 1:
        raise ValueError(f"There is no split '{split}' at '{root}', which has no splits.")
    return root


def check_torch_split(name: str, split: str) -> None:
    """Raise a ValueError for a split that a torchvision dataset of timm does not have."""
    if name.lower() in _TWO_SPLITS and not {*synonyms(split)} & {*TRAIN_SPLITS, *VALIDATION_SPLITS, 'test'}:
        raise ValueError(f"There is no split '{split}' of torch/{name}, which has train and test.")


def _folders_of(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir()]
