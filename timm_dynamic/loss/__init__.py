from .focus_picking import FocusPickingLoss, FocusPickingTerms

__all__ = ['FocusPickingLoss', 'FocusPickingTerms']
