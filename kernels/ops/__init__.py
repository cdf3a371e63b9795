"""Triton kernels and their launchers. They know tensors and sizes, nothing else.

Each module holds one operation: kernels first, then launchers that check, allocate and launch.
Importing a module compiles nothing and touches no device.
"""
