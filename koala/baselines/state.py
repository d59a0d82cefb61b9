"""State that an optimizer shares with nobody."""

import copy
from typing import Any

import torch
from torch.optim import Optimizer


class CopiedState(Optimizer):
    """Mixin: what is loaded is copied. torch's own optimizers share tensors with the state that they load, so that the
    steps of one move the buffers of the other (pytorch 196083). And copies keep attributes, which torch's lose."""

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: value for name, value in self.__dict__.items() if name[0] != "_" and name != "step"}
        return {**attributes, **super().__getstate__()}  # a scheduler puts a `step` of its own there

    @torch.inference_mode(False)  # tensors that are made in inference mode could not be written by later steps
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but nothing is shared with ``state_dict``."""
        super().load_state_dict(copy.deepcopy(state_dict))


class OneGroup(CopiedState):
    """An optimizer with one step size for all weights."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError(f"{type(self).__name__} has one step size: it takes one parameter group")
        super().add_param_group(param_group)
