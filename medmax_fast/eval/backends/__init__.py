"""Models that answer the questions of an evaluation, behind one protocol."""
