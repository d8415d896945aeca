"""A linear model: logistic regression behind a scaler, by stochastic gradient descent."""

from prequential import Features, Label, Prequential
from river import linear_model, optim, preprocessing
from river import multiclass as several

from quorate_agent import Agent


def agent(seed: int = 42, multiclass: bool = True) -> Agent:
    """With `multiclass` one model for each label; without, one in all, for labels true and false (or 1 and 0)."""
    single = linear_model.LogisticRegression(optimizer=optim.SGD(0.1))
    classifier = several.OneVsRestClassifier(single) if multiclass else single
    model = Prequential(preprocessing.StandardScaler() | classifier)
    worker = Agent("logistic-regression")

    @worker.task("classify")
    def classify(features: Features) -> Label:
        return model.predict(features)

    @worker.feedback("classify")
    def learn(features: Features, label: Label) -> None:
        model.learn(features, label)

    return worker
