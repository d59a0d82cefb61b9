"""One colour and one marker per optimizer, in every figure.

The first are Okabe and Ito's; the others were chosen greedily from a grid of 4,096 colours so that any two differ by a
CIE76 dE of at least 12 to normal, deutan and protan eyes (Machado et al. 2009), on white and not too pale for it.
"""

COLORS = {
    "sgd": "#0072B2", "adam": "#E69F00", "koala-m": "#D55E00", "koala-v": "#009E73", "koala++": "#CC79A7",
    "sofim": "#56B4E9", "sgdf": "#332288", "adamw": "#552200", "lbfgs": "#223344", "adahessian": "#99CC77",
    "shampoo": "#DD0044", "kfac": "#3311BB", "adafisher": "#7766FF", "adafisherw": "#0000FF", "adabelief": "#FFAABB",
    "yogi": "#6699FF", "adamax": "#113366", "adamp": "#446633", "amsgrad": "#665577", "fromage": "#552222",
    "adabound": "#2266CC", "lion": "#5544FF", "msvag": "#DD7744", "muon": "#FF4477", "nadamw": "#77DD44",
    "prodigy": "#665500", "radam": "#CCBBDD", "schedule-free-adamw": "#4444CC", "schedule-free-sgd": "#774455",
    "soap": "#993399", "sophia": "#AACC99", "sophia-g": "#221199",
    "padam": "#000044", "adabayes": "#000011", "adabayes-fp": "#001133", "adagrad": "#111100", "alig": "#000066",
    "diagonal-ekf": "#55BB99", "kgd": "#6688BB", "lkf": "#0022DD", "loko": "#AA6655", "momo": "#11BB55",
    "momo-adam": "#FF9966", "metric-identity": "#009900", "metric-adam": "#7722AA", "metric-muon": "#886699",
}  # fmt: skip
OTHERS = ("#2299DD", "#CC1188")  # for optimizers that have none of their own yet
MARKERS = "os^Dv<>pPX*hd"
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


def style(optimizer: str) -> dict[str, str]:
    """matplotlib's colour and marker of an optimizer, by its name in configs/optim."""
    known = list(COLORS)
    at = known.index(optimizer) if optimizer in COLORS else len(known) + sum(optimizer.encode()) % len(OTHERS)
    return {"color": COLORS.get(optimizer, OTHERS[at % len(OTHERS)]), "marker": MARKERS[at % len(MARKERS)]}
