"""State that an optimizer shares with nobody."""

import copy

import torch
from torch.optim import Optimizer


class CopiedState(Optimizer):
    """Mixin: what is loaded is copied. torch's own optimizers share tensors with the state that they load, so that the
    steps of one move the buffers of the other (pytorch 196083)."""

    @torch.inference_mode(False)  # tensors that are made in inference mode could not be written by later steps
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but nothing is shared with ``state_dict``."""
        super().load_state_dict(copy.deepcopy(state_dict))
