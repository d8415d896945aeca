"""A decision tree that splits once it has seen enough (Domingos and Hulten, 2000)."""

from prequential import Features, Label, Prequential
from river import tree

from quorate_agent import Agent


def agent(seed: int = 42, multiclass: bool = True) -> Agent:
    """Takes what all six take; this model draws nothing at random, and any number of labels will do."""
    model = Prequential(tree.HoeffdingTreeClassifier())
    worker = Agent("hoeffding-tree")

    @worker.task("classify")
    def classify(features: Features) -> Label:
        return model.predict(features)

    @worker.feedback("classify")
    def learn(features: Features, label: Label) -> None:
        model.learn(features, label)

    return worker
