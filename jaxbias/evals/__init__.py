"""Evaluation: the scoring engine, one file a benchmark, statistics."""
