"""What a watch counts, as metrics of Prometheus and of OpenTelemetry.

`truestep_watch_checks_total` by outcome, `truestep_watch_requests_total`,
`truestep_watch_seconds_total`, and by call `truestep_watch_floor_ratio` (the largest distance as a
multiple of the noise floor) and `truestep_watch_passed` (1 or 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from truestep.errors import MissingExtraError
from truestep.serving.watching import Watch

OUTCOMES = ("passed", "left", "error", "skipped", "put_off")

_COUNTERS = {
    "truestep_watch_requests": "Requests that were served",
    "truestep_watch_checks": "Checks by what came of them",
    "truestep_watch_seconds": "Time that checks took",
}
_GAUGES = {
    "truestep_watch_floor_ratio": "Largest distance of a call, as a multiple of the noise floor",
    "truestep_watch_passed": "Whether the last check of a call passed",
}

Value = tuple[float, dict[str, str]]


def values(watch: Watch, name: str) -> Iterator[Value]:
    """What a metric is now: numbers, and the labels of each."""
    counts = watch.counts
    if name == "truestep_watch_requests":
        yield counts["requests"], {}
    elif name == "truestep_watch_checks":
        yield from ((counts[outcome], {"outcome": outcome}) for outcome in OUTCOMES)
    elif name == "truestep_watch_seconds":
        yield watch.seconds, {}
    for place, result in list(watch.last.items()):
        if name == "truestep_watch_passed":
            yield float(result.outcome == "passed"), {"call": place}
        elif name == "truestep_watch_floor_ratio" and result.ratio is not None:
            yield result.ratio, {"call": place}


def prometheus(watch: Watch, registry: Any = None) -> Any:
    """Register a watch's metrics with Prometheus; they are read when they are scraped.

    Args:
        watch: What is read.
        registry: Default prometheus_client's own.

    Returns:
        The collector; `registry.unregister(collector)` takes it out again.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """
    try:
        client = import_module("prometheus_client")
        core = import_module("prometheus_client.core")
    except ImportError:
        purpose = "a watch's metrics for Prometheus"
        raise MissingExtraError("prometheus_client", "prometheus", purpose) from None
    collector = _Collector(watch, core)
    (client.REGISTRY if registry is None else registry).register(collector)
    return collector


class _Collector:
    """What prometheus_client asks for metrics."""

    def __init__(self, watch: Watch, core: Any) -> None:
        self._watch, self._core = watch, core

    def collect(self) -> Iterator[Any]:
        """Every metric as it is now."""
        kinds = (
            (_COUNTERS, self._core.CounterMetricFamily),
            (_GAUGES, self._core.GaugeMetricFamily),
        )
        for metrics, family in kinds:
            for name, text in metrics.items():
                found = list(values(self._watch, name))
                labels = list(found[0][1]) if found else ["call"]
                metric = family(name, text, labels=labels)
                for number, label in found:
                    metric.add_metric(list(label.values()), number)
                yield metric


def opentelemetry(watch: Watch, meter: Any) -> None:
    """Give a meter of OpenTelemetry a watch's metrics; they are read when it collects.

    Args:
        watch: What is read.
        meter: As `opentelemetry.metrics.get_meter("truestep")` gives it.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """
    try:
        observation = import_module("opentelemetry.metrics").Observation
    except ImportError:
        purpose = "a watch's metrics for OpenTelemetry"
        raise MissingExtraError("opentelemetry-api", "opentelemetry", purpose) from None

    def observed(name: str) -> Any:
        def observe(options: Any) -> Iterable[Any]:
            return [observation(number, labels) for number, labels in values(watch, name)]

        return [observe]

    for name, text in _COUNTERS.items():
        meter.create_observable_counter(name, callbacks=observed(name), description=text)
    for name, text in _GAUGES.items():
        meter.create_observable_gauge(name, callbacks=observed(name), description=text)
