"""What a stage needs of a TPU, found out by its compiler without one."""
