"""Metrics: fidelity to the dense run, temporal quality, and exact read-outs of the procedural world."""

from foveal.pipelines.metrics.metric import FunctionMetric, Meta, Metric, MetricWeightsMissing, WeightSpec
from foveal.pipelines.metrics.registry import choose, metric, metrics

__all__ = ["FunctionMetric", "Meta", "Metric", "MetricWeightsMissing", "WeightSpec", "choose", "metric", "metrics"]
