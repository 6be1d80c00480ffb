"""Tools for whoever changes a kernel: compile for GPUs that are not there, and read what the compiler made."""
