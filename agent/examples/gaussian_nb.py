"""Naive Bayes with a bell curve for each feature and label."""

from prequential import Features, Label, Prequential
from river import naive_bayes

from quorate_agent import Agent


def agent(seed: int = 42, multiclass: bool = True) -> Agent:
    """Takes what all six take; this model draws nothing at random, and any number of labels will do."""
    model = Prequential(naive_bayes.GaussianNB())  # type: ignore[no-untyped-call]
    worker = Agent("gaussian-nb")

    @worker.task("classify")
    def classify(features: Features) -> Label:
        return model.predict(features)

    @worker.feedback("classify")
    def learn(features: Features, label: Label) -> None:
        model.learn(features, label)

    return worker
