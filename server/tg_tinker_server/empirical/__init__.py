"""Attacks the service's own training and reports what leaks: probes, tests of the noise, a lower bound on epsilon."""
