"""Suites of benchmarks: their stages, the tests that guard these, and the tables of what was measured."""
