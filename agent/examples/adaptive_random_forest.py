"""Ten trees on random parts of the data, each replaced when it drifts (Gomes et al., 2017)."""

from prequential import Features, Label, Prequential
from river import forest

from quorate_agent import Agent


def agent(seed: int = 42, multiclass: bool = True) -> Agent:
    """The same `seed` gives the same predictions. Any number of labels will do."""
    model = Prequential(forest.ARFClassifier(n_models=10, seed=seed))
    worker = Agent("adaptive-random-forest")

    @worker.task("classify")
    def classify(features: Features) -> Label:
        return model.predict(features)

    @worker.feedback("classify")
    def learn(features: Features, label: Label) -> None:
        model.learn(features, label)

    return worker
