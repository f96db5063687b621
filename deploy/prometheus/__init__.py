"""Prometheus: what it scrapes, its rules and alerts, and a demo of them on one machine."""
