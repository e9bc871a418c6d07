"""What the figures of all programs share."""

from data.common import atomic

COLOURS = ("#0b62a4", "#d1611f", "#3a7d44", "#8a5aa8")      # told apart by colour-blind readers too


def figure(width, height, panels=1, **options):
    """A figure of so many inches, with panels side by side -> (figure, axes). Needs no display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(1, panels, figsize=(width, height), constrained_layout=True, **options)


def save(fig, path):
    """Write a figure to a .png file, whole or not at all, and let go of it."""
    import matplotlib.pyplot as plt
    with atomic(path) as temporary:
        fig.savefig(temporary, dpi=130, format="png")
    plt.close(fig)
