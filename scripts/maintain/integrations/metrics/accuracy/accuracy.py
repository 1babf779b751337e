"""Stands in for the Hub's metric of this name: evaluate fetches its own from there, and a check has no network."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """The share of predictions that are right."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        right = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
        return {"accuracy": sum(right) / len(right)}
