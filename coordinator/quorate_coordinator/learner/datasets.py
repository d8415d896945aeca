"""The data sets that ship inside River, as the demo and the tests feed them."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from river import datasets

#: What an instance can be told by, and what it is.
Features = dict[str, int | float]
Label = str | bool


@dataclass(frozen=True, slots=True)
class DataSet:
    """A labelled stream."""

    name: str
    #: Whether there are more than two labels; with two, they are true and false.
    multiclass: bool
    #: Instances in all.
    instances: int
    #: Gives River's own object, which yields (features, label) when iterated.
    open: Callable[[], Any]


#: By the name that the command line takes.
DATASETS: Final[dict[str, DataSet]] = {
    dataset.name: dataset
    for dataset in (
        DataSet("image-segments", multiclass=True, instances=2_310, open=datasets.ImageSegments),
        DataSet("phishing", multiclass=False, instances=1_250, open=datasets.Phishing),
        DataSet("bananas", multiclass=False, instances=5_300, open=datasets.Bananas),
        DataSet("shuttle", multiclass=False, instances=49_097, open=datasets.Shuttle),
    )
}


def instances(name: str, limit: int | None = None) -> Iterator[tuple[Features, Label]]:
    """Yields the first `limit` instances, or all, as plain values that a body carries unchanged.

    Raises:
        KeyError: there is no data set of that name.
    """
    dataset = DATASETS[name]
    # Closed here, so that the file does not stay open until a garbage collection.
    with closing(iter(dataset.open())) as stream:
        for features, label in itertools.islice(stream, limit):
            # River's shuttle says 0 and 1, the other binary sets false and true; 1 and true are different answers.
            yield features, label if dataset.multiclass else bool(label)
