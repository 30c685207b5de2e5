"""Several modules that are parts of one model: a rank's chunks under an interleaved pipeline schedule."""

from __future__ import annotations

from torch import nn

__all__ = ["ModelParts"]


class ModelParts(nn.ModuleList):
    """The parts of one model that this rank holds, for `TrainState(model=...)`.

    Their names make one space, as if they were one module: each part keeps the names of the whole model. Make
    one optimizer over the parameters of all of them: then nothing depends on how the model is cut.
    """
