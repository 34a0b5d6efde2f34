"""The evaluation section of a report."""
