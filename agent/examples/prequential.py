"""What the six classifiers share: predict first, learn after."""

from typing import Any

from river import base, compose

from quorate_agent import Declined

Features = dict[base.typing.FeatureName, Any]
Label = base.typing.ClfTarget


class Prequential:
    """A River classifier between two handlers."""

    def __init__(self, model: base.Classifier | compose.Pipeline) -> None:
        self._model = model
        self._labels: dict[Label, Label] = {}

    def predict(self, features: Features) -> Label:
        """The likeliest label.

        Raises:
            Declined: no label was seen yet.
        """
        if not self._labels:
            raise Declined("no prediction before the first label")
        probabilities = self._model.predict_proba_one(features)
        if not probabilities:
            raise Declined("the model has no prediction for this instance")
        # Not `predict_one`: it breaks ties by the order of the labels, which for some models is that of a
        # set, and differs from process to process.
        likeliest = min(probabilities, key=lambda label: (-probabilities[label], repr(label)))
        # Binary models say False and True where the labels are 0 and 1; give back what was taught.
        return self._labels.get(likeliest, likeliest)

    def learn(self, features: Features, label: Label) -> None:
        """Teaches the model the truth of one instance."""
        self._model.learn_one(features, label)
        self._labels[label] = label
