"""Index versions and corpus vectors on disk or in a bucket."""
