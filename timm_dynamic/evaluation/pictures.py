from ..training.patches import draw_patches  # noqa
