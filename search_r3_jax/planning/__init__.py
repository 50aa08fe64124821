"""Plans of memory and time of a stage on a TPU slice, from its compiled program."""
