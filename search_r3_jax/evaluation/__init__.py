"""Retrieval metrics, TREC run files and the BM25 baseline."""
