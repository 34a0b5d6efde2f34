"""Evaluation: tasks, scoring, runs."""
