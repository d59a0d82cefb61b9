"""What arguments that several filters have mean, once: their docstrings name them in braces."""

from __future__ import annotations

import textwrap

TEXTS = {
    "params": "parameters or groups; ``lr`` and ``weight_decay`` may differ between groups, the rest is the filter's.",
    "target_lr": (
        ":math:`\\epsilon`; a schedule of learning rates is a schedule of target risks. Float or one-element tensor."
    ),
    "r": "constant measurement noise :math:`R`; None: the running average above.",
    "alpha_r": ":math:`\\alpha_r`.",
    "weight_decay": ":math:`\\lambda`.",
    "measurement": (
        'what R is the average of: ``"second_moment"`` takes mean(l_j^2), as in KOALA; ``"squared_mean"`` '
        'L^2, as in KOALA++ and its released image runs; ``"variance"`` mean(l_j^2) - L^2; ``"variance_of_mean"`` 0, '
        "whatever the losses, so that R decays to 0, as in KOALA++'s released language-model runs, which took the "
        "variance of one averaged loss."
    ),
    "lower_bound": (
        "the smallest possible loss :math:`b`; the innovation is :math:`\\epsilon (L - b)`, never below 0, and R the "
        "second moment about b. A loss is not minimised below b."
    ),
    "fused": (
        "True insists on the fused implementation of the device, False on the portable one, None takes the fastest "
        "there is."
    ),
    "process_group": (
        "over which losses (and the products of sharded tensors) are reduced: None is the default group, False never "
        "communicates."
    ),
}


def documented(docstring: str) -> str:
    """A class docstring with its names in braces replaced by what they stand for."""
    for name, text in TEXTS.items():
        entry = f"{name.removeprefix('target_')}: {text}"
        lines = textwrap.wrap(entry, 112, initial_indent=" " * 8, subsequent_indent=" " * 12, break_long_words=False)
        docstring = docstring.replace(f"        {{{name}}}", "\n".join(lines))
    return docstring
