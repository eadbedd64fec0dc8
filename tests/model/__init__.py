"""Dict-based models of both designs, slow and obvious, that the kernels are compared with."""

from model.model import PFNMAP, RESTRUCTURE, Model, Outcome

__all__ = ("PFNMAP", "RESTRUCTURE", "Model", "Outcome")
