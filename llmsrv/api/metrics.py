"""GET /metrics in Prometheus' text format, under the names that vLLM's dashboards know.

The rest of the server counts in plain integers; this module alone knows prometheus-client, and
reads them when it is scraped.
"""

from collections.abc import Callable
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client import PlatformCollector
from prometheus_client import ProcessCollector
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from llmsrv.api.models import Model
from llmsrv.api.models import Models
from llmsrv.engine.messages import Gauges

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ["model_name", "engine"]
Family = GaugeMetricFamily | CounterMetricFamily
Value = Callable[[Model], float]
FINISH_REASONS = ("stop", "length", "abort")


def _gauges(model: Model) -> Gauges:
    return model.engine.gauges if model.engine else Gauges()


def _kv_usage(model: Model) -> float:
    gauges = _gauges(model)
    return gauges.used_blocks / gauges.total_blocks if gauges.total_blocks else 0.0


# Name, help, value: one sample a model.
GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("vllm:num_requests_running", "Sequences in steps", lambda m: _gauges(m).running),
    ("vllm:num_requests_waiting", "Sequences waiting", lambda m: _gauges(m).waiting),
    ("vllm:kv_cache_usage_perc", "Part of the KV blocks in use", _kv_usage),
)
COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens", lambda m: m.counters.prompt_tokens),
    ("vllm:generation_tokens", "Output tokens", lambda m: m.counters.generation_tokens),
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up",
        lambda m: _gauges(m).num_prefix_queries,
    ),
    ("vllm:prefix_cache_hits", "Prompt tokens found", lambda m: _gauges(m).num_prefix_hits),
    ("vllm:num_preemptions", "Preemptions", lambda m: _gauges(m).num_preemptions),
)


class Metrics:
    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelsCollector(models))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _ModelsCollector(Collector):
    """Every family has a sample of every model, loaded or not, labelled with its first name."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        for name, help, value in GAUGES:
            yield self._family(GaugeMetricFamily(name, help, labels=LABELS), value)
        for name, help, value in COUNTERS:
            yield self._family(CounterMetricFamily(name, help, labels=LABELS), value)
        yield self._finished()
        unknown = self._models.num_unknown_fields
        help = "Request fields that nobody knows, and that were ignored"
        yield CounterMetricFamily("llmsrv:unknown_fields", help, value=unknown)

    def _family(self, family: Family, value: Value) -> Metric:
        for model in self._models:
            family.add_metric(_labels(model), value(model))
        return family

    def _finished(self) -> Metric:
        labels = [*LABELS, "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Choices that ended", labels=labels)
        for model in self._models:
            for reason in FINISH_REASONS:
                family.add_metric([*_labels(model), reason], model.counters.finished[reason])
        return family


def _labels(model: Model) -> list[str]:
    return [model.names[0], "0"]
