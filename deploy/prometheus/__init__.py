"""Prometheus: its configuration, rules and alerts, and a demo on one machine."""
