"""Tools for kernel developers: compile for GPUs this machine lacks, and inspect the compiler's output."""
