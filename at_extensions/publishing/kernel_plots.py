"""The figure of a kernel in the course of training: distances between epochs, spectrum, rank and specialisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from at_extensions.publishing.figures import hue_of, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from at_extensions.analysis import KernelEvolution


@styled
def kernel_evolution(found: KernelEvolution) -> Figure:
    """Draw the distance matrix, the spectra, and the measures by epoch; a single epoch has a spectrum alone."""
    from matplotlib.ticker import MaxNLocator

    single = len(found.epochs) == 1
    figure = new_figure(3.4 if single else 6.6)
    panels = [figure.subplots(1, 1)] if single else figure.subplots(2, 2).flatten().tolist()
    for i, (epoch, spectrum) in enumerate(zip(found.epochs, found.spectra)):
        shown = spectrum[spectrum > 1e-9]
        ends = i in (0, len(found.epochs) - 1)  # the first and the last one are named, those between them grey
        look = (
            {"color": hue_of(min(i, 1)), "lw": 1.6, "label": f"epoch {epoch}"} if ends else {"color": "0.75", "lw": 0.8}
        )
        panels[0].plot(range(1, len(shown) + 1), shown, **look)
    panels[0].set(title="Spectrum", xlabel="eigenvalue", ylabel="share of the sum", yscale="log", xscale="log")
    if single:
        return figure
    panels[0].legend()
    names = [str(epoch) for epoch in found.epochs]
    image = panels[1].imshow(found.distances.numpy(), cmap="viridis", vmin=0)
    panels[1].set(title="Distance of kernels", xlabel="epoch", ylabel="epoch")
    every = range(0, len(names), max(1, len(names) // 6))
    panels[1].set_xticks(list(every), [names[i] for i in every])
    panels[1].set_yticks(list(every), [names[i] for i in every])
    panels[1].grid(visible=False)
    figure.colorbar(image, ax=panels[1])
    panels[2].plot(found.epochs, found.effective_rank, marker="o", color=hue_of(0))
    panels[2].set(title="Effective rank", xlabel="epoch")
    panels[2].set_ylim(bottom=0)
    by_class = {"specialisation": found.specialization, "alignment": found.alignment}
    for i, (name, values) in enumerate((n, v) for n, v in by_class.items() if v is not None):
        panels[3].plot(found.epochs, values, marker="o", color=hue_of(i), label=name)
    panels[3].plot(found.epochs[1:], found.velocity, marker="o", color=hue_of(2), label="distance to the one before")
    panels[3].set(title="By class, and velocity", xlabel="epoch")
    panels[3].legend()
    for axes in panels[2:]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
