"""Grafana: dashboards as code, and how it finds them."""
