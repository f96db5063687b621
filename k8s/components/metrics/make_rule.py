"""Write prometheus-rule.yaml: deploy/prometheus/rules.yml as the operator wants it. tests/k8s sees that it was done."""

from pathlib import Path

import yaml

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "deploy/prometheus/rules.yml"


def make() -> str:
    """Return the text of prometheus-rule.yaml."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "dcgan",
            "namespace": "dcgan",
            "labels": {"app.kubernetes.io/part-of": "dcgan", "app.kubernetes.io/component": "base"},
        },
        "spec": yaml.safe_load(RULES.read_text()),
    }
    header = "# Made by make_rule.py from deploy/prometheus/rules.yml, which is the one to edit.\n"
    return header + yaml.safe_dump(rule, sort_keys=False, width=120)


if __name__ == "__main__":
    (HERE / "prometheus-rule.yaml").write_text(make())
