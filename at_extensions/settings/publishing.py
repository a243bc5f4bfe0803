"""The settings of reports, submissions, their verification and the leaderboard."""

# ruff: noqa: RUF009  (a call of option makes a field)

from __future__ import annotations

import re
from dataclasses import dataclass

from at_extensions.configuration import Settings, option


@dataclass(frozen=True)
class Paper(Settings):
    """The bibliographic part of a leaderboard's entry."""

    title: str = option(help="Title of the paper.")
    authors: str = option(help="Authors, separated by commas.")
    link: str = option(help="Address of the paper.")
    venue: str = option("", 'Where it appeared, such as "ICML 2023" or "arXiv, Feb 2023"; empty if nowhere yet.')
    reported: float | None = option(None, "Robust accuracy that the paper itself reports, in [0, 1].")
    additional_data: bool = option(
        False,
        "Whether images beyond the training set were used. Images from a generator that was trained on the training "
        "set alone do not count; say so in the footnote.",
    )
    footnote: str = option("", "A remark shown under the table.")
    code: str = option("", "Address of checkpoint and code; a submission asks for it.")
    license: str = option("MIT", "Licence of the weights: an identifier, or the address of its text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9.+-]+|https?://[^\s\"'<>]+", self.license):
            raise ValueError(
                f"license must be an identifier such as MIT or the address of its text, got {self.license!r}"
            )
        for name in ("title", "authors", "link"):
            if not getattr(self, name).strip():
                raise ValueError(f"the paper's {name} must be a non-empty string, got {getattr(self, name)!r}")
        if self.reported is not None and not 0 <= self.reported <= 1:
            hint = f"; did you mean {self.reported / 100:g}?" if 1 < self.reported <= 100 else ""
            raise ValueError(f"reported must be a fraction in [0, 1], got {self.reported:g}{hint}")


@dataclass(frozen=True, kw_only=True)
class PublishSettings(Settings):
    """Submission."""

    id: str = option(
        help="First author, year, first word of the title, optional variant, such as Wang2023Better_WRN-28-10."
    )
    paper: Paper = option(help="A YAML file with title, authors, link, ..., or --paper.title, --paper.authors, ...")
    out: str | None = option(None, "The folder to write, new or empty; named after the id by default.")
    dataset: str | None = option(
        None, "RobustBench's name of the data set, or a free name for one of your own; the run's name by default."
    )
    architecture: str | None = option(None, "Printed name of the network; made from its name and options by default.")
    allow_partial: bool = option(False, "Write a result that RobustBench would not rank, marked as such.")
    allow_other_eps: bool = option(False, "Publish an evaluation at another radius than the run trained for.")


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Settings):
    """Verification."""

    n_examples: int = option(100, "Test images that AutoAttack attacks, a random subset drawn by the seed.", at_least=1)
    data: str | None = option(None, "Test data, named as for training; the published data set by default.")
    trust_code: bool = option(False, "Run the code in the folder where that makes its network; read it first.")
    root: str | None = option(None, "Folder that holds the data set, in torchvision's layout.")
    seed: int = option(0, "Seed of the subset and the attacks.", at_least=0)
    device: str | None = option(None, "cpu, cuda, ...; a GPU where there is one by default.")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Page of several runs."""

    out: str | None = option(None, "The file to write; report.html in the folder by default.")
    title: str = option("Robustness report", "Heading of the page.")


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings(Settings):
    """Leaderboard."""

    out: str | None = option(None, "The file to write; leaderboard.html in the folder by default.")
    title: str = option("Robustness leaderboard", "Heading of the page.")
