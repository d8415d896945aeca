"""A Hoeffding tree that splits early and thinks again later (Manapragada, Webb and Salehi, 2018)."""

from prequential import Features, Label, Prequential
from river import tree

from quorate_agent import Agent


def agent(seed: int = 42, multiclass: bool = True) -> Agent:
    """Takes what all six take; this model draws nothing at random, and any number of labels will do."""
    # Thinking again is what costs: it looks at every split of every feature.
    model = Prequential(tree.ExtremelyFastDecisionTreeClassifier(grace_period=50, min_samples_reevaluate=500))
    worker = Agent("extremely-fast-decision-tree")

    @worker.task("classify")
    def classify(features: Features) -> Label:
        return model.predict(features)

    @worker.feedback("classify")
    def learn(features: Features, label: Label) -> None:
        model.learn(features, label)

    return worker
