#!/bin/sh
# What `make metrics-demo` and `make test-metrics` need, from Debian or Ubuntu. Run as root.
exec apt-get install -y --no-install-recommends prometheus prometheus-pushgateway
