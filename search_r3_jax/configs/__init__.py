"""One Python file an experiment; `config` in each is a `RunConfig`."""
