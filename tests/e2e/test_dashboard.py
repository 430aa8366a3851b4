"""The dashboard of `deploy/` asks a real server for nothing that it does not have."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import Server
from tests.test_deploy import DASHBOARD

WORDS = {"sum", "max", "rate", "increase", "by", "histogram_quantile"}


def test_every_series_and_label_of_the_dashboard_is_there(tiny: Server) -> None:
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(tiny.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(expressions) > 20
    for expression in expressions:
        bare = re.sub(r"\[[^]]*\]|\"[^\"]*\"", "", expression)
        names = set(re.findall(r"\b[a-z]+:\w+|\b[a-z]+_[a-z_]+\b(?=[\[{)]|$)", bare)) - WORDS - {"model_name"}
        grouped = {name for names in re.findall(r"by \(([^)]*)\)", bare) for name in names.split(", ")}
        names -= grouped
        assert names, expression
        for name in names:
            assert name in labels, name
            asked = grouped | set(re.findall(r"[{,](\w+)=~", bare))
            assert asked <= labels[name], f"{name} has no label {asked - labels[name]}"
