"""Names of splits: to timm, those of one tuple mean the same split."""
TRAIN_SPLITS = ('train', 'training')
VALIDATION_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation')
