"""Evaluation of models: metrics, baselines, tests of significance, MTEB, and reports."""
