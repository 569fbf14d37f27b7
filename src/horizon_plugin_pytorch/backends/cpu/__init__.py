"""Kernels for the CPU in C++, in a shared library with a plain C interface (csrc/horizon_cpu.h)."""
